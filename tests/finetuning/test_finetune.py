"""finetune from end to end: starts as the cached head, never ends below it, survives interruptions, refuses nonsense."""

import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import COLOURS, TINY, TINY_FLAGS, make_photos, write_photo
from faults import Fault, Outcome, Program, with_variables
from safetensors.numpy import load_file

import featcache
from featcache import errors
from featcache.cache.cache import FeatureCache
from featcache.cache.write import write_cache
from featcache.extraction.extract import extract
from featcache.finetuning import finetune as finetuning
from featcache.finetuning.checkpoint import Checkpoint
from featcache.finetuning.finetune import finetune
from featcache.finetuning.logits import compute_logits
from featcache.finetuning.network import assemble
from featcache.finetuning.result import FinetuneReport, read_report
from featcache.finetuning.start import _as_told as as_told
from featcache.finetuning.trainer import Status, Trainer
from featcache.finetuning.tune import _make_trainer as make_trainer
from featcache.heads.metrics import accuracy
from featcache.images import read as reading
from featcache.models.evaluate import evaluate
from featcache.models.fit import fit_head
from featcache.models.model import load_model
from featcache.models.predict import predict
from featcache.system import distributed
from featcache.system.device import Runtime
from featcache.system.workdir import work_folder

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 6, "lr": 1e-4, "backbone_lr": 1e-5}
FLAGS = ["--lr", "1e-4", "--backbone-lr", "1e-5", "--precision", "fp32"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos (three splits), their cache f.h5, and a head m; left unchanged by the tests."""
    root = tmp_path_factory.mktemp("made")
    make_photos(root / "photos", each=5, splits=("train", "val", "test"))
    for split in ("train", "val", "test"):  # some that are hard to tell, so that accuracies are not all 1
        write_photo(root / "photos" / split / "red" / "odd.jpg", COLOURS["green"], 90)
    extract(root / "photos", root / "f.h5", TINY)
    fit_head(root / "f.h5", root / "m", C=1.0, folds=0)
    return root


class Tuner:
    """Fine-tunes ``made``'s photos into the folder ``ft``, quickly, in float32, whatever the CPU would take."""

    def __init__(self, made: Path, ft: Path, log: Any = None) -> None:
        self.made, self.ft, self.log = made, ft, log

    def __call__(self, **options: Any) -> FinetuneReport:
        """Start from the head m, unless an option says otherwise."""
        usual = {"source": self.made / "photos", "output": self.ft, "changes": QUICK, "precision": "fp32"}
        if "request" not in options:
            usual["init"] = self.made / "m"
        return finetune(**usual | options)

    def interrupt(self, *, step: int, number: int = signal.SIGTERM, **options: Any) -> errors.Interrupted:
        """Stop a run by a signal after so many of its steps."""
        steps = itertools.count(1)

        def progress(status: Status) -> None:
            if next(steps) == step:
                os.kill(os.getpid(), number)

        with pytest.raises(errors.Interrupted, match=r"ft\.parts") as stopped:
            self(progress=progress, **options)
        return stopped.value


@pytest.fixture
def tune(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Tuner:
    caplog.set_level("INFO")
    return Tuner(made, tmp_path / "ft", caplog)


@pytest.fixture
def photos(made: Path, tmp_path: Path) -> Path:
    """A copy of made's, to be changed."""
    return shutil.copytree(made / "photos", tmp_path / "photos")


def tensors(model: Path) -> dict[str, np.ndarray]:
    return {**load_file(model / "backbone.safetensors"), **load_file(model / "head.safetensors")}


@pytest.fixture(scope="module")
def whole(made: Path) -> Path:
    """The model of a quick run that nothing disturbs."""
    Tuner(made, made / "whole")()
    return made / "whole"


def assert_same_model(one: Path, two: Path) -> None:
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name], err_msg=name)
    assert history(one) == history(two)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[Status], None]]:
    """``progress`` of a run whose weights go bad in epoch 2, after so many of its images, perhaps when a signal comes."""
    begun: list[Trainer] = []
    run_epoch = Trainer.run_epoch
    monkeypatch.setattr(Trainer, "run_epoch", lambda self, **how: begun.append(self) or run_epoch(self, **how))

    def breaking(done: int, *, signalled: bool = False) -> Callable[[Status], None]:
        def progress(status: Status) -> None:
            if (status.epoch, status.done) == (2, done):
                trains = (each for each in begun[-1].network.parameters() if each.requires_grad)
                next(trains).data.fill_(float("nan"))
                if signalled:
                    os.kill(os.getpid(), signal.SIGTERM)

        return progress

    return breaking


def history(model: Path) -> list[dict[str, str]]:
    """What of it decides something."""
    with (model / "history.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name not in ("seconds", "images_per_second")}
            for row in csv.DictReader(file)
        ]


