"""Linear and MLP heads trained by mini-batches read straight from the cache: the features never need to fit in memory.

In: features (N, D), an array or an open cache, and labels. Out: a ``FittedHead``. Only training rows ever come in here.

What fits in ``_MEMORY`` is read once. Of more, short runs of consecutive rows from all over the cache are read into a
buffer, and mini-batches are drawn from that: a cache is sorted by class, and neither a row at a time nor all rows of a
class in a row would do. Loss is then looked at not once per epoch, but after every ``_ROUND`` rows.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import nn

from featcache.heads.head import Array, FeatureSource, FittedHead, Head, Indices, class_weights
from featcache.system.device import use_one_thread_if_forked

TorchKind = Literal["linear", "mlp"]
MAX_EPOCHS, PATIENCE = 100, 10
HIDDEN, DROPOUT = 512, 0.25  # of the MLP
_LEARNING_RATE, _WEIGHT_DECAY, _BETAS, _EPSILON = 3e-3, 1e-2, (0.9, 0.999), 1e-8
_BLOCK = 4096  # most rows of a batch
_MEMORY = 2**28  # bytes of features, as stored: up to this they are kept in memory
_BUFFER = 2**26  # bytes of features that mini-batches are drawn from, if they are not
_RUN = 16  # rows read in one go: 40 KB of 1,280 float16, which is as fast as more
_ROUND = 2**17  # rows between two looks at the loss; small data take an epoch
_HELD_OUT = 2**15  # rows are enough to see a loss fall


def fit_torch_head(
    features: FeatureSource,
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
        features: (M, D), an array or a reader of a cache. rows: the N training rows of it. y: (N,) labels in 0..n_classes-1.
        kind: ``linear``, or ``mlp`` with one hidden layer of 512, ReLU and dropout.
        n_classes: C classes.
        folds: of the cross-validation; 0 for none.
        balanced: weigh classes inversely to their frequency.
        seed: of weights, batches and folds; the same seed gives the same head.
    """
    use_one_thread_if_forked()
    data = _Data(features, rows, y, n_classes, balanced)
    accuracies = []
    if folds:
        for train, held_out in StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(y)), y):
            head, _ = _train(data, train, kind, seed)
            accuracies.append(data.accuracy(head, held_out))
    head, epochs = _train(data, np.arange(len(rows)), kind, seed)
    notes: tuple[str, ...] = ()
    if round(epochs * data.rounds) == MAX_EPOCHS:
        notes = (f"trained for {epochs:g} epochs, the most there are: more data or logreg may do better",)
    chosen = {"scaling": "standardise", "epochs": int(epochs) if data.rounds == 1 else round(epochs, 2)}
    return FittedHead(head, tuple(accuracies), chosen, [], notes)


