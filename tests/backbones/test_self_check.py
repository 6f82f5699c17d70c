"""The self-check's figures, against their definitions, and what it lets pass."""

import json

import numpy as np
import pytest

from featcache.backbones.self_check import (
    MAX_ERROR,
    Agreement,
    agreement,
    cosine,
    fits_float16,
    only_rounded,
    survives_rounding,
)

RNG = np.random.default_rng(0)


def test_cosine() -> None:
    a = np.array([[1.0, 0], [1, 1], [0, 0]])
    assert cosine(a, a) == (1.0, 1.0)
    assert cosine(a[:2], np.array([[0.0, 1], [1, 1]]))[1] == 0
    assert np.isnan(cosine(a, np.array([[1, 0], [1, np.inf], [0, 0]]))[0])


def test_figures_by_hand() -> None:
    """Rows (0, 0) and (2, 0): mean (1, 0), spread 1. Moved by (0, 0.1) each: error 0.1, centred cosine 1 / sqrt(1.01)."""
    found = agreement(np.array([[0.0, 0], [2, 0]]), np.array([[0.0, 0.1], [2, 0.1]]))
    assert found.error == pytest.approx(0.1)
    assert found.centred_mean_cosine == found.centred_min_cosine == pytest.approx(1.01**-0.5)
    assert not found.passes


@pytest.mark.parametrize("shared", [0.0, 1.0, 1000.0])
def test_what_all_rows_share_changes_nothing(shared: float) -> None:
    """The plain cosine goes to 1 with it; whether a head would see the difference does not depend on it."""
    differences, noise = RNG.normal(0, 1, (32, 64)), RNG.normal(0, 1, (32, 64))
    for share, passes in ((0.9 * MAX_ERROR, True), (1.2 * MAX_ERROR, False)):
        found = agreement(differences + shared, differences + shared + share * noise)
        assert found.passes == passes
        assert found.error == pytest.approx(share, rel=0.1)
    assert found.mean_cosine > 1 - 1e-3 / max(shared, 0.5)


def test_one_row_or_equal_rows_prove_nothing() -> None:
    row = RNG.normal(0, 1, (1, 8)).astype(np.float32)
    for rows in (row, np.repeat(row, 5, axis=0)):
        found = agreement(rows, rows)
        assert (found.min_cosine, found.passes) == (1.0, False)
        assert "no spread" in str(found)
        assert survives_rounding(rows)  # of storage that decides nothing: the values fit


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((1.0, 1.0, 1.0, 1.0, 0.001), ""),
        ((0.999, 0.998, 0.99, 0.98, 0.165), "these embeddings by 16.5 % (3.2 % is allowed)"),
        ((0.9999, 0.999, 0.9999, 0.99, 0.03), "one of these embeddings too much (cosine 0.9900, 0.995 is needed)"),
        ((0.9999, 0.999, 0.9994, 0.999, 0.03), "these embeddings too much (mean cosine 0.99940, 0.9995 is needed)"),
        ((1.0, 1.0, np.nan, np.nan, np.nan), ""),
        ((np.nan, np.nan, np.nan, np.nan, np.nan), ""),
    ],
)
def test_what_is_too_much_in_words(figures: tuple[float, ...], words: str) -> None:
    assert Agreement(*figures).shortfall == words


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_passes_and_fits_into_json(value: float) -> None:
    rows = RNG.normal(0, 1, (4, 8))
    broken = rows.copy()
    broken[2, 3] = value
    found = agreement(rows, broken)
    assert not found.passes
    assert not only_rounded(rows, broken)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["mean_cosine"] is None


def test_storage() -> None:
    rows = RNG.normal(0, 1, (8, 32)).astype(np.float32)
    assert survives_rounding(rows)
    assert not survives_rounding(rows * 1e6)  # overflow
    assert not survives_rounding(rows * 1e-9)  # underflow
    assert not survives_rounding(rows + 1000)  # float16 counts in halves there


def test_the_short_way_to_what_fits_float16_is_the_long_way() -> None:
    """Of any scale, dimension and sparsity, at every edge. Oracle: the cosine itself, in float64."""
    rng = np.random.default_rng(0)
    verdicts = []
    for dim in (1, 3, 64, 2048):
        rows = rng.standard_normal((400, dim)) * 10.0 ** rng.uniform(-9, 6, (400, 1))
        rows *= rng.random((400, dim)) < rng.uniform(0, 1, (400, 1))
        edges = [0, 65504, 65519, 65520, 65536, -65520, np.inf, -np.inf, np.nan, 6e-8, 2.9e-8, 1e-7, 1.4e-5, 3e-7]
        rows[: len(edges), 0] = edges
        features = rows.astype(np.float32)
        with np.errstate(all="ignore"):
            a, b = features.astype(np.float64), features.astype(np.float16).astype(np.float64)
            cosines = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
        expected = (cosines >= 0.995) | (a == 0).all(1)
        np.testing.assert_array_equal(fits_float16(features), expected)
        verdicts.append(expected.mean())
    assert all(0.2 < share < 0.95 for share in verdicts)
    assert fits_float16(np.empty((0, 0), np.float32)).shape == (0,)
