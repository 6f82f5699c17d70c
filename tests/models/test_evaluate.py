"""Scores are about the same images, whether these or their cache are given, and classes are matched by name."""

from pathlib import Path

import numpy as np
import pytest
from caches import CLASSES_DIM, make_classes
from conftest import SPEC

from featcache.cache.cache import FeatureCache
from featcache.cache.format import Rows
from featcache.cache.write import write_cache
from featcache.errors import SourceError
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    labels = np.arange(150) % 3
    make_classes(tmp_path / "f.h5", labels, 1 + np.arange(150) // 50 % 3)
    return tmp_path / "f.h5"


def test_evaluate_images_and_cache_agree(trained: Path) -> None:
    a, b = evaluate(trained / "m", trained / "photos"), evaluate(trained / "m", trained / "f.h5")
    assert a["n"] == b["n"] == 24
    assert a["confusion"] == b["confusion"]
    with pytest.raises(SourceError, match="no split 'test'"):
        evaluate(trained / "m", trained / "f.h5", split="test")


def test_evaluate_matches_classes_by_name(cache: Path, tmp_path: Path) -> None:
    fit_head(cache, tmp_path / "m")
    direct = evaluate(tmp_path / "m", cache, split="test")
    # the same rows, but their classes are b, c only and so have other numbers
    opened = FeatureCache.open(cache)
    keep = np.flatnonzero((opened.rows.splits == 3) & (opened.y > 0))
    rows = Rows(**{name: getattr(opened.rows, name)[keep] for name in vars(opened.rows)})
    rows = Rows(**(vars(rows) | {"labels": rows.labels - 1}))
    write_cache(tmp_path / "g.h5", rows, [opened.X[keep]], dim=CLASSES_DIM, spec=SPEC, classes=("b", "c"))
    fewer = evaluate(tmp_path / "m", tmp_path / "g.h5")
    assert (direct["split"], fewer["split"]) == ("test", "test")
    for name in "bc":
        assert fewer["per_class"][name]["recall"] == direct["per_class"][name]["recall"]
    write_cache(tmp_path / "h.h5", rows, [opened.X[keep]], dim=CLASSES_DIM, spec=SPEC, classes=("b", "zebra"))
    with pytest.raises(SourceError, match="zebra, which the model does not know"):
        evaluate(tmp_path / "m", tmp_path / "h.h5")
