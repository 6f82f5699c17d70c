"""Maps of embeddings against scikit-learn: principal components, trustworthiness; and what t-SNE keeps together."""

import sys

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness as reference

from featcache.errors import MissingDependencyError, UsageError
from featcache.reports.elements import projection
from featcache.reports.elements.projection import principal_components, project, trustworthiness


def blobs(count: int, dim: int, groups: int = 4) -> np.ndarray:
    random = np.random.default_rng(0)
    middles = random.normal(size=(groups, dim)) * 2
    return (middles[np.arange(count) % groups] + random.normal(size=(count, dim)) + 3).astype(np.float32)


def unit(X: np.ndarray) -> np.ndarray:
    return X / np.linalg.norm(X, axis=1, keepdims=True)


@pytest.mark.parametrize(("count", "dim", "kept"), [(300, 40, 2), (300, 40, 50), (20, 64, 50), (5000, 12, 3)])
def test_principal_components_are_those_of_scikit_learn(count: int, dim: int, kept: int) -> None:
    X = blobs(count, dim)
    X[4000:] += np.arange(dim)  # the second block in memory is unlike the first
    rows = np.arange(count)[3:]
    found, share = principal_components(X, rows, kept)
    known = PCA(min(kept, len(rows), dim), svd_solver="full").fit(unit(X[rows].astype(np.float64)))
    rank = min(known.n_components_, len(rows) - 1)  # beyond it there is no variance, and any direction will do
    np.testing.assert_allclose(share[:rank], known.explained_variance_ratio_[:rank], rtol=1e-3)
    expected = known.transform(unit(X[rows]))
    # A coordinate is as sure as its component is apart from the next one.
    np.testing.assert_allclose(found[:, :3][:, :kept], expected[:, :3], atol=2e-3 * expected[:, 0].std())


def test_the_sign_of_a_component_does_not_depend_on_the_machine() -> None:
    X = blobs(200, 10)
    found, _ = principal_components(X, np.arange(200), 2)
    axes = np.linalg.lstsq(found - found.mean(axis=0), unit(X) - unit(X).mean(axis=0), rcond=None)[0]
    assert (axes[np.arange(2), np.abs(axes).argmax(axis=1)] > 0).all()


def test_trustworthiness_is_that_of_scikit_learn() -> None:
    X = blobs(150, 20)
    points, _ = principal_components(X, np.arange(150), 2)
    for k in (1, 5, 15, 74):
        expected = reference(unit(X.astype(np.float64)), points, n_neighbors=k)
        assert trustworthiness(X, np.arange(150), points, k=k) == pytest.approx(expected, abs=1e-6)


def test_a_sample_of_rows_is_their_mean() -> None:
    X, points = blobs(60, 8), np.random.default_rng(2).normal(size=(60, 2))
    rows = np.arange(60)
    each = [trustworthiness(X, rows, points, k=5, sample=np.array([row])) for row in rows]
    assert np.mean(each) == pytest.approx(trustworthiness(X, rows, points, k=5))
    assert 0.35 < np.mean(each) < 0.65  # random points: chance


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("same", [False, True])
def test_a_few_rows_and_equal_ones_have_a_map(count: int, same: bool) -> None:
    X = np.ones((count, 6), np.float16) if same else blobs(count, 6).astype(np.float16)
    found = project(X, np.arange(count))
    assert found is not None
    assert found.method == "pca"
    assert found.points.shape == (count, 2)
    assert np.isfinite(found.points).all()
    assert (found.trustworthiness is None) == (count < 3)


def test_a_row_of_zeros_stays_on_the_map() -> None:
    X = np.vstack([np.zeros((1, 5)), blobs(9, 5)]).astype(np.float32)
    assert np.isfinite(project(X, np.arange(10), method="pca").points).all()  # type: ignore[union-attr]


def test_tsne_keeps_groups_together_and_is_the_same_again() -> None:
    pytest.importorskip("openTSNE")
    X = blobs(80, 30)
    found = [project(X, np.arange(80)) for _ in range(2)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].method == "tsne"
    np.testing.assert_array_equal(found[0].points, found[1].points)
    nearest = ((found[0].points[:, None] - found[0].points[None]) ** 2).sum(axis=2) + 1e9 * np.eye(80)
    assert (nearest.argmin(axis=1) % 4 == np.arange(80) % 4).all()
    assert found[0].trustworthiness > 0.8  # type: ignore[operator]


def test_what_is_used_and_why_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    X, rows = blobs(40, 6), np.arange(40)
    assert project(X, rows, method="none") is None
    with pytest.raises(UsageError, match=r"no map is called 'umap'; choose one of auto, pca, tsne, none"):
        project(X, rows, method="umap")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    found = project(X, rows)
    assert found is not None
    assert "pip install 'featcache[report]'" in found.words
    with pytest.raises(MissingDependencyError, match=r"pip install 'featcache\[report\]'"):
        project(X, rows, method="tsne")


def test_many_rows_are_laid_out_at_once() -> None:
    many = projection.TSNE_ROWS + 1
    found = project(blobs(many, 4), np.arange(many))
    assert found is not None
    assert (found.method, found.sampled) == ("pca", 10_000_000 // many)
    assert "more than 10,000 images" in found.words
