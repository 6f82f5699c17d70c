"""Embeddings to train heads on, as in a cache: float16, sorted by class."""

import numpy as np

from featcache.heads.feature_batches import Budget

D = 12
SHORT = Budget(max_rounds=40, patience=5)  # enough for blobs


def blobs(n: int = 240, classes: int = 3, *, spread: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(n, D) overlapping Gaussian classes around the same centres for every seed, and their labels."""
    y = np.arange(n) * classes // n
    centres = np.random.default_rng(1).normal(0, 2, (classes, D))
    return (centres[y] + np.random.default_rng(seed).normal(0, spread, (n, D)) + 3).astype(np.float16), y