def test_the_result_is_a_model_like_any_other(tune: Tuner, made: Path, tmp_path: Path, bf16_arithmetic: bool) -> None:
    report = tune()
    assert "parity: the assembled network gives the cached head's logits on 16 images" in tune.log.text
    assert "loss before step 1, in training mode and fp32: " in tune.log.text
    assert "LP-FT" in tune.log.text
    model = load_model(tune.ft)
    assert model.classes == load_model(made / "m").classes
    assert (report.epochs, report.recipe) == (2, "default")
    assert report.parameters == report.trainable_parameters > 700_000
    frozen = evaluate(made / "m", made / "f.h5", split="val")["accuracy"]
    assert report.val_accuracy >= report.head_val_accuracy == frozen
    scores = {split: evaluate(model, made / "photos", split=split) for split in ("val", "test")}
    assert report.val_accuracy == scores["val"]["accuracy"]
    assert report.test_accuracy == scores["test"]["accuracy"]
    metrics = json.loads((tune.ft / "metrics.json").read_text())
    rounding = 0.05 if bf16_arithmetic else 0.01  # predict may take bf16
    assert metrics["test"]["log_loss"] == pytest.approx(scores["test"]["log_loss"], rel=rounding)
    assert metrics["comparison"]["test"]["p_value"] == report.p_value
    assert read_report(tune.ft) == report
    assert metrics["temperature"] == report.temperature != 1
    for name in ("val_accuracy", "head_val_accuracy", "test_accuracy", "head_test_accuracy"):
        assert metrics[name] == metrics["report"][name]
    assert [(row["epoch"], row["step"]) for row in metrics["history"]] == [(1, 3), (2, 6)]
    first, second = metrics["history"]
    assert 0 < first["seconds"] < second["seconds"] < report.seconds and first["images_per_second"] > 0
    assert report.best_step == 3 * report.best_epoch and report.budget is None
    assert len((tune.ft / "history.csv").read_text().splitlines()) == 3
    assert not list(tmp_path.rglob("*.png"))  # pictures are drawn by the command, beside the model
    assert not work_folder(tune.ft).exists()
    found = list(predict(model, [made / "photos" / "val" / "blue"], coverage=0.9))  # by the logits on val
    assert [row.reason for row in found] == [""] * 5 and all(row.set is not None for row in found)
    held_out = model.training_rows().unseen()  # type: ignore[union-attr]
    assert held_out is not None and accuracy(held_out.labels, held_out.logits) == report.val_accuracy
    answers = model.training_rows().compared  # type: ignore[union-attr]
    head, tuned = answers.head == answers.labels, answers.tuned == answers.labels  # of val, then of test
    for split, rows in (("val", slice(None, held_out.labels.size)), ("test", slice(held_out.labels.size, None))):
        facts = metrics["comparison"][split]
        assert (head[rows].mean(), tuned[rows].mean()) == (facts["head_accuracy"], facts["tuned_accuracy"])
        assert [int((tuned & ~head)[rows].sum()), int((head & ~tuned)[rows].sum())] == [
            facts["only_second_right"], facts["only_first_right"]
        ]  # fmt: skip


def test_old_caches_belong_to_other_weights_and_new_ones_can_be_made(tune: Tuner, made: Path, tmp_path: Path) -> None:
    tune(recipe="flowers")
    with pytest.raises(errors.FeatcacheError, match="weights_sha256"):
        list(predict(tune.ft, [made / "f.h5"]))
    report = extract(made / "photos", tmp_path / "new.h5", featcache.ExtractRequest(backbone=str(tune.ft)))
    assert report.embedded == 48
    from_cache = list(predict(tune.ft, [tmp_path / "new.h5"]))
    from_images = list(predict(tune.ft, [made / "photos"], evidence=tmp_path / "new.h5"))
    for one, other in zip(from_cache, from_images, strict=True):
        assert other.nearest is not None and other.nearest[0].path.startswith("train/")
        np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-5)


def test_without_init_it_extracts_and_fits_first_and_reuses_what_lies_beside(
    tune: Tuner, made: Path, tmp_path: Path
) -> None:
    for file in made.glob("f.h5*"):
        shutil.copy(file, tmp_path / file.name.replace(".h5", ".hdf5", 1))
    tune(request=TINY)
    assert "embedded 0, reused 48" in tune.log.text
    assert "on 16 images" in tune.log.text  # parity, on cached rows
    assert len(FeatureCache.open(tmp_path / "ft.features.h5")) == 48


def test_a_network_of_batch_norms_learns_at_their_rate(tune: Tuner) -> None:
    request = featcache.ExtractRequest(backbone="shufflenet_v2_x0_5", weights="none", resize=32, crop=32)
    tune(request=request, changes={"epochs": 1, "unfreeze": "head"})  # with random weights the rest would diverge
    assert load_model(tune.ft).manifest["training"]["settings"]["backbone_lr"] == 3e-4


def test_without_batch_norms_a_recipe_that_trains_them_takes_one_image_a_step(tune: Tuner) -> None:
    tune(recipe="ants-bees", changes={"epochs": 1, "batch_size": 1})
    assert "batchnorm = train changes nothing: this backbone has no batch norms" in tune.log.text
    assert "batch-norm statistics" not in tune.log.text


