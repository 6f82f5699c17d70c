"""The benchmark of recipes: the same val and test for all runs, no digit mirrored, no run taken for another."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_photo

from featcache.finetuning.recipes import find_recipe
from featcache.images.source import ImageList
from featcache.models.model import load_model
from featcache.spec import SPLITS

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "recipes.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import recipes

    return recipes


def splits_of(images: ImageList) -> dict[str, list[str]]:
    """Paths of each split."""
    return {
        name: [images.paths[k] for k in np.flatnonzero(images.splits == SPLITS.index(name))]
        for name in ("train", "val", "test")
    }


def test_digits_are_split_once_and_subsets_drawn_from_the_pool(script: Any, tmp_path: Path) -> None:
    script.write_digits(tmp_path)
    images = script.list_images(tmp_path)
    assert len(images) == 1797
    first, again, other = (splits_of(script.subset(images, 20, seed)) for seed in (0, 0, 1))
    assert first == again
    assert (first["val"], first["test"]) == (other["val"], other["test"])
    assert {split: len(paths) for split, paths in first.items()} == {"train": 200, "val": 200, "test": 600}
    assert len(set(first["train"]) & set(other["train"])) < 100  # another draw
    assert not set(first["train"]) & {*first["val"], *first["test"]}


def test_photographs_held_out_by_their_folder_are_tested_on(script: Any, tmp_path: Path) -> None:
    for split, count in (("train", 9), ("val", 4)):
        for number, name in enumerate(("ants", "bees")):
            for seed in range(count):
                write_photo(tmp_path / split / name / f"{seed}.jpg", (200 * number, 80, 90), seed)
    (tmp_path / "train" / "ants" / "odd.gif").write_bytes(b"GIF89a")
    own, more = (splits_of(script.photographs(tmp_path, n_val=2, n_test=n).images) for n in (0, 6))
    assert {split: len(paths) for split, paths in own.items()} == {"train": 14, "val": 4, "test": 8}
    assert all(path.startswith("val/") for path in own["test"])
    assert {split: len(paths) for split, paths in more.items()} == {"train": 10, "val": 4, "test": 12}
    assert set(own["test"]) < set(more["test"])


def test_variants_change_what_they_say_and_digits_are_not_mirrored(script: Any) -> None:
    """``BASE`` is complete: it does not follow the default."""
    flips = {
        (name, variant): ["flip", 0.5] in script.Planned(name, 0, variant).changes["augmentation"]
        for name in ("digits:20", "ants-bees:20")
        for variant in ("base", "mirrored", "rate 1e-4 + mirrored", "rate 1e-4", "crop 0.08")
    }
    assert {key for key, mirrored in flips.items() if not mirrored} == {
        ("digits:20", variant) for variant in ("base", "rate 1e-4", "crop 0.08")
    }
    both = script.Planned("ants-bees:20", 0, "rate 3e-4 + no average").changes
    assert both == script.BASE | {"epochs": 15, "backbone_lr": 3e-4, "ema": 0.0}
    for variant in script.VARIANTS:
        find_recipe("default", script.Planned("ants-bees:20", 0, variant).changes)


def test_only_equal_settings_are_one_run(script: Any) -> None:
    names, seeds = ("digits:20", "digits:100", "ants-bees:20"), (0, 1)
    jobs = [script.Planned(name, seed, variant) for name in names for seed in seeds for variant in script.VARIANTS]
    by_key: dict[str, set[Any]] = {}
    for job in jobs:
        by_key.setdefault(job.key, set()).add((job.name, job.seed, job.variant))
    same = {frozenset(variant for _, _, variant in group) for group in by_key.values() if len(group) > 1}
    assert same == {frozenset(("base", "epochs 10")), frozenset(("base", "mirrored"))}  # 1,000 images; photographs


def test_finished_runs_are_read_and_shown(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gains are paired by seed, and McNemar's test counts images."""
    file, lines = tmp_path / "runs.jsonl", []
    both = "rate 1e-4 + no average"  # shown, too, though no pattern names it
    for variant, seed, right in (("base", 0, "1101"), ("base", 1, "1100"), ("rate 1e-4", 1, "1111"), (both, 0, "1111")):
        job = script.Planned("digits:20", seed, variant)
        row = {"key": job.key, "network": "net, weights w.pth", "name": job.name, "seed": seed, "variant": variant}
        row |= {
            "test_accuracy": right.count("1") / 4,
            "head_test_accuracy": 0.5,
            "right": {"head": "0101", "tuned": right},
        }
        row |= dict.fromkeys(
            ("val_accuracy", "head_val_accuracy", "p_value", "alpha", "epochs", "best_epoch", "cpu_seconds"), 1
        )
        lines.append(json.dumps(row))
    file.write_text("\n".join([*lines, lines[0][:40]]))  # killed while writing
    assert len(script.read_runs(file, "net, weights w.pth")) == 4
    with pytest.raises(SystemExit, match="holds runs of net, weights w.pth, not of other"):
        script.read_runs(file, "other")
    monkeypatch.setattr(
        sys, "argv", ["recipes.py", "a", "c", "-o", str(file), "--backbone", "net", "--weights", "w.pth", "--table"]
    )
    script.main()
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert rows["base"]["over_head"] == [0.25, 0.0]
    assert rows["rate 1e-4"]["over_base"] == [0.5]
    assert rows[both]["over_base"] == [0.25]
    assert rows["base"]["mcnemar"] == [[0, 1, 1.0], [1, 1, 1.0]]


@pytest.mark.slow
def test_a_run_scores_the_images_of_test(script: Any, tmp_path: Path) -> None:
    """Who is right, image by image, is what the report says; a second start finds features and head."""
    arguments = argparse.Namespace(backbone="mobilenet_v2", weights="none", multiple=14, precision="fp32")
    starts = script.Starts(arguments, tmp_path)
    changes = script.Planned("digits:3", 0, "base").changes | {"epochs": 1}
    row = script.run(starts, "digits:3", 0, changes)
    assert load_model(starts.head("digits:3", 0)).spec.preprocess.crop == (70, 70)  # of 64: whole patches of 14
    assert len(row["right"]["head"]) == 600
    for who, score in (("head", "head_test_accuracy"), ("tuned", "test_accuracy")):
        assert row["right"][who].count("1") / 600 == pytest.approx(row[score])
    assert script.Starts(arguments, tmp_path).head("digits:3", 0).exists()
