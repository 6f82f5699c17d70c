"""Exact copies: rows whose files hold the same bytes. In: digests, labels and splits of rows. Out: findings, one per row."""

import numpy as np
import numpy.typing as npt

from featcache.cache.copies import first_copies
from featcache.curation.finding import Finding
from featcache.heads.head import Indices
from featcache.spec import SPLITS

_SCORES = {
    (False, False): 0.4,
    (False, True): 0.6,
    (True, False): 0.8,
    (True, True): 1.0,
}  # across splits, across labels


def find_exact_copies(
    digests: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.integer],
    splits: npt.NDArray[np.integer],
    *,
    rows: Indices | None = None,
) -> list[Finding]:
    """Find rows of the same content.

    The score says why to look: 1 if the content lies in several splits and under several labels, 0.8 in several splits, 0.6 under
    several labels, else 0.4. ``other`` is the first row of the content that lies elsewhere, if one does.

    Args:
        digests: (M, 32). labels: (M,), -1: none. splits: (M,) positions in ``SPLITS``, 0: none. rows: of which to speak; all.
    """
    rows = np.arange(len(digests)) if rows is None else rows
    first = first_copies(digests[rows])
    _, content, counts = np.unique(first, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts > 1)
    members = np.split(np.argsort(content, kind="stable"), np.cumsum(counts)[:-1]) if len(rows) else []
    return [
        finding
        for group, number in enumerate(repeated.tolist())
        for finding in _group(rows[members[number]], labels, splits, group)
    ]


def _group(
    rows: Indices, labels: npt.NDArray[np.integer], splits: npt.NDArray[np.integer], group: int
) -> list[Finding]:
    there, named = np.unique(splits[rows]), np.unique(labels[rows])
    across = len(there[there > 0]) > 1, len(named[named >= 0]) > 1
    what = f"{len(rows)} files hold the same bytes"
    if across[0]:
        what += ", in " + " and ".join(SPLITS[split] for split in there if split > 0)
    if across[1]:
        what += f", under {len(named[named >= 0])} labels"
    findings = []
    for row in rows.tolist():
        others = rows[rows != row]
        elsewhere = (splits[others] != splits[row]) * 2 + (labels[others] != labels[row])
        other = int(others[np.argmax(elsewhere)])
        findings.append(Finding("exact_copy", row, _SCORES[across], what, group=group, verified=True, other=other))
    return findings
