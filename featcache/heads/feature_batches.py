"""Training rows in mini-batches, read from a cache whose features need not fit in memory.

In: a ``FeatureSource`` of (M, D) embeddings, and the rows that train. Out: batches of features and labels, in order or mixed.

Features that fit in ``Budget.memory`` are read once. Of more, short runs of consecutive rows from all over the cache are
read into a buffer, and mini-batches are drawn from that: a cache is sorted by class, so that reading a row at a time would
be slow, and a batch of consecutive rows would hold one class.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from featcache.heads.head import MAX_LOGITS, Array, FeatureSource, Indices
from featcache.system.transfer import Feed, staged

_SAFE = 1e15  # in float32 a batch's squares of what is larger may overflow
_RUN = 16  # rows read in one go: 40 KB of 1,280 float16, which is as fast as more

Block = Array | torch.Tensor  # (m, D) features as stored, on a CPU an array


@dataclasses.dataclass(frozen=True)
class Budget:
    """What training may take: bytes of features as stored, rows, and rounds, each of which ends with a look at the loss."""

    memory: int = 2**28  # bytes; features that fit are kept in memory
    buffer: int = 2**26  # bytes that mini-batches are drawn from where they are not
    batch_rows: int = 4096  # at most
    round_rows: int = 2**17  # of features that are not in memory; otherwise a round is an epoch
    held_out_rows: int = 2**15  # enough to see a loss fall
    max_rounds: int = 100
    logits: int = MAX_LOGITS  # out of fold, that are kept; of more, those of some rows, which give the temperature
    patience: int = 10  # rounds without a lower loss, after which training ends


USUAL_BUDGET = Budget()


class FeatureBatches:
    """N training rows, in batches; features that are in memory give them to several threads.

    ``picked`` are some of 0..N-1, ascending. A batch is (n, D) float32 features, in memory that the next batch overwrites,
    and (n,) labels. A ``device`` gets features as they are stored, all of them or a buffer at a time, and picks rows itself;
    None: this CPU, where NumPy picks them.
    """

    def __init__(
        self, features: FeatureSource, rows: Indices, y: Array, *, budget: Budget, device: torch.device | None = None
    ) -> None:
        self.row_bytes = features.shape[1] * features.dtype.itemsize
        self.in_memory = len(rows) * self.row_bytes <= budget.memory
        if self.in_memory:
            features, rows = features[rows], np.arange(len(rows))
        self.features, self.rows, self.y, self.budget = features, rows, y, budget
        self.rounds_per_epoch = 1 if self.in_memory else -(-len(rows) // budget.round_rows)
        self.place, self.device = device, device or torch.device("cpu")
        self._feed, self._batch_rows = Feed(self.device), min(budget.batch_rows, len(rows))
        self._kept = torch.from_numpy(features).to(device) if device and self.in_memory else None

    def epochs(self, rounds: int) -> float:
        """``rounds`` in epochs, an int where they are whole."""
        epochs = rounds / self.rounds_per_epoch
        return int(epochs) if epochs.is_integer() else round(epochs, 2)

    def _memory(self, rows: int) -> torch.Tensor | None:
        """Of batches of at most so many rows; None: the device's own."""
        return None if self.place else torch.empty((min(rows, self._batch_rows), self.features.shape[1]))

    def _batch(
        self, block: Block, places: Indices | None, picked: Indices, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those ``places`` of a block (None: all of it) that hold ``picked``, in ``memory``."""
        y = self.y[picked].astype(np.int64)
        if memory is not None:
            stored = torch.from_numpy(block if places is None else block[places])
            # PyTorch widens float16 several times as fast as NumPy.
            return memory[: len(picked)].copy_(stored), torch.from_numpy(y)
        index, labels = self._feed(*(staged(a, self.device) for a in (np.arange(0) if places is None else places, y)))
        return (block if places is None else block[index]).float(), labels  # type: ignore[union-attr]

    def _read(self, picked: Indices) -> Array:
        return self.features[self.rows[picked]]

    def _load(self, stored: Array) -> Block:
        """A block to take batches from."""
        return self._feed(staged(stored, self.device))[0] if self.place else stored

    def _these(self, picked: Indices, memory: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of ``picked``, read for it alone."""
        if self._kept is not None:
            return self._batch(self._kept, picked, picked, memory)
        return self._batch(self._load(self._read(picked)), None, picked, memory)

    def in_order(self, picked: Indices) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All of ``picked``, in order."""
        memory = self._memory(len(picked))
        for start in range(0, len(picked), self._batch_rows):
            yield self._these(picked[start : start + self._batch_rows], memory)

    def mini_batches(
        self, picked: Indices, size: int, shuffle: np.random.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All of ``picked`` once, in random order, about ``size`` at a time."""
        memory = self._memory(size)
        if self.in_memory:
            for batch in np.array_split(shuffle.permutation(picked), -(-len(picked) // size)):
                batch.sort()
                yield self._these(batch, memory)
            return
        for mixture in _mixtures(picked, max(size, self.budget.buffer // self.row_bytes), shuffle):
            block = self._load(self._read(mixture))
            for batch in np.array_split(shuffle.permutation(len(mixture)), -(-len(mixture) // size)):
                yield self._batch(block, batch, mixture[batch], memory)
            del block  # before the next is read

    def moments(self, picked: Indices) -> tuple[Array, Array]:
        """(D,) mean and standard deviation, in one pass; a constant feature gets 1."""
        total, square = np.zeros(self.features.shape[1]), np.zeros(self.features.shape[1])
        first = torch.from_numpy(self._read(picked[:1])).float().to(self.device)  # near the mean: no cancellation
        for x, _ in self.in_order(picked):
            x -= first
            largest = x.abs().amax(0)
            unit = torch.where(largest > _SAFE, largest, 1)
            ones = torch.ones(len(x), device=self.device)
            units = unit.cpu().double().numpy()
            total += (ones @ x.div_(unit)).cpu().numpy() * units  # by BLAS, in float32; blocks are added up in float64
            square += (ones @ x.square_()).cpu().numpy() * units**2
        mean = total / len(picked)
        deviation = np.sqrt(np.maximum(square / len(picked) - mean**2, 0))
        return mean + first[0].cpu().double().numpy(), np.where(deviation < 1e-6, 1.0, deviation)


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
