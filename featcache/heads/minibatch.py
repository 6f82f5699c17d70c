"""Linear and MLP heads trained by mini-batches read straight from the cache: the features never need to fit in memory.

In: a ``FeatureSource`` of (M, D) embeddings, and the rows and labels to train on. Out: a ``FittedHead``.

A head is one core's work, and the folds' heads are trained side by side: small steps shared by cores are mostly waiting. How
features are read is ``feature_batches.py``. Of those that do not fit in memory the held-out loss is looked at not once per
epoch, but after every ``Budget.round_rows`` rows.
"""

import contextlib
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim.adamw import adamw

from featcache.errors import TrainingError
from featcache.heads.feature_batches import USUAL_BUDGET, Budget, FeatureBatches
from featcache.heads.head import (
    USUAL,
    Array,
    FeatureSource,
    FittedHead,
    Head,
    Indices,
    TorchSettings,
    class_weights,
)
from featcache.heads.validation import OutOfFold, fit_temperature, judge, stratified_folds
from featcache.system.device import (
    kept_random_state,
    launching,
    one_core_each,
    seed_random_numbers,
    threads_held,
    true_float32,
    use_one_thread_if_forked,
)
from featcache.system.display import quantity
from featcache.system.runtime_options import gpu_for, usable_cores

log = logging.getLogger("featcache")
TorchKind = Literal["linear", "mlp"]
_CPU = torch.device("cpu")
_ADAMW: dict[str, Any] = {"weight_decay": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
_ADAMW |= {"amsgrad": False, "maximize": False, "fused": True}  # fused: a step takes half the time, of an MLP a seventh
# Rows times values times outputs of the first layer, from where on a GPU wins: some seconds of a CPU with 16 cores, at 20 epochs and
# 5 folds. An estimate: ``benchmarks/gpu.py`` measures it.
_WORTH_A_GPU = 10**9
# Rows of a step times values times outputs of the first layer, from where on several cores share a step. Below, threads that wait
# for each other would take most of the time, and beside other processes many times that.
_WORTH_CORES = 2**28
_COPIES = 64  # outputs that take as long as a batch's way from the features as stored to standardised ones


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
    settings: TorchSettings = USUAL,
    budget: Budget = USUAL_BUDGET,
    copies: Indices | None = None,
    device: str = "cpu",
) -> FittedHead:
    """Train a head with AdamW on standardised features.

    A stratified tenth of the rows decides how many epochs to train (early stopping on its loss), unless the settings do;
    the head is then trained for that long on all rows. With ``folds`` the same is done within each fold for an out-of-fold
    estimate, and for the temperature by which the last layer is divided.

    Args:
        features: (M, D). rows: numbers of the N training rows. y: (N,) labels in 0..n_classes-1.
        kind: ``linear``, or ``mlp`` with ReLU and dropout after each hidden layer.
        folds: of the cross-validation; 0 for none.
        balanced: weigh classes inversely to their frequency.
        seed: of weights, batches and folds; the same seed gives the same head.
        settings: layers, epochs, learning rate, batch size.
        copies: (N,) which of the N rows are copies, as ``stratified_folds`` wants it; None: none are.
        device: auto, cpu, cuda, cuda:N or mps; auto takes a CUDA GPU where there is one and enough to do. The same rows, batches and
            first weights on each; what dropout draws is the device's own.

    Raises:
        TrainingError: the weights are no longer finite. UsageError: no such device.
    """
    use_one_thread_if_forked()
    budget = dataclasses.replace(budget, batch_rows=max(budget.batch_rows, settings.batch_size or 0))
    width = settings.hidden[0] if kind == "mlp" else n_classes
    gpu = gpu_for(device, len(rows) * features.shape[1] * width, worth=_WORTH_A_GPU)
    if gpu is not None:
        log.info("the head is trained on %s%s", gpu, ": there is enough to do" if device == "auto" else "")
    data = FeatureBatches(features, rows, y, budget=budget, device=gpu)
    copies = np.arange(len(rows)) if copies is None else copies
    options: dict[str, Any] = {"n_classes": n_classes, "balanced": balanced, "seed": seed}
    trainer = _Trainer(data, copies, kind=kind, settings=settings, **options)
    splits = stratified_folds(y, copies, folds=folds, seed=seed) if folds else []
    validation: dict[str, Any] = {}
    accuracies = np.empty(0)
    history: list[dict[str, Any]] = []
    with launching(data.device), true_float32:
        *of_folds, (head, rounds) = trainer.train_each([*(train for train, _ in splits), np.arange(len(rows))], history)
        if folds:
            found, logits, some = trainer.judge_folds(splits, [fold_head for fold_head, _ in of_folds])
            accuracies = found.of_folds(found.right)[:, 0]
            temperature, change = fit_temperature(y[some], logits, found.fold[some])
            validation["cv_accuracy"], log_loss = found.corrected(copies, seed=seed)
            validation |= {"cv_log_loss": log_loss + change, "temperature": temperature}
            validation["out_of_fold"] = logits / np.float32(temperature)
            validation["kept"] = some if len(some) < len(y) else None
            head = head.at_temperature(temperature)
    epochs = data.epochs(rounds)
    notes: tuple[str, ...] = ()
    if rounds == budget.max_rounds and settings.epochs is None:
        notes = (f"trained for {quantity(epochs, 'epoch')}, the most there are: more data or logreg may do better",)
    chosen: dict[str, Any] = {"scaling": "standardise", "lr": settings.lr, "batch_size": trainer.batch_size(len(rows))}
    chosen["epochs"] = epochs
    if kind == "mlp":
        chosen |= {"hidden": list(settings.hidden), "dropout": list(settings.dropouts)}
    return FittedHead(head, tuple(accuracies.tolist()), chosen, [], notes, history=history, **validation)


