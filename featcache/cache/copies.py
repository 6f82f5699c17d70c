"""Copies: images whose files hold the same bytes. In: digests, labels and splits of N rows. Out: which are copies, counted."""

import dataclasses

import numpy as np
import numpy.typing as npt

from featcache.cache.format import Indices, decode_names, digest_keys
from featcache.spec import SPLITS

_NOWHERE = len(SPLITS)
_BLOCK = 2**16  # digests that are looked up at a time


def first_copies(digests: npt.NDArray[np.uint8]) -> Indices:
    """(N, 32) digests -> (N,) for each row the first row of the same content; its own number where there is none before."""
    rows, result = _repeated(digests), np.arange(len(digests))
    _, first, content = np.unique(digest_keys(digests[rows]), return_index=True, return_inverse=True)
    result[rows] = rows[first[content]]
    return result


def _repeated(digests: npt.NDArray[np.uint8]) -> Indices:
    """Rows that share the first eight bytes with others: all copies, and next to nothing else. It saves time and memory."""
    starts = _starts(digests)
    ordered = np.sort(starts)
    return np.flatnonzero(np.isin(starts, ordered[1:][ordered[1:] == ordered[:-1]]))


def _starts(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """(N, 32) -> (N,) the first eight bytes, which sort many times as fast as all of them."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0]


class Digests:
    """A set of digests, (M, 32), to look others up in: 48 bytes each, where a set of Python's takes some 150."""

    def __init__(self, digests: npt.NDArray[np.uint8]) -> None:
        starts = _starts(digests)
        self._digests, self._order = digests, np.argsort(starts)
        self._starts = starts[self._order]

    def __contains__(self, digest: bytes) -> bool:
        return bool(self.contain(np.frombuffer(digest, np.uint8).reshape(-1, 32)).any())

    def contain(self, digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """(N, 32) digests -> (N,) whether the content occurs among these."""
        if not len(self._starts):
            return np.zeros(len(digests), bool)
        found = np.empty(len(digests), bool)
        for start in range(0, len(digests), _BLOCK):
            found[start : start + _BLOCK] = self._contain(digests[start : start + _BLOCK])
        return found

    def places(self, digests: npt.NDArray[np.uint8]) -> Indices:
        """(N, 32) digests -> (N,) where the content lies among these, which must not repeat; -1: nowhere."""
        starts, found = _starts(digests), np.full(len(digests), -1, np.intp)
        first = np.searchsorted(self._starts, starts)
        while len(self._starts):  # a second time only where others begin alike
            place = first.clip(max=len(self._starts) - 1)
            same = (self._digests[self._order[place]] == digests).all(axis=1)
            found[same] = self._order[place[same]]
            if not ((self._starts[place] == starts) & (found < 0) & (first < len(self._starts))).any():
                break
            first = first + 1
        return found

    def _contain(self, digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        starts = _starts(digests)
        place = np.searchsorted(self._starts, starts).clip(max=len(self._starts) - 1)
        found: npt.NDArray[np.bool_] = (self._digests[self._order[place]] == digests).all(axis=1)
        # Others may begin alike: nobody's photographs, but somebody may have made them so.
        if len(doubtful := np.flatnonzero((self._starts[place] == starts) & ~found)):
            alike = self._digests[np.isin(_starts(self._digests), starts[doubtful])]
            found[doubtful] = np.isin(digest_keys(digests[doubtful]), digest_keys(alike))
        return found


def are_among(digests: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """(N, 32) and (M, 32) digests -> (N,) whether the content occurs among ``others``."""
    return Digests(others).contain(digests)


@dataclasses.dataclass(frozen=True)
class Copies:
    """How many images repeat others, byte for byte.

    Attributes:
        within: images beyond the first of their content in the same split.
        across_splits: images of val and test that also lie in a split before theirs (train, val, test).
        across_labels: contents that lie under several labels.
        examples: a sentence for each of the last two kinds that occurs, with names.
    """

    within: int
    across_splits: int
    across_labels: int
    examples: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    def counts(self) -> dict[str, int]:
        """As JSON values."""
        return {"within": self.within, "across_splits": self.across_splits, "across_labels": self.across_labels}


def find_copies(
    digests: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.integer],
    splits: npt.NDArray[np.integer],
    paths: npt.NDArray[np.bytes_],
) -> Copies:
    """Count copies.

    Args:
        digests: (N, 32). labels: (N,), -1: none. splits: (N,) positions in ``SPLITS``, 0: none.
        paths: (N,) as ``encode_names`` gives them.
    """
    rows = _repeated(digests)
    labels, splits, paths, first = labels[rows], splits[rows], paths[rows], first_copies(digests[rows])
    earliest = np.full(len(first), _NOWHERE)
    np.minimum.at(earliest, first, np.where(splits > 0, splits, _NOWHERE))
    across_splits = np.flatnonzero(splits > earliest[first])
    lowest, highest = np.full(len(first), np.iinfo(np.int64).max), np.full(len(first), -1)
    labelled = labels >= 0
    np.minimum.at(lowest, first[labelled], labels[labelled])
    np.maximum.at(highest, first[labelled], labels[labelled])
    across_labels = np.flatnonzero(lowest < highest)
    examples = []
    if len(across_splits):
        row = across_splits[0]
        other = np.flatnonzero((first == first[row]) & (splits == earliest[first[row]]))[0]
        copy, original = decode_names(paths[[row, other]])
        found = _count(len(across_splits), "image of val or test is a copy", "images of val or test are copies")
        examples.append(
            f"{found} of what an earlier split holds, the first {copy} of {original}: a score on them flatters"
        )
    if len(across_labels):
        rows = np.flatnonzero((first == across_labels[0]) & labelled)
        one, other = decode_names(paths[[rows[0], rows[labels[rows] != labels[rows[0]]][0]]])
        found = _count(len(across_labels), "image lies", "images lie")
        examples.append(f"{found} under several labels, the first as {one} and as {other}")
    within = len(first) - len(np.unique(first * len(SPLITS) + splits))
    return Copies(within, len(across_splits), len(across_labels), tuple(examples))


def _count(n: int, one: str, several: str) -> str:
    return f"{n} {one if n == 1 else several}"
