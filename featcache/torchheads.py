"""Linear and MLP heads trained by mini-batches read straight from the cache: the features never need to fit in memory.

In: (memory-mapped) features (N, D) and labels. Out: a ``FittedHead``. Only training rows ever come in here.
"""

import copy
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.model_selection import StratifiedKFold
from torch import nn

from featcache.heads import Array, FittedHead, Head, class_weights
from featcache.metrics import accuracy

TorchKind = Literal["linear", "mlp"]
Indices = npt.NDArray[np.intp]
MAX_EPOCHS, PATIENCE = 100, 10
HIDDEN, DROPOUT = 512, 0.25  # of the MLP
_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 1e-2
_BLOCK = 8192


def fit_torch_head(
    features: Array,
    rows: Indices,
    y: Array,
    *,
    kind: TorchKind,
    n_classes: int,
    folds: int = 5,
    balanced: bool = False,
    seed: int = 0,
) -> FittedHead:
    """Train a head with AdamW on standardised features.

    A stratified tenth of the rows decides how many epochs to train (early stopping on its loss); the head is then
    trained for that long on all rows. With ``folds`` the same is done within each fold for an out-of-fold estimate.

    Args:
        features: (M, D), possibly memory-mapped. rows: the N training rows of it. y: (N,) labels in 0..n_classes-1.
        kind: ``linear``, or ``mlp`` with one hidden layer of 512, ReLU and dropout.
        n_classes: C classes.
        folds: of the cross-validation; 0 for none.
        balanced: weigh classes inversely to their frequency.
        seed: of weights, batches and folds; the same seed gives the same head.
    """
    data = _Data(features, rows, y, n_classes, balanced)
    accuracies = []
    if folds:
        for train, held_out in StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(y)), y):
            head, _ = _train(data, train, kind, seed)
            accuracies.append(accuracy(y[held_out], head.score(features, rows[held_out])))
    head, epochs = _train(data, np.arange(len(rows)), kind, seed)
    notes: tuple[str, ...] = ()
    if epochs == MAX_EPOCHS:
        notes = (f"trained for {MAX_EPOCHS} epochs, the most there are: more data or logreg may do better",)
    return FittedHead(head, tuple(accuracies), {"scaling": "standardise", "epochs": epochs}, [], notes)


class _Data:
    """Mini-batches of some of the rows."""

    def __init__(self, features: Array, rows: Indices, y: Array, n_classes: int, balanced: bool) -> None:
        self.features, self.rows, self.y, self.n_classes = features, rows, y, n_classes
        self.weights = torch.from_numpy(class_weights(y, n_classes, balanced).astype(np.float32))

    def batch(self, picked: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.features[self.rows[picked]].astype(np.float32)
        return torch.from_numpy(x), torch.from_numpy(self.y[picked].astype(np.int64))

    def blocks(self, picked: Indices) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(picked), _BLOCK):
            yield self.batch(picked[start : start + _BLOCK])

    def moments(self, picked: Indices) -> tuple[Array, Array]:
        """(D,) mean and standard deviation, in one pass; a constant feature gets 1."""
        total = square = np.zeros(self.features.shape[1])
        shift = self.features[self.rows[picked[0]]].astype(np.float64)  # near the mean: no cancellation
        for x, _ in self.blocks(picked):
            centred = x.numpy() - shift
            total = total + centred.sum(axis=0)
            square = square + (centred**2).sum(axis=0)
        mean = total / len(picked)
        deviation = np.sqrt(np.maximum(square / len(picked) - mean**2, 0))
        return mean + shift, np.where(deviation < 1e-6, 1.0, deviation)


def _train(data: _Data, picked: Indices, kind: TorchKind, seed: int) -> tuple[Head, int]:
    """Find the number of epochs on a held-out tenth, then train on all of ``picked``."""
    train, held_out = _hold_out(data.y, picked, seed)
    epochs = MAX_EPOCHS
    if len(held_out):
        _, epochs = _run(data, train, kind, seed, MAX_EPOCHS, held_out)
    return _run(data, picked, kind, seed, epochs, None)


def _hold_out(y: Array, picked: Indices, seed: int) -> tuple[Indices, Indices]:
    """A stratified tenth, at least one per class that has two; the rest trains."""
    generator = np.random.default_rng(seed)
    held_out: list[int] = []
    for label in np.unique(y[picked]):
        members = generator.permutation(picked[y[picked] == label])
        held_out += members[: max(1, round(len(members) / 10)) if len(members) > 1 else 0].tolist()
    return np.setdiff1d(picked, held_out), np.array(sorted(held_out), np.intp)


def _run(
    data: _Data, picked: Indices, kind: TorchKind, seed: int, epochs: int, held_out: Indices | None
) -> tuple[Head, int]:
    """Train for ``epochs``, or until the loss on ``held_out`` has not improved for ``PATIENCE`` epochs."""
    mean, scale = data.moments(picked)
    shift, factor = torch.from_numpy(mean.astype(np.float32)), torch.from_numpy((1 / scale).astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(kind, len(mean), data.n_classes)
        optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        loss_function = nn.CrossEntropyLoss(weight=data.weights)
        size = int(np.clip(2 ** round(np.log2(max(len(picked), 1) / 32)), 32, 4096))
        shuffle = np.random.default_rng(seed)
        best: tuple[float, int, dict[str, Any]] = (np.inf, epochs, {})
        for epoch in range(1, epochs + 1):
            network.train()
            for batch in np.array_split(shuffle.permutation(picked), -(-len(picked) // size)):
                x, y = data.batch(np.sort(batch))  # sorted: memory-mapped rows are read in order
                optimizer.zero_grad()
                loss_function(network((x - shift) * factor), y).backward()
                optimizer.step()
            if held_out is not None:
                loss = _loss(network, data, held_out, shift, factor, loss_function)
                if loss < best[0]:
                    best = (loss, epoch, copy.deepcopy(network.state_dict()))
                elif epoch - best[1] >= PATIENCE:
                    break
        if best[2]:
            network.load_state_dict(best[2])
    linear = [module for module in network if isinstance(module, nn.Linear)]
    layers = tuple((m.weight.detach().numpy().copy(), m.bias.detach().numpy().copy()) for m in linear)
    return Head(kind, "standardise", mean.astype(np.float32), scale.astype(np.float32), layers), best[1]


def _network(kind: TorchKind, dim: int, n_classes: int) -> nn.Sequential:
    body = [] if kind == "linear" else [nn.Linear(dim, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT)]
    last = nn.Linear(HIDDEN if body else dim, n_classes)
    nn.init.zeros_(last.weight)  # start from equal probabilities: nothing to unlearn
    nn.init.zeros_(last.bias)
    return nn.Sequential(*body, last)


@torch.inference_mode()
def _loss(
    network: nn.Module,
    data: _Data,
    picked: Indices,
    shift: torch.Tensor,
    factor: torch.Tensor,
    loss_function: nn.Module,
) -> float:
    network.eval()
    total = sum(float(loss_function(network((x - shift) * factor), y)) * len(y) for x, y in data.blocks(picked))
    return total / len(picked)
