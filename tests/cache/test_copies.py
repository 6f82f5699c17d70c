"""Copies are found by content, whatever their names, labels and splits."""

import hashlib

import numpy as np

from featcache.cache.copies import Digests, are_among, find_copies, first_copies
from featcache.cache.format import encode_names


def digests(contents: str) -> np.ndarray:
    """Of one-letter files."""
    return np.stack([np.frombuffer(hashlib.sha256(letter.encode()).digest(), np.uint8) for letter in contents])


def found(contents: str, labels: list[int], splits: list[int]):
    names = encode_names(f"{letter}{k}" for k, letter in enumerate(contents))
    return find_copies(digests(contents), np.array(labels), np.array(splits), names)


def test_first_copies():
    assert first_copies(digests("abacadb")).tolist() == [0, 1, 0, 3, 0, 5, 1]
    assert are_among(digests("abc"), digests("xcaa")).tolist() == [True, False, True]


def test_counts_and_names():
    copies = found("abacaad", [0, 1, 0, 1, 1, 1, -1], [1, 1, 2, 1, 1, 3, 2])
    assert copies.counts() == {"within": 1, "across_splits": 2, "across_labels": 1}
    assert "2 images of val or test" in copies.examples[0] and "a2 of a0" in copies.examples[0]
    assert "as a0 and as a4" in copies.examples[1]


def test_what_is_no_leak():
    assert found("abc", [0, 1, 1], [1, 2, 3]).counts() == {"within": 0, "across_splits": 0, "across_labels": 0}
    assert found("aaa", [0, 0, 0], [0, 0, 0]).counts() == {"within": 2, "across_splits": 0, "across_labels": 0}
    assert found("aa", [0, -1], [0, 1]).counts() == {"within": 0, "across_splits": 0, "across_labels": 0}  # of no split
    assert found("a", [0], [1]).examples == ()


def test_digests_are_found_however_they_begin() -> None:
    """Oracle: a set of Python's. Of some rows all begin alike, as nobody's photographs do, but somebody's files may."""
    rng = np.random.default_rng(0)
    for alike in (0, 7, 8, 9, 31, 32):
        for n, m in ((0, 5), (5, 0), (1, 1), (40, 30), (300, 200)):
            some, others = (rng.integers(0, 3, (size, 32)).astype(np.uint8) for size in (n, m))
            some[:, :alike] = others[:, :alike] = 0
            others[: m // 3] = some[rng.integers(0, n, m // 3)] if n else 0
            known = {row.tobytes() for row in others}
            wanted = [row.tobytes() in known for row in some]
            assert are_among(some, others).tolist() == wanted
            assert [row.tobytes() in Digests(others) for row in some] == wanted
    assert b"" not in Digests(np.zeros((1, 32), np.uint8))  # that of an image that was refused


def test_places_of_digests_also_where_their_beginnings_are_alike() -> None:
    """Oracle: a dictionary."""
    digests = np.random.default_rng(0).integers(0, 256, (300, 32), np.uint8)
    digests[::3, :8] = digests[0, :8]
    digests[-1], digests[-2] = 255, 0
    among = digests[np.r_[0:200, 298, 299]]
    position = {row.tobytes(): place for place, row in enumerate(among)}
    expected = [position.get(row.tobytes(), -1) for row in digests]
    assert Digests(among).places(digests).tolist() == expected and expected.count(-1) == 98
    assert Digests(digests[:0]).places(digests[:2]).tolist() == [-1, -1]