class _Network(nn.Module):
    """The head in training: standardises its input in place, and starts from equal probabilities: nothing to unlearn."""

    shift: torch.Tensor
    factor: torch.Tensor

    def __init__(
        self,
        kind: TorchKind,
        mean: Array,
        scale: Array,
        n_classes: int,
        *,
        settings: TorchSettings,
        draws: torch.Generator,
    ) -> None:
        super().__init__()
        self.kind, self.mean, self.scale = kind, mean.astype(np.float32), scale.astype(np.float32)
        self.register_buffer("shift", torch.from_numpy(self.mean))
        self.register_buffer("factor", torch.from_numpy((1 / scale).astype(np.float32)))
        width, body = len(mean), list[nn.Module]()
        for size, share in zip(settings.hidden, settings.dropouts, strict=True) if kind == "mlp" else ():
            body += [nn.Linear(width, size), nn.ReLU(), _Dropout(share, draws)]
            width = size
        last = nn.Linear(width, n_classes)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*body, last)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers(x.sub_(self.shift).mul_(self.factor))

    def to_head(self) -> Head:
        linear = [module for module in self.layers if isinstance(module, nn.Linear)]
        layers = tuple((m.weight.detach().cpu().numpy().copy(), m.bias.detach().cpu().numpy().copy()) for m in linear)
        return Head(self.kind, "standardise", self.mean, self.scale, layers)


class _Dropout(nn.Module):
    """As ``nn.Dropout``, of random numbers of its own: heads that are trained side by side draw what each would by itself."""

    def __init__(self, share: float, draws: torch.Generator) -> None:
        super().__init__()
        self._kept, self._draws = 1 - share, draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self._kept == 1:
            return x
        return x * torch.empty_like(x).bernoulli_(self._kept, generator=self._draws).div_(self._kept)


_MAKING = threading.Lock()  # one network at a time: first weights are drawn from the process's generator