class _Data:
    """N training rows. ``picked`` are some of 0..N-1, ascending; batches lie in memory that the next overwrites."""

    def __init__(self, features: FeatureSource, rows: Indices, y: Array, n_classes: int, balanced: bool) -> None:
        self.row_bytes = features.shape[1] * features.dtype.itemsize
        self.in_memory = len(rows) * self.row_bytes <= _MEMORY
        if self.in_memory:
            features, rows = features[rows], np.arange(len(rows))
        self.features, self.rows, self.y, self.n_classes = features, rows, y, n_classes
        self.rounds = 1 if self.in_memory else -(-len(rows) // _ROUND)  # per epoch
        self.weights = torch.from_numpy(class_weights(y, n_classes, balanced=balanced).astype(np.float32))
        self._memory = torch.empty((min(_BLOCK, len(rows)), features.shape[1]))

    def batch(self, picked: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        return self._tensors(self.features[self.rows[picked]], picked)

    def _tensors(self, stored: Array, picked: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        # PyTorch widens float16 several times as fast as NumPy.
        x = self._memory[: len(picked)].copy_(torch.from_numpy(stored))
        return x, torch.from_numpy(self.y[picked].astype(np.int64))

    def blocks(self, picked: Indices) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All of ``picked``, in order."""
        for start in range(0, len(picked), _BLOCK):
            yield self.batch(picked[start : start + _BLOCK])

    def mini_batches(
        self, picked: Indices, size: int, shuffle: np.random.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All of ``picked`` once, in random order, about ``size`` at a time."""
        if self.in_memory:
            for batch in np.array_split(shuffle.permutation(picked), -(-len(picked) // size)):
                yield self.batch(np.sort(batch))
            return
        for mixture in _mixtures(picked, max(size, _BUFFER // self.row_bytes), shuffle):
            stored = self.features[self.rows[mixture]]
            for batch in np.array_split(shuffle.permutation(len(mixture)), -(-len(mixture) // size)):
                yield self._tensors(stored[batch], mixture[batch])
            del stored  # before the next is read

    def subset(self, picked: Indices) -> "_Data":
        """``picked`` alone, in memory if they fit."""
        data = _Data(self.features, self.rows[picked], self.y[picked], self.n_classes, False)
        data.weights = self.weights
        return data

    def moments(self, picked: Indices) -> tuple[Array, Array]:
        """(D,) mean and standard deviation, in one pass; a constant feature gets 1."""
        total, square = np.zeros(self.features.shape[1]), np.zeros(self.features.shape[1])
        first = self.batch(picked[:1])[0].clone()  # near the mean: no cancellation
        for x, _ in self.blocks(picked):
            x -= first
            ones = torch.ones(len(x))
            total += (ones @ x).numpy()  # by BLAS, in float32; blocks are added up in float64
            square += (ones @ x.square_()).numpy()
        mean = total / len(picked)
        deviation = np.sqrt(np.maximum(square / len(picked) - mean**2, 0))
        return mean + first[0].double().numpy(), np.where(deviation < 1e-6, 1.0, deviation)

    def accuracy(self, head: Head, picked: Indices) -> float:
        """Share of ``picked`` that ``head`` labels right."""
        right = 0
        for start in range(0, len(picked), _BLOCK):
            block = picked[start : start + _BLOCK]
            logits = head.logits(self.features[self.rows[block]])
            right += int((logits.argmax(axis=1) == self.y[block]).sum())
        return right / len(picked)


def _mixtures(picked: Indices, size: int, shuffle: np.random.Generator) -> Iterator[Indices]:
    """Cut ``picked`` into runs, and yield about ``size`` of it at a time, as ascending runs from all over it.

    Every stretch of as many runs as there are mixtures gives one to each, so that no class is missing from any of them.
    """
    runs = -(-len(picked) // _RUN)
    count = -(-len(picked) // size)
    stretches = -(-runs // count)
    order = shuffle.permuted(np.arange(stretches * count).reshape(stretches, count), axis=1)
    for column in shuffle.permutation(count):
        places = (order[:, column, None] * _RUN + np.arange(_RUN)).reshape(-1)
        if len(places := places[places < len(picked)]):
            yield picked[places]


def _train(data: _Data, picked: Indices, kind: TorchKind, seed: int) -> tuple[Head, float]:
    """Find the number of epochs on a held-out tenth, then train on all of ``picked``."""
    train, held_out = _hold_out(data.y, picked, seed)
    epochs = MAX_EPOCHS / data.rounds
    if len(held_out):
        _, epochs = _run(data, train, kind, seed, epochs, held_out)
    return _run(data, picked, kind, seed, epochs, None)


def _hold_out(y: Array, picked: Indices, seed: int) -> tuple[Indices, Indices]:
    """A stratified tenth, at least one per class that has two and not many more than needed; the rest trains."""
    generator = np.random.default_rng(seed)
    share = min(0.1, _HELD_OUT / len(picked))
    held_out = np.zeros(len(y), bool)
    for label in np.unique(y[picked]):
        members = generator.permutation(picked[y[picked] == label])
        held_out[members[: max(1, round(len(members) * share)) if len(members) > 1 else 0]] = True
    return picked[~held_out[picked]], np.flatnonzero(held_out)


def _run(
    data: _Data, picked: Indices, kind: TorchKind, seed: int, epochs: float, held_out: Indices | None
) -> tuple[Head, float]:
    """Train for ``epochs``, or until the loss on ``held_out`` has not improved for ``PATIENCE`` rounds."""
    mean, scale = data.moments(picked)
    shift, factor = torch.from_numpy(mean.astype(np.float32)), torch.from_numpy((1 / scale).astype(np.float32))
    judge = data.subset(held_out) if held_out is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(kind, len(mean), data.n_classes)
        optimizer = _AdamW(network)
        loss_function = nn.CrossEntropyLoss(weight=data.weights)
        size = int(np.clip(2 ** round(np.log2(max(len(picked), 1) / 32)), 32, _BLOCK))
        shuffle = np.random.default_rng(seed)
        batches = itertools.chain.from_iterable(data.mini_batches(picked, size, shuffle) for _ in itertools.count())
        best: tuple[float, float, dict[str, Any]] = (np.inf, epochs, {})
        seen = 0
        for number in range(1, round(epochs * data.rounds) + 1):
            network.train()
            while seen < number * len(picked) / data.rounds:
                x, y = next(batches)
                seen += len(y)
                loss_function(network(x.sub_(shift).mul_(factor)), y).backward()
                optimizer.step()
            if judge is not None:
                loss = _loss(network, judge, shift, factor, loss_function)
                if loss < best[0]:
                    best = (loss, number / data.rounds, copy.deepcopy(network.state_dict()))
                elif number - best[1] * data.rounds >= PATIENCE:
                    break
        if best[2]:
            network.load_state_dict(best[2])
    linear = [module for module in network if isinstance(module, nn.Linear)]
    layers = tuple((m.weight.detach().numpy().copy(), m.bias.detach().numpy().copy()) for m in linear)
    return Head(kind, "standardise", mean.astype(np.float32), scale.astype(np.float32), layers), best[1]


class _AdamW:
    """torch.optim.AdamW for these few tensors. The first use of that one imports PyTorch's compiler: 145 MB, seconds."""

    def __init__(self, network: nn.Module) -> None:
        self.parameters = list(network.parameters())
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Follow the gradients, and clear them."""
        self.steps += 1
        (a, b), correction = _BETAS, (1 - _BETAS[1] ** self.steps) ** 0.5
        rate = _LEARNING_RATE / (1 - a**self.steps)
        for parameter, mean, square in zip(self.parameters, self.means, self.squares, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            parameter.mul_(1 - _LEARNING_RATE * _WEIGHT_DECAY)
            mean.lerp_(gradient, 1 - a)
            square.mul_(b).addcmul_(gradient, gradient, value=1 - b)
            parameter.addcdiv_(mean, (square.sqrt() / correction).add_(_EPSILON), value=-rate)
            parameter.grad = None


def _network(kind: TorchKind, dim: int, n_classes: int) -> nn.Sequential:
    body = [] if kind == "linear" else [nn.Linear(dim, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT)]
    last = nn.Linear(HIDDEN if body else dim, n_classes)
    nn.init.zeros_(last.weight)  # start from equal probabilities: nothing to unlearn
    nn.init.zeros_(last.bias)
    return nn.Sequential(*body, last)


@torch.inference_mode()
def _loss(
    network: nn.Module, data: _Data, shift: torch.Tensor, factor: torch.Tensor, loss_function: nn.Module
) -> float:
    """Mean loss on all of ``data``."""
    network.eval()
    total = 0.0
    for x, y in data.blocks(np.arange(len(data.rows))):
        total += float(loss_function(network(x.sub_(shift).mul_(factor)), y)) * len(y)
    return total / len(data.rows)