def test_batch_norms_do_not_train_in_several_processes(tune: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are any, and they would."""

    @contextlib.contextmanager
    def two(runtime: Runtime) -> Iterator[tuple[Any, Runtime]]:
        yield SimpleNamespace(world=2, is_first=True, barrier=lambda: None), runtime

    monkeypatch.setattr(distributed, "init", two)
    monkeypatch.setattr("featcache.finetuning.tune.decode_split", Mock(side_effect=KeyboardInterrupt))
    norms: dict[str, Any] = {
        "request": featcache.ExtractRequest(backbone="shufflenet_v2_x0_5", weights="none", resize=32, crop=32)
    }
    with pytest.raises(
        errors.UsageError, match="recipe ants-bees trains batch norms.* use one process, or --set batchnorm=frozen"
    ):
        tune(recipe="ants-bees", changes={}, **norms)
    for options in (norms | {"changes": {"unfreeze": "head"}}, norms | {"changes": {"batchnorm": "frozen"}}, {}):
        with pytest.raises(KeyboardInterrupt):  # it went on
            tune(**{"recipe": "ants-bees", "changes": {}, "force": True} | options)


def test_when_nothing_better_is_found_the_cached_head_itself_is_saved(tune: Tuner, made: Path) -> None:
    report = tune(changes=QUICK | {"lr": 1e-30, "backbone_lr": 0.0})  # no weight moves
    assert (report.alpha, report.temperature) == (0, 1)
    start, tuned = load_model(made / "m"), load_model(tune.ft)
    for name, values in tuned.head.to_tensors().items():
        np.testing.assert_array_equal(values, start.head.to_tensors()[name])
    assert tuned.fingerprint == start.fingerprint
    assert "is that head, unchanged" in report.verdict
    assert report.val_accuracy == report.head_val_accuracy


def test_a_wrong_start_is_found_by_the_parity_check(tune: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*start: Any) -> Any:
        assembled = assemble(*start)
        assembled.mean.zero_()  # another normalisation than the cache's
        return assembled

    monkeypatch.setattr("featcache.finetuning.tune.assemble", forgetful)
    with pytest.raises(errors.ModelError, match="does not compute what the cached head computes"):
        tune()
    assert not tune.ft.exists()


def test_training_waits_for_no_more_images_of_val_than_prove_the_start(
    tune: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of val is scored by the head after the first epoch: the same report, later."""
    waited, scored = list[int](), list[int]()
    monkeypatch.setattr("featcache.finetuning.tune._COMPARED", 4)
    with monkeypatch.context() as patch:
        patch.setattr(
            "featcache.finetuning.tune._make_trainer",
            lambda start, *given, **named: start.scored and make_trainer(start, *given, **named),
        )
        expected = dataclasses.replace(tune(), seconds=0, images_per_second=0)
    monkeypatch.setattr(
        "featcache.finetuning.tune.compute_logits",
        lambda network, pictures, job: scored.append(len(pictures)) or compute_logits(network, pictures, job=job),
    )
    found = tune(overwrite=True, progress=lambda _: waited.append(sum(scored)))
    assert set(waited[:3]) == {4}
    assert "gives the cached head's logits on 4 images" in tune.log.text
    assert dataclasses.replace(found, seconds=0, images_per_second=0) == expected


@pytest.mark.parametrize(("weights", "asked", "found"), [(1, None, 8), (10**9, None, 4), (1, 3, 3)])
def test_where_weights_are_many_a_part_has_twice_as_many_images(
    tune: Tuner, monkeypatch: pytest.MonkeyPatch, weights: int, asked: int | None, found: int
) -> None:
    made = list[int]()
    monkeypatch.setattr("featcache.finetuning.micro_batches._MANY_WEIGHTS", weights)
    monkeypatch.setattr(
        "featcache.finetuning.tune.Trainer",
        lambda *given, **named: made.append((trainer := Trainer(*given, **named)).micro_batch) or trainer,
    )
    tune(micro_batch=asked)
    assert set(made) == {found}


def test_training_from_another_loss_than_the_heads_is_refused(tune: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when dropout, or whatever else the cached head never saw, is on in training."""
    monkeypatch.setattr("featcache.finetuning.trainer.training_mode", lambda network, _: network.train())
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, _, training, __: x * 5 if training else x)
    with pytest.raises(
        errors.ModelError, match=r"not start from the cached head: .* fp32 the loss of 16 images before"
    ):
        tune()
    assert not tune.ft.exists()
    monkeypatch.undo()
    tune.log.clear()
    tune(changes=QUICK | {"epochs": 1, "backbone_dropout": True, "eval_every": 3})
    assert "eval_every 3 changes nothing: the run has 3 steps, and val is scored after each epoch" in tune.log.text
    assert "dropout and drop path of the backbone on, as in its pre-training" in tune.log.text
    assert "loss before step 1, in training mode and fp32, with nothing dropped yet: " in tune.log.text


def test_a_network_that_is_more_than_its_weights_is_not_saved(tune: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores on val would be of another network than the one that is loaded later."""
    right = compute_logits
    monkeypatch.setattr(
        "featcache.finetuning.loop.compute_logits", lambda *a, **named: right(*a, **named)[:, ::-1].copy()
    )
    with pytest.raises(errors.ModelError, match=r"on 16 images of val they differ by \d+.*; .* keeps something"):
        tune(changes=QUICK | {"epochs": 1, "interpolate": False})
    assert not tune.ft.exists()


def test_a_precision_that_starts_elsewhere_is_not_taken_by_itself(tune: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Trainer.logits_in_training
    monkeypatch.setattr("featcache.finetuning.trainer.has_bf16_arithmetic", lambda: True)
    factor = {"fp32": 1, "bf16": -9}  # of the logits: as far off as can be
    monkeypatch.setattr(Trainer, "logits_in_training", lambda self, *a: compute(self, *a) * factor[self.job.precision])
    with pytest.raises(errors.ModelError, match="train with --precision fp32"):
        tune(precision="bf16")
    tune(precision="auto")
    assert "precision fp32 after all: in training mode and bf16 the loss of 16 images before step 1 is" in tune.log.text
    assert load_model(tune.ft).manifest["training"]["precision"] == "fp32"


@pytest.mark.parametrize(("off_by", "right"), [(0.15, True), (2.0, False)])
def test_rows_of_any_precision_that_passes_belong_to_the_network(
    tune: Tuner, made: Path, tmp_path: Path, off_by: float, right: bool
) -> None:
    """Rows taken over may be in half precision whatever computed the last ones; what is further off is another network's."""
    cache = FeatureCache.open(made / "f.h5")
    X = cache.take(np.arange(len(cache))).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 1, X.shape) * X.std(axis=0)
    facts = {"spec": cache.spec, "classes": cache.classes, "provenance": cache.provenance}
    assert cache.provenance.precision == "fp32"
    write_cache(tmp_path / "f.h5", cache.rows, [(X + off_by * noise).astype(np.float16)], dim=X.shape[1], **facts)
    for copy in made.glob("f.h5.*"):
        shutil.copy(copy, tmp_path / copy.name)
    if right:
        tune(request=TINY, changes=QUICK | {"epochs": 1})
        assert "embedded 0, reused 48" in tune.log.text
        assert "from 16 cached rows the cached head's logits differ by" in tune.log.text
    else:
        with pytest.raises(errors.ModelError, match="expected at most 10.00%"):
            tune(request=TINY)


def test_test_images_change_nothing_but_their_score(tune: Tuner, photos: Path, whole: Path, tmp_path: Path) -> None:
    (photos / "test" / "red").rename(tmp_path / "aside")
    (photos / "test" / "blue").rename(photos / "test" / "red")
    report = tune(source=photos)
    assert_same_model(whole, tune.ft)
    assert report.test_accuracy is not None
    assert report.test_accuracy < 0.6


def test_images_are_decoded_once(tune: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    read = reading.read_file
    monkeypatch.setattr(reading, "read_file", lambda path: opened.append(path) or read(path))
    tune(changes=QUICK | {"epochs": 3})
    assert len(opened) == len(set(opened)) == 48


@pytest.mark.parametrize(("share", "in_file"), [(0.399, False), (0.401, True)])
def test_a_file_takes_over_where_memory_ends(
    tune: Tuner, whole: Path, monkeypatch: pytest.MonkeyPatch, share: float, in_file: bool
) -> None:
    size = 16 * 9 * 32 * 32  # of the training images, as estimated
    monkeypatch.setattr("featcache.finetuning.pixels.available_memory", lambda: size / share)
    tune()
    assert ("decoded train images go to" in tune.log.text) == in_file
    assert_same_model(whole, tune.ft)


# ------------------------------------------------------------------------------------------- validation, classes


def test_without_val_a_tenth_is_held_out_from_the_head_too(tune: Tuner, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", each=12)
    extract(photos, tmp_path / "f.h5", TINY)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0, folds=0)
    report = tune(source=photos, init=tmp_path / "m")
    assert "its head is fit again without them" in tune.log.text
    training = load_model(tune.ft).manifest["training"]
    assert (training["n_train"], training["n_val"]) == (33, 3)
    cache = FeatureCache.open(tmp_path / "ft.features.h5")
    assert [len(cache.where(split)) for split in ("train", "val")] == [33, 3]
    assert report.test_accuracy is None


@pytest.mark.parametrize(
    ("told", "again"),
    [
        ({"C": 0.5, "folds": 0}, {"C": 0.5, "folds": 0}),
        (
            {"class_weight": "balanced", "folds": 3},
            {"class_weight": "balanced", "folds": 3},
        ),  # C was chosen, by all images
        ({"clf": "linear", "lr": 0.01, "epochs": 3}, {"clf": "linear", "lr": 0.01, "epochs": 3}),
        (
            {"clf": "mlp", "hidden": (7, 5), "dropout": 0.1, "epochs": 3, "lr": 0.01, "batch_size": 8, "folds": 0},
            {"clf": "mlp", "hidden": (7, 5), "dropout": 0.1, "epochs": 3, "lr": 0.01, "batch_size": 8, "folds": 0},
        ),
    ],
)
def test_the_head_that_is_fit_again_is_the_one_that_was_asked_for(
    tune: Tuner, tmp_path: Path, told: dict[str, Any], again: dict[str, Any]
) -> None:
    """By ``fit_head`` on the images that are left."""
    photos = make_photos(tmp_path / "photos", each=12)
    extract(photos, tmp_path / "f.h5", TINY)
    fit_head(tmp_path / "f.h5", tmp_path / "m", **told)
    assert tune(source=photos, init=tmp_path / "m", budget=1e-6).verdict.startswith("nothing was trained")
    fit_head(tmp_path / "ft.features.h5", tmp_path / "expected", **again)
    found, expected = (load_model(tmp_path / name).head.to_tensors() for name in ("ft", "expected"))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"C": 10.0, "folds": 5}, {"folds": 5}),  # chosen, perhaps
        ({"C": 10.0, "folds": 0}, {"folds": 0, "C": 10.0}),
        ({"C": 10.0, "folds": 5, "asked": {"C": 10.0}}, {"folds": 5, "C": 10.0}),
        ({"C": 10.0, "folds": 5, "asked": {}, "class_weight": "balanced"}, {"folds": 5, "class_weight": "balanced"}),
    ],
)
def test_only_a_setting_that_was_asked_for_is_taken_over(
    made: Path, training: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Models of earlier versions do not tell; without folds there is nothing to choose it by."""
    model = load_model(made / "m")
    model = dataclasses.replace(model, manifest=model.manifest | {"training": training})
    assert as_told(model) == {"clf": "logreg", "class_weight": "none"} | expected


def test_what_the_head_that_is_fit_again_does_without_is_said(tune: Tuner, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", each=6)
    names = [f"patient {number // 2}" for number in range(18)]
    extract(photos, tmp_path / "f.h5", TINY)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0, folds=0, groups=names)
    tune(source=photos, init=tmp_path / "m", budget=1e-6)
    assert "m was fit with groups (as given), which the tenth that is held out" in tune.log.text
    assert "will not know" not in tune.log.text
    shutil.rmtree(photos / "green")
    tune(source=photos, init=tmp_path / "m", budget=1e-6, output=tmp_path / "two")
    assert "no image of green is here: the head that is fit again, and the new model, will not know it" in tune.log.text
    assert load_model(tmp_path / "two").classes == ("blue", "red")


@pytest.mark.parametrize("own", [True, False], ids=["a column of the source", "another table"])
def test_groups_stay_on_one_side_and_in_one_fold(tune: Tuner, tmp_path: Path, own: bool) -> None:
    photos = make_photos(tmp_path / "photos", each=12)
    paths = sorted(path.relative_to(photos) for path in photos.rglob("*.jpg"))
    patient = {path.as_posix(): f"patient {number // 2}" for number, path in enumerate(paths)}
    rows = [f"{path},{Path(path).parent.name},{name}" for path, name in patient.items()]
    (photos / "list.csv").write_text("\n".join(["path,label,patient", *rows]))
    source, table = (photos / "list.csv", None) if own else (photos, photos / "list.csv")
    if not own:  # a table in the folder would tell its labels
        table = (photos / "list.csv").rename(tmp_path / "groups.csv")
    fits: list[dict[str, Any]] = []

    def fit(cache: Path, *args: Any, **options: Any) -> Any:
        fits.append(options | {"cache": FeatureCache.open(cache)})
        return fit_head(cache, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.finetuning.start.fit_head", fit)
        report = tune(source=source, request=TINY, groups=table, group_column="patient")
    cache = fits[0]["cache"]
    sides: dict[str, set[int]] = {}
    for path, split in zip(cache.paths, cache.rows.splits.tolist(), strict=True):
        sides.setdefault(patient[path], set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert {*cache.rows.splits.tolist()} == {1, 2}
    training = [row for row, split in enumerate(cache.rows.splits.tolist()) if split == 1]
    assert [fits[0]["groups"][row] for row in training] == [patient[cache.paths[row]] for row in training]
    expected = {
        "column": "patient",
        "training": len({patient[cache.paths[row]] for row in training}),
        "across_splits": 0,
    }
    assert report.groups == read_report(tune.ft).groups == expected
    assert load_model(tune.ft).manifest["training"]["group_column"] == "patient"
    assert "groups undivided, becomes one" in tune.log.text


def test_a_model_fit_with_groups_keeps_them(tune: Tuner, tmp_path: Path) -> None:
    """Its head is fit again, as val is held out from what it has seen; the groups have to be told again."""
    photos = make_photos(tmp_path / "photos", each=6)
    names = [f"patient {number // 2}" for number in range(18)]
    extract(photos, tmp_path / "f.h5", TINY)
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0, folds=0, groups=names)
    report = tune(source=photos, init=tmp_path / "m", groups=names, budget=1e-6)
    assert report.groups is not None
    assert report.groups["across_splits"] == 0
    assert "do not keep together" not in tune.log.text


def test_groups_of_val_that_train_are_named_once(tune: Tuner, made: Path) -> None:
    table = made / "groups.csv"
    names = {path.relative_to(made / "photos").as_posix(): path.stem for path in (made / "photos").rglob("*.jpg")}
    table.write_text("\n".join(["path,camera", *(f"{path},{name}" for path, name in names.items())]))
    report = tune(request=TINY, groups=table, group_column="camera", changes=QUICK | {"epochs": 1})
    trained = {name for path, name in names.items() if path.startswith("train/")}
    later = sum(name in trained for path, name in names.items() if not path.startswith("train/"))
    assert report.groups == {"column": "camera", "training": len(trained), "across_splits": later}
    assert tune.log.text.count(f"{later} images of val or test are of groups that train") == 1


@pytest.mark.parametrize(
    ("shared", "words"),
    [(True, "; 4 images of val and test are of them"), (False, ", no image of val or test is of them")],
)
def test_the_command_says_how_many_groups_train(
    tune: Tuner, tmp_path: Path, run: Callable[..., tuple[int, str, str]], shared: bool, words: str
) -> None:
    photos = make_photos(tmp_path / "photos", each=2, splits=("train", "val"))
    names = [path.relative_to(photos) for path in sorted(photos.rglob("*.jpg"))]
    rows = [
        f"{path.as_posix()},{'' if path.parts[1] == 'red' else path.parts[1] if shared else path.parent}"
        for path in names
    ]
    (tmp_path / "groups.csv").write_text("\n".join(["path,place", *rows]))
    of = ("--groups", tmp_path / "groups.csv", "--group-column", "place")
    code, out, err = run("finetune", photos, "-o", tune.ft, *TINY_FLAGS, "--epochs", 1, *of, "--no-report")
    assert code == 0, err
    assert f"\n  2 groups (place) train{words}\n" in out


def test_groups_that_leave_nothing_to_hold_out_are_said(tune: Tuner, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", each=3)
    with pytest.raises(errors.SourceError, match="too few groups to hold some out"):
        tune(source=photos, groups=["one"] * 9)
    with pytest.raises(errors.UsageError, match="groups are 2 names, expected one for each of the 9 images"):
        tune(source=photos, groups=["a", "b"])
    with pytest.raises(errors.UsageError, match=r"photos is a folder; name the table .*finetune: --groups FILE"):
        tune(source=photos, group_column="patient")


def test_copies_alone_are_nothing_to_cross_validate_with(tune: Tuner, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", each=4, splits=("train", "val"))
    files = sorted((photos / "train" / "red").iterdir())
    for file in files[1:]:
        file.write_bytes(files[0].read_bytes())
    assert tune(source=photos, request=TINY, changes=QUICK | {"epochs": 1}).epochs == 1


def test_scores_are_also_given_without_images_that_training_has_seen(
    tune: Tuner, made: Path, photos: Path, tmp_path: Path
) -> None:
    first, *_ = sorted(path for path in (photos / "train").rglob("*.jpg"))
    label = first.parent.name
    shutil.copy(first, photos / "val" / label / "leak.jpg")
    report = tune(source=photos)
    n = len(list((photos / "val").rglob("*.jpg")))
    assert f"training has seen 2 of the {n} val images, the first val/{label}/leak.jpg" in tune.log.text
    rows = load_model(tune.ft).training_rows()
    assert rows is not None
    assert len(rows.digests) == len(list((photos / "train").rglob("*.jpg")))
    scores = evaluate(tune.ft, photos, split="val")
    assert scores["copies"]["across_splits"] == 2  # and one that all splits have
    assert scores["accuracy"] == pytest.approx(report.val_accuracy)
    assert scores["accuracy_without_copies"] == pytest.approx(report.val_accuracy_without_copies)
    assert "of which training has seen 2: fine-tuned" in report.comparison[0]
    # What the start has seen counts as well: its training images are val here.
    for split, other in (("train", "x"), ("val", "train"), ("x", "val")):
        (photos / split).rename(photos / other)
    again = finetune(photos, tmp_path / "again", init=made / "m", changes=QUICK, precision="fp32")
    assert again.val_accuracy_without_copies is None


def test_unreadable_unknown_and_missing_images_are_named(tune: Tuner, photos: Path) -> None:
    shutil.rmtree(photos / "val" / "green")
    (photos / "train" / "blue" / "00.jpg").write_bytes(b"gone bad since extraction")
    write_photo(photos / "val" / "violet" / "00.jpg", (200, 0, 200), 1)
    tune(source=photos)
    assert "train/blue/00.jpg is left out: not an image" in tune.log.text
    assert "1 val images are of classes that the model does not know" in tune.log.text
    assert "no val image of green" in tune.log.text
    training = load_model(tune.ft).manifest["training"]
    assert (training["n_train"], training["n_val"]) == (15, 11)


def test_nonsense_is_refused_before_work_starts(tune: Tuner, made: Path, tmp_path: Path) -> None:
    photos = made / "photos"
    one_class = tmp_path / "one"
    shutil.copytree(photos / "train" / "red", one_class / "train" / "red")
    other = make_photos(tmp_path / "other", each=3, splits=("train", "val"))
    (other / "train" / "red").rename(other / "train" / "purple")
    flat = tmp_path / "flat"
    shutil.copytree(photos / "train" / "red", flat)
    cases: list[tuple[type[errors.FeatcacheError], str, dict[str, Any]]] = [
        (errors.SourceError, "of one class", {"source": one_class}),
        (errors.SourceError, "no labels", {"source": flat}),
        (errors.SourceError, "purple, which the model", {"source": other}),
        (errors.SourceError, "does not exist", {"source": tmp_path / "no"}),
        (errors.UsageError, "--init brings its own backbone", {"init": made / "m", "request": TINY}),
        (errors.UsageError, "no recipe is called 'best'; choose default .*; ants-bees ", {"recipe": "best"}),
        (errors.UsageError, "no recipe is called 'flower'; choose flowers", {"recipe": "flower"}),
        (errors.UsageError, "lr must be", {"changes": {"lr": -1.0}}),
        (errors.UsageError, "choose one", {"resume": True, "force": True}),
        (errors.UsageError, "needs a CUDA GPU", {"precision": "fp16"}),
        (errors.UsageError, "unknown precision", {"precision": "int8"}),
        (errors.UsageError, "seed", {"seed": -1}),
        (errors.StorageError, "it is what is read; choose another -o", {"output": photos}),
        (errors.ModelError, "expected the folder of a model", {"init": photos}),
        (errors.FeatcacheError, "does not exist", {"output": tmp_path / "no" / "ft"}),
    ]
    for kind, message, options in cases:
        with pytest.raises(kind, match=message):
            tune(**options)
        assert not tune.ft.exists()
        assert not work_folder(tune.ft).exists()


def test_a_model_is_replaced_only_when_told_and_never_the_one_started_from(
    tune: Tuner, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "m", tmp_path / "m")
    (tmp_path / "link").symlink_to("m")
    shutil.copytree(made / "m", tune.ft)
    before = tensors_of_head(tune.ft)
    with pytest.raises(errors.ModelError, match="ft holds a model; choose another -o, or replace it with --overwrite"):
        tune()
    assert tensors_of_head(tune.ft) == before
    quick: dict[str, Any] = {"changes": QUICK | {"epochs": 1}, "recipe": "flowers"}
    tune(overwrite=True, **quick)
    with pytest.raises(errors.ModelError, match=r"fine-tuned model, which took long to make; .* --overwrite"):
        tune(**quick)
    tune(overwrite=True, seed=1, **quick)
    assert load_model(tune.ft).manifest["training"]["seed"] == 1
    (tune.ft / "thesis.txt").write_text("three years")
    with pytest.raises(errors.ModelError, match=r"also holds thesis.txt"):
        tune(overwrite=True)
    for init, output in (("m", "m"), ("link", "m"), ("m", "link"), ("m", f"../{tmp_path.name}/m")):
        with pytest.raises(errors.UsageError, match="is the model that the run starts from, which is never replaced"):
            tune(init=tmp_path / init, output=tmp_path / output, overwrite=True, force=True)
    with pytest.raises(errors.UsageError, match="is the model that the run starts from"):
        tune(request=featcache.ExtractRequest(backbone=str(tmp_path / "link")), output=tmp_path / "m", overwrite=True)
    assert tensors_of_head(tmp_path / "m") == tensors_of_head(made / "m")


def tensors_of_head(model: Path) -> bytes:
    return (model / "head.safetensors").read_bytes()


def test_the_folder_one_is_in_can_become_the_model(tune: Tuner, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tune.ft).mkdir()
    monkeypatch.chdir(tune.ft)
    tune.interrupt(output=".", step=2)
    assert tune(output=".", resume=True).model == tune.ft
    assert load_model(tune.ft).manifest["training"]["epochs"] == 2
    (tune.ft / "sub").mkdir()
    monkeypatch.chdir(tune.ft / "sub")
    with pytest.raises(errors.ModelError, match="ft also holds sub"):
        tune(output="..")
    for resume in (False, True):
        with pytest.raises(errors.StorageError, match="cannot write /: it is the root of a file system"):
            tune(output="/", resume=resume)
    with pytest.raises(errors.StorageError, match="cannot write /: it is the root of a file system"):
        fit_head(made / "f.h5", "/", C=1.0, folds=0)


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_work_and_resume_ends_in_the_same_bits(tune: Tuner, whole: Path, number: int) -> None:
    before = signal.getsignal(number)
    stopped = tune.interrupt(step=2, number=number)
    assert "--resume" in str(stopped)
    assert stopped.exit_code == 128 + number
    with pytest.raises(errors.UsageError, match="holds an interrupted run; add --resume"):
        tune()
    tune.interrupt(step=2, number=number, resume=True)  # in the second epoch now
    tune(resume=True)
    assert_same_model(whole, tune.ft)
    assert signal.getsignal(number) == before


def test_there_must_be_something_to_resume(tune: Tuner, tmp_path: Path) -> None:
    with pytest.raises(
        errors.UsageError, match=r"nothing to resume: .*ft.parts, .* does not exist; leave --resume out"
    ):
        tune(resume=True)
    assert not list(tmp_path.iterdir())
    tune(changes=QUICK | {"epochs": 1})
    with pytest.raises(errors.UsageError, match=r"nothing to resume: .* does not exist; .*ft is finished; "):
        tune(resume=True)
    work_folder(tmp_path / "killed").mkdir()  # before the first checkpoint, and by nothing that could be caught
    (work_folder(tmp_path / "killed") / "run.json").write_text("{}")
    assert tune(output=tmp_path / "killed", resume=True, changes=QUICK | {"epochs": 1}).epochs == 1


def test_a_run_of_another_version_is_not_continued(tune: Tuner) -> None:
    tune.interrupt(step=4)
    checkpoint = work_folder(tune.ft) / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"version": 1}, checkpoint)
    with pytest.raises(
        errors.ModelError, match="by another version of featcache, which trains otherwise; finish that run"
    ):
        tune(resume=True)
    assert checkpoint.exists()
    assert tune(force=True).epochs == 2


def test_resuming_with_other_settings_names_the_difference(tune: Tuner, photos: Path) -> None:
    tune.interrupt(step=4)
    with pytest.raises(errors.UsageError, match=r"recipe.lr: 0.0001 -> 0.002; seed: 0 -> 1"):
        tune(resume=True, changes=QUICK | {"lr": 0.002}, seed=1)
    write_photo(photos / "train" / "red" / "00.jpg", COLOURS["red"], 77)  # another picture, same name
    with pytest.raises(errors.UsageError, match=r"images.train: 16, \w+ -> 16, "):
        tune(source=photos, resume=True)
    tune(force=True, changes=QUICK | {"lr": 0.002})
    assert load_model(tune.ft).manifest["training"]["settings"]["lr"] == 0.002


@pytest.mark.parametrize(
    ("done", "signalled", "moves", "message"),
    [
        (
            6,
            False,
            False,
            r"loss is nan at step 2 of epoch 2.*last good checkpoint, after 1 epoch, is kept in.*add --force",
        ),
        (
            12,
            True,
            True,
            "not finite after step 2 of epoch 2",
        ),  # gone bad in the very step in which a signal asks to stop
    ],
)
def test_a_run_gone_bad_keeps_its_last_good_checkpoint(
    tune: Tuner, tmp_path: Path, broken: Callable[..., Any], done: int, signalled: bool, moves: bool, message: str
) -> None:
    """Where it is to stop, or no epoch was better than the start."""
    changes = QUICK if moves else QUICK | {"lr": 1e-30, "backbone_lr": 0.0}
    with pytest.raises(errors.TrainingError, match=message):
        tune(changes=changes, progress=broken(done, signalled=signalled))
    tune(changes=changes, resume=True)
    tune(changes=changes, output=tmp_path / "whole")
    assert_same_model(tmp_path / "whole", tune.ft)


def test_a_run_gone_bad_ends_with_its_best_epoch(tune: Tuner, whole: Path, broken: Callable[..., Any]) -> None:
    report = tune(progress=broken(6))
    assert (report.best_epoch, report.epochs, report.best_step) == (1, 2, 3)
    assert "loss is nan at step 2 of epoch 2" in tune.log.text
    assert "training ends here, and the best so far counts, of epoch 1" in tune.log.text
    assert history(tune.ft) == history(whole)[:1]
    assert not work_folder(tune.ft).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and held on Linux only")
@pytest.mark.parametrize(
    ("moves", "batch_size"), [(True, 6), (False, 2)]
)  # found at the epoch's end, and after four steps
def test_a_loss_gone_bad_in_one_process_ends_all(
    made: Path, tmp_path: Path, warm: Program, moves: bool, batch_size: int
) -> None:
    """In step: with the best epoch, or without a model."""

    flags = ["finetune", made / "photos", "--init", made / "m", "-o", tmp_path / "ft", "--precision", "fp32", "--json"]
    flags += [
        "--epochs",
        2,
        "--batch-size",
        batch_size,
        "--lr",
        1e-4 if moves else 1e-30,
        "--backbone-lr",
        1e-5 if moves else 0,
    ]
    outcomes = in_two_processes(warm, *flags, then=break_a_loss)
    assert [outcome.code for outcome in outcomes] == [0 if moves else 1] * 2, outcomes
    first = outcomes[0]
    assert "the loss is nan at step 2 of epoch 2" in first.err + first.out
    assert (tmp_path / "ft").exists() == moves
    if moves:
        assert first.result["best_epoch"] == 1


def test_what_lies_in_the_way_is_refused_and_kept(tune: Tuner, tmp_path: Path) -> None:
    (tmp_path / "ft.parts").mkdir()
    (tmp_path / "ft.parts" / "thesis.txt").write_text("three years")
    with pytest.raises(errors.StorageError, match="in use for something else"):
        tune(force=True)
    assert (tmp_path / "ft.parts" / "thesis.txt").read_text() == "three years"
    (tmp_path / "other.parts").write_text("a file")
    with pytest.raises(errors.StorageError, match="in use for something else"):
        tune(output=tmp_path / "other")
    own = tmp_path / "own.features.h5"
    extract(make_photos(tmp_path / "others", each=2), own, TINY)
    before = own.read_bytes()
    tune(output=tmp_path / "own", request=TINY, changes=QUICK | {"epochs": 1})
    assert own.read_bytes() == before


def test_a_run_killed_after_its_model_was_published_is_finished_by_resume(
    tune: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetuning, "keep_cache", lambda output: sys.exit())
    with pytest.raises(SystemExit):
        tune()
    monkeypatch.undo()
    assert work_folder(tune.ft).exists()
    before = (tune.ft / "model.json").read_bytes()
    report = tune(resume=True)
    assert report.model == tune.ft
    assert report.epochs == 2
    assert "val: frozen head" in report.comparison[0]
    assert (tune.ft / "model.json").read_bytes() == before
    assert not work_folder(tune.ft).exists()


def test_two_runs_never_write_one_model(tune: Tuner) -> None:
    def another(status: Status) -> None:
        with pytest.raises(errors.StorageError, match="another featcache is writing"):
            tune(force=True)

    assert tune(changes=QUICK | {"epochs": 1, "batch_size": 16}, progress=another).epochs == 1  # one step


@pytest.mark.parametrize("clf", [None, "linear"])
def test_a_class_with_one_training_image_still_trains(tune: Tuner, tmp_path: Path, clf: Any) -> None:
    photos = make_photos(tmp_path / "photos", each=3, splits=("train", "val"))
    for file in sorted((photos / "train" / "red").iterdir())[1:]:
        file.unlink()
    start: dict[str, Any] = {"request": TINY}
    if clf:  # its head is fit again, as there is no val split
        shutil.rmtree(photos / "val")
        extract(photos, tmp_path / "f.h5", TINY)
        fit_head(tmp_path / "f.h5", tmp_path / "m", clf=clf, folds=0)
        start = {"init": tmp_path / "m"}
    assert tune(source=photos, **start, changes=QUICK | {"epochs": 1}).epochs == 1


def test_a_recipe_whose_own_head_ends_below_the_cached_one_says_so(tune: Tuner) -> None:
    report = tune(recipe="cats-dogs", changes={"lr": 1e-9, "batch_size": 6})
    assert report.alpha is None
    assert report.val_accuracy < report.head_val_accuracy
    assert "ended below the cached head on val" in tune.log.text


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and held on Linux only")
def test_kill_and_resume(made: Path, tmp_path: Path, warm: Program) -> None:
    """SIGKILL after the first epoch of a real process."""
    command = ("finetune", made / "photos", "--init", made / "m", "--epochs", 3, "--batch-size", 6, *FLAGS, "-o")
    whole, killed = tmp_path / "whole" / "ft", tmp_path / "killed" / "ft"
    whole.parent.mkdir()
    killed.parent.mkdir()
    steps = warm.check(*command, whole, below=whole.parent, trace=True).steps
    saved = [step for step, it in enumerate(steps) if it.what == "rename" and it.other.endswith("/checkpoint.pt")]
    assert len(saved) >= 2
    assert warm.run(*command, killed, below=killed.parent, fault=Fault("die after", saved[0])).died
    assert not killed.exists()
    again = warm.check(*command, killed, "--resume")
    assert "resuming in epoch 2, after 0 of its steps" in again.err
    assert_same_model(whole, killed)


# ------------------------------------------------------------------------------------------- several processes


def break_a_loss() -> None:
    """From now on that of the second process at the second step of epoch 2 is no number, and to this process checkpoints seem dear."""
    Checkpoint._took = 1e9 * int(os.environ["RANK"])
    step = Trainer._step

    def broken(self: Trainer, *given: Any) -> torch.Tensor:
        return step(self, *given) * (
            float("nan") if (self.processes.rank, self.epoch, self.batch) == (1, 1, 1) else 1.0
        )

    Trainer._step = broken  # type: ignore[method-assign] # of a fork


def prepare(place: dict[str, str], then: Callable[[], None] | None) -> None:
    with_variables(place)()
    if then:
        then()


def in_two_processes(warm: Program, *command: object, then: Callable[[], None] | None = None) -> list[Outcome]:
    """The command as torchrun starts it, whose variables say which process is which, but without importing PyTorch anew."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    places = [where | {"LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0"} for rank in "01"]
    befores = [functools.partial(prepare, place, then) for place in places]
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda before: warm.run(*command, before=before), befores))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and held on Linux only")
def test_two_processes_do_what_one_does(tune: Tuner, made: Path, tmp_path: Path, warm: Program) -> None:
    """gloo on the CPU: the same metrics, weights but for rounding.

    With a network without dropout, which each process draws for its own images, and with a pooler that never trains. Gradients
    of several micro-batches add up, and what trains changes once, between the first and the second epoch. By plain descent, in
    which a gradient's size counts, as it does not in Adam's.
    """
    changes = {"backbone": "timm/test_vit3", "pool": "mean"}
    extract(made / "photos", tmp_path / "f.h5", dataclasses.replace(TINY, **changes))
    fit_head(tmp_path / "f.h5", tmp_path / "m", C=1.0, folds=0)
    settings = {"unfreeze": "gradual", "optimizer": "sgd", "interpolate": False, "warmup": 0.0}
    flags = ["finetune", made / "photos", "--init", tmp_path / "m", "--json", "-o", tmp_path / "two"]
    flags += ["--epochs", 3, "--batch-size", 8, "--micro-batch", 2, "--precision", "fp32"]
    flags += ["--lr", 0.01, "--backbone-lr", 0.003]
    flags += [word for name, value in settings.items() for word in ("--set", f"{name}={str(value).lower()}")]
    first, other = in_two_processes(warm, *flags)
    assert (first.code, other.code) == (0, 0), (first.err, other.err)
    assert "parity:" in first.err and (other.out, other.err) == ("", "")  # one of them talks
    one = tune(
        output=tmp_path / "one",
        init=tmp_path / "m",
        changes=settings | {"batch_size": 8, "epochs": 3, "lr": 0.01, "backbone_lr": 0.003},
    )
    two = first.result
    for key in ("val_accuracy", "test_accuracy", "head_val_accuracy", "best_epoch", "alpha"):
        assert two[key] == getattr(one, key), key
    rows = [json.loads((tmp_path / name / "metrics.json").read_text())["history"] for name in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        for row in (first, second):
            del row["seconds"], row["images_per_second"]
        assert first == pytest.approx(second, rel=1e-4)
    a, b = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name, values in a.items():
        np.testing.assert_allclose(values, b[name], rtol=1e-3, atol=1e-4, err_msg=name)


# ---------------------------------------------------------------------------------------------- command line


def test_the_command(tune: Tuner, made: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run(
        "finetune", made / "photos", "-o", tune.ft, *TINY_FLAGS, "--epochs", 1, "--recipe", "gradual", "--json"
    )
    assert code == 0, err
    facts = json.loads(out.splitlines()[-1])
    contract = (
        "model epochs best_epoch val_accuracy head_val_accuracy test_accuracy parameters trainable_parameters seconds"
    )
    assert set(contract.split()) <= set(facts)
    assert "val: frozen head" in facts["comparison"][0]
    assert "95% interval" in facts["comparison"][0]
    code, _, err = run(
        "finetune", made / "photos", "-o", tmp_path / "x", "--init", made / "m", "--backbone", "resnet18"
    )
    assert (code, "--init brings its own backbone" in err) == (2, True)
    code, out, _ = run("info", tune.ft, "--json")
    info = json.loads(out)
    assert info["training"]["recipe"] == "gradual"
    assert [info[key] for key in ("parameters", "trainable_parameters")] == [
        facts[key] for key in ("parameters", "trainable_parameters")
    ]
    assert sum(p.numel() for p in load_model(tune.ft).network().parameters()) == facts["parameters"]


def test_a_gpus_processes_start_before_images_are_embedded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def embed(*_: object, **__: object) -> Any:
        assert len(asked) == 1
        raise errors.SourceError("embedding begins")

    monkeypatch.setattr("featcache.finetuning.pixels.drawing_processes", lambda *given: asked.append(given))
    monkeypatch.setattr(finetuning, "prepare_start", embed)
    with pytest.raises(errors.SourceError, match="embedding begins"):
        finetune(photos, tmp_path / "m", device="cpu", backbone="squeezenet1_1", weights="none")