class _Trainer:
    """Trains heads of one kind, each on some of the rows of ``data``."""

    def __init__(
        self,
        data: FeatureBatches,
        copies: Indices,
        *,
        kind: TorchKind,
        settings: TorchSettings,
        n_classes: int,
        balanced: bool,
        seed: int,
    ) -> None:
        self.copies, self.settings, self.stopped = copies, settings, False
        self.width = settings.hidden[0] if kind == "mlp" else n_classes  # of the first layer
        self.data, self.kind, self.n_classes, self.seed = data, kind, n_classes, seed
        weights = class_weights(data.y, n_classes, balanced=balanced)
        self.loss = nn.CrossEntropyLoss(weight=torch.from_numpy(weights.astype(np.float32)).to(data.device))

    def train_each(
        self, parts: Sequence[Indices], history: list[dict[str, Any]] | None = None
    ) -> list[tuple[Head, int]]:
        """What ``train`` makes of each of ``parts``, of the last one with its ``history``.

        A CPU trains as many side by side as it has cores, where features are in memory.
        """

        def one(number: int) -> tuple[Head, int]:
            return self.train(parts[number], history if number == len(parts) - 1 else None)

        step = self.batch_size(len(parts[-1])) * self.data.features.shape[1] * max(self.width, _COPIES)
        at_once = len(parts) if self.data.in_memory else 1  # a buffer is as large as all features that fit
        with _cores(at_once, self.data.place, shared=step >= _WORTH_CORES) as each:
            try:
                return list(each(one, range(len(parts))))
            finally:
                self.stopped = True  # or the with would wait for those beside one that failed

    def judge_folds(
        self, splits: list[tuple[Indices, Indices]], heads: Sequence[Head]
    ) -> tuple[OutOfFold, Array, Indices]:
        """What each fold's head makes of its rows, the (n, C) logits of as many rows as may be kept, and which rows these are."""
        n = len(self.data.y)
        stride = -(-n * self.n_classes // self.data.budget.logits)
        some = np.arange(0, n, stride)
        logits = np.empty((len(some), self.n_classes), np.float32)
        right, loss, fold = np.empty((n, 1), bool), np.empty((n, 1), np.float32), np.empty(n, np.intp)
        for number, ((_, held_out), head) in enumerate(zip(splits, heads, strict=True)):
            fold[held_out] = number
            start = 0
            for x, y in self.data.in_order(held_out):
                found, rows = head.logits(x.cpu().numpy()), held_out[start : (start := start + len(y))]
                right[rows, 0], loss[rows, 0] = judge(y.cpu().numpy(), found)
                kept = rows % stride == 0
                logits[rows[kept] // stride] = found[kept]
        return OutOfFold(right, loss, fold), logits, some

    def train(self, picked: Indices, history: list[dict[str, Any]] | None = None) -> tuple[Head, int]:
        """A head trained on all of ``picked``, and for how many rounds: those asked for, or best on a held-out tenth.

        ``history`` takes a row per round of the training in which a tenth is held out, where there is one: what decides. See
        ``FittedHead``.
        """
        if self.settings.epochs is not None:
            rounds = self.settings.epochs * self.data.rounds_per_epoch
        else:
            train, held_out = self._hold_out(picked)
            rounds = self._best_round(train, held_out, history) if len(held_out) else self.data.budget.max_rounds
        *_, network = itertools.islice(self._rounds(picked, None if history else history), rounds)
        head = network.to_head()
        if not all(np.isfinite(array).all() for layer in head.layers for array in layer):
            raise self._diverged(rounds)
        return head, rounds

    def _diverged(self, rounds: int) -> TrainingError:
        epochs, lr = rounds / self.data.rounds_per_epoch, self.settings.lr
        return TrainingError(
            f"the head is no longer finite after {quantity(epochs, 'epoch')}; try a lower lr than {lr:g}"
        )

    def batch_size(self, n: int) -> int:
        """Rows per step of ``n`` rows: as asked for, or so many that an epoch has about 32 steps."""
        usual = np.clip(2 ** round(np.log2(max(n, 1) / 32)), 32, self.data.budget.batch_rows)
        return min(self.settings.batch_size, n) if self.settings.batch_size else int(usual)

    def _hold_out(self, picked: Indices) -> tuple[Indices, Indices]:
        """Rows that train, and a stratified tenth: at least one image of a class that has two, and not many more than needed.

        Copies of an image lie on its side.
        """
        generator, y = np.random.default_rng(self.seed), self.data.y
        share = min(0.1, self.data.budget.held_out_rows / len(picked))
        shown, held_out = np.zeros(len(y), bool), np.zeros(len(y), bool)
        shown[self.copies[picked]] = True
        images = np.flatnonzero(shown)
        for label in np.unique(y[images]):
            members = generator.permutation(images[y[images] == label])
            held_out[members[: max(1, round(len(members) * share)) if len(members) > 1 else 0]] = True
        left_out = held_out[self.copies[picked]]
        return picked[~left_out], picked[left_out]

    def _best_round(self, picked: Indices, held_out: Indices, history: list[dict[str, Any]] | None) -> int:
        """After which round of training on ``picked`` the loss on ``held_out`` is lowest (early stopping)."""
        data, budget = self.data, self.data.budget
        # Kept in memory if it fits.
        judge = FeatureBatches(data.features, data.rows[held_out], data.y[held_out], budget=budget, device=data.place)
        lowest, best = np.inf, budget.max_rounds
        for number, network in enumerate(itertools.islice(self._rounds(picked, history), budget.max_rounds), 1):
            loss, accuracy = self._judge(network, judge)
            if not np.isfinite(loss):
                raise self._diverged(number)
            if history is not None:
                history[-1] |= {"held_out_loss": loss, "held_out_accuracy": accuracy}
            if loss < lowest:
                lowest, best = loss, number
            elif number - best >= budget.patience:
                break
        return best

    def _rounds(self, picked: Indices, history: list[dict[str, Any]] | None) -> Iterator[_Network]:
        """Train a new network on ``picked`` without end; yield it after each round, of which ``history`` then has a row."""
        data = self.data
        draws = torch.Generator(data.device).manual_seed(self.seed)
        mean, scale = data.moments(picked)
        if not (np.isfinite(mean.astype(np.float32)).all() and np.isfinite(scale.astype(np.float32)).all()):
            raise TrainingError(
                "the features are too large for float32: their mean and spread are not finite; scale them down"
            )
        with _MAKING, kept_random_state(_CPU):
            seed_random_numbers(self.seed, _CPU)
            network = _Network(self.kind, mean, scale, self.n_classes, settings=self.settings, draws=draws)
        network.to(data.device)
        optimizer_step = _adamw(list(network.parameters()), lr=self.settings.lr)
        size = self.batch_size(len(picked))
        shuffle = np.random.default_rng(self.seed)
        batches = itertools.chain.from_iterable(data.mini_batches(picked, size, shuffle) for _ in itertools.count())
        seen = 0
        for number in itertools.count(1):
            network.train()
            before, sums = seen, _zeros(data.device)
            while seen < number * len(picked) / data.rounds_per_epoch:
                if self.stopped:
                    raise CancelledError
                x, y = next(batches)
                seen += len(y)
                logits = network(x)
                loss = self.loss(logits, y)
                loss.backward()
                optimizer_step()
                if history is not None:
                    sums += _sums(loss, logits, y)
            if history is not None:
                means = dict(zip(("train_loss", "train_accuracy"), (sums / (seen - before)).tolist(), strict=True))
                history.append({"epoch": data.epochs(number), **means})
            yield network

    @torch.inference_mode()
    def _judge(self, network: _Network, data: FeatureBatches) -> tuple[float, float]:
        """Mean loss and accuracy over all rows of ``data``."""
        network.eval()
        sums = _zeros(data.device)
        for x, y in data.in_order(np.arange(len(data.rows))):
            logits = network(x)
            sums += _sums(self.loss(logits, y), logits, y)
        loss, accuracy = (sums / len(data.rows)).tolist()
        return loss, accuracy


@contextlib.contextmanager
def _cores(heads: int, gpu: torch.device | None, *, shared: bool) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a ``map`` that trains so many ``heads`` side by side; ``shared``: cores that are left share their steps."""
    usable, before = usable_cores(), torch.get_num_threads()
    if gpu:
        yield map
    elif (
        heads == 1
    ):  # in this thread: OpenMP would count another one's threads and these together, and let all of them sleep
        with threads_held(before if shared else 1):
            yield map
    else:
        share = min(before, max(1, usable // heads)) if shared else 1
        with one_core_each(min(heads, usable), "featcache-head", cores=share) as pool:
            yield pool.map


def _zeros(device: torch.device) -> torch.Tensor:
    return torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


@torch.no_grad()
def _sums(loss: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(2,) loss and hits over a batch of which ``loss`` is the mean."""
    return torch.stack((loss * len(y), (logits.argmax(dim=1) == y).sum()))


def _adamw(parameters: list[torch.Tensor], *, lr: float) -> Callable[[], None]:
    """A step of PyTorch's AdamW: it follows the gradients of ``parameters``, and clears them.

    This is the functional form. On first use the class ``torch.optim.AdamW`` imports PyTorch's compiler: 147 MB and 1.4 s
    of CPU time (2 to 4 s on a busy machine), also within ``compiler_on_demand``, since it has the compiler pass it over.
    """
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    steps = [torch.zeros((), device=p.device) for p in parameters]

    @torch.no_grad()
    def step() -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        adamw(parameters, gradients, means, squares, [], steps, lr=lr, **_ADAMW)
        for parameter in parameters:
            parameter.grad = None

    return step
