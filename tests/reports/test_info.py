"""``describe``: what it says of a cache and of a model is what went in."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from caches import make_rows
from conftest import SPEC

import featcache
from featcache.cache.write import write_cache
from featcache.errors import CacheError
from featcache.models.card import make_card
from featcache.models.model import load_model
from featcache.reports import info
from featcache.spec import SPLITS


def test_a_cache(tmp_path: Path) -> None:
    rng, n, path = np.random.default_rng(0), 200, tmp_path / "f.h5"
    rows = dataclasses.replace(
        make_rows(n),
        labels=rng.integers(-1, 2, n).astype(np.int32),
        splits=rng.choice([1, 3], n).astype(np.uint8),
        sizes=rng.permutation(n) + 1000,
    )
    refused = (("bad.jpg", "not an image"),)
    write_cache(path, rows, [np.ones((n, 4))], dim=4, spec=SPEC, classes=("a", "b", "empty"), refused=refused)
    facts = featcache.describe(str(path))
    assert facts["classes"] == {
        name: {SPLITS[split]: int(np.sum((rows.labels == label) & (rows.splits == split))) for split in (1, 3)}
        for label, name in enumerate(("a", "b", "empty"))
    }
    assert facts["unlabelled"] == np.sum(rows.labels < 0) > 0
    assert facts["image_bytes"] == [1000, 1049, 1099, 1149, 1199]
    assert facts["refused"] == [{"path": "bad.jpg", "reason": "not an image"}]
    assert (facts["kind"], facts["path"], facts["images"], facts["dim"]) == ("cache", str(path), n, 4)
    assert (facts["dtype"], facts["bytes"]) == ("float16", path.stat().st_size)
    json.dumps(facts)


def test_a_model(trained: Path) -> None:
    facts = featcache.describe(trained / "m")
    assert (facts["kind"], facts["classes"], facts["head"]["kind"]) == ("model", ["blue", "green", "red"], "logreg")
    assert facts["fingerprint"] == featcache.describe(trained / "f.h5")["fingerprint"]
    json.dumps(facts)


def test_what_is_neither(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no cache")
    for path, error in ((tmp_path, CacheError), (tmp_path / "text", CacheError), (tmp_path / "nowhere", CacheError)):
        with pytest.raises(error):
            featcache.describe(path)


@pytest.mark.parametrize(
    ("source", "licence"),
    [
        ("torchvision IMAGENET1K_V1", "bsd-3-clause"),
        ("fine-tuned from torchvision IMAGENET1K_V1", "bsd-3-clause"),
        ("file w.pth", None),
        ("random, seed 0", None),
    ],
)
def test_the_licence_is_that_of_the_weights_as_the_card_has_it(trained: Path, source: str, licence: str | None) -> None:
    model = load_model(trained / "m")
    model = dataclasses.replace(model, manifest=model.manifest | {"weights": {"source": source, "reload": None}})
    facts = info._describe_network(model)["backbone"]
    card = make_card("m", {"finetuned": False} | model.manifest, {}, None).decode()
    assert facts.get("licence") == licence and ("is not on record" in card) == (licence is None)
    of_weights = {"pretrained", "licence", "commercial", "gated", "knn", "linear_probe", "source"}
    assert of_weights & {*facts} == (of_weights if licence else set())
    assert facts["name"] == model.spec.backbone and facts["parameters"] > 0
