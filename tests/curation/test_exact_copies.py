"""Exact copies: one finding per row of a repeated content, those across splits and labels first."""

import numpy as np

from featcache.curation.copies import find_exact_copies


def test_rows_of_one_content_are_found_and_across_what_they_lie() -> None:
    contents = np.array([5, 1, 5, 2, 3, 3, 4, 4, 6])
    digests = np.repeat(contents[:, None], 32, axis=1).astype(np.uint8)
    labels, splits = np.array([0, 0, 1, 0, 0, 0, 0, 1, -1]), np.array([1, 1, 3, 1, 1, 1, 2, 2, 0])
    found = find_exact_copies(digests, labels, splits)
    assert [(one.row, one.other, one.group, one.score) for one in found] == [
        (0, 2, 0, 1.0), (2, 0, 0, 1.0), (4, 5, 1, 0.4), (5, 4, 1, 0.4), (6, 7, 2, 0.6), (7, 6, 2, 0.6),
    ]  # fmt: skip
    assert found[0].reason == "2 files hold the same bytes, in train and test, under 2 labels"
    assert all(one.kind == "exact_copy" and one.verified for one in found)


def test_only_some_rows_and_none() -> None:
    digests = np.zeros((6, 32), np.uint8)
    labels, splits = np.full(6, -1), np.zeros(6, int)
    assert [(one.row, one.other) for one in find_exact_copies(digests, labels, splits, rows=np.array([2, 5]))] == [
        (2, 5),
        (5, 2),
    ]
    assert not find_exact_copies(digests, labels, splits, rows=np.array([3]))
    assert not find_exact_copies(digests[:0], labels[:0], splits[:0])
