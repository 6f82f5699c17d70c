"""Scores as text: what is said of which numbers, and tables that fit a terminal whatever the classes are called."""

import dataclasses
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.models.fit import FitReport
from featcache.reports.scores import audit_line, confusion_lines, evaluation_lines, fit_lines
from featcache.system.display import aligned, columns

REPORT = FitReport(
    model=Path("m"),
    clf="logreg",
    C=10.0,
    scaling="unit",
    classes=2,
    class_names=("ants", "bees"),
    n_train=245,
    cv_accuracy=0.9665,
    cv_std=0.0082,
    cv_log_loss=0.1,
    temperature=1.0562,
    val_accuracy=0.96078,
    val_accuracy_interval=[0.917, 0.9819],
    val_balanced_accuracy=0.9598,
    val_macro_f1=0.9601,
    val_accuracy_without_copies=0.96078,
    test_accuracy=None,
    test_accuracy_interval=None,
    test_balanced_accuracy=None,
    test_macro_f1=None,
    test_accuracy_without_copies=None,
    copies={"within": 0, "across_splits": 0, "across_labels": 0},
    settings={"C": 10.0, "scaling": "unit"},
    groups=None,
    seconds=1.3,
)


def test_what_fit_head_did() -> None:
    assert fit_lines(REPORT, REPORT.class_names) == [
        "m: logreg (C 10, scaling unit), 2 classes, 245 training images",
        "  classes: ants, bees",
        "  cross-validated accuracy 96.65%, corrected for the choice of the setting",
        "    standard deviation over folds 0.82%; temperature 1.06",
        "  val accuracy 96.08%, on images nothing was chosen on",
        "    95% interval 91.70% to 98.19%; balanced accuracy 95.98%, macro F1 96.01%",
        "  1.3 s; details in m/metrics.json",
    ]


@pytest.mark.parametrize(
    ("suspects", "copies", "cache", "expected"),
    [
        (
            12,
            0,
            "my f.h5",
            "  12 labels of these images in doubt, 0 exact copies across splits: featcache audit 'my f.h5' -o audit/",
        ),
        (
            1,
            1,
            "f.h5",
            "  1 label of these images in doubt, 1 exact copy across splits: featcache audit f.h5 -o audit/",
        ),
        (None, 3, None, "  3 exact copies across splits: featcache audit FEATURES.h5 -o audit/"),
        (None, None, "f.h5", "  wrong labels, copies: featcache audit f.h5 -o audit/"),
    ],
)
def test_what_audit_would_find(suspects: int | None, copies: int | None, cache: str | None, expected: str) -> None:
    assert audit_line(suspects, copies, cache, of=" of these images") == expected


def test_what_else_there_is_to_say_of_a_head() -> None:
    settings = {"epochs": 12.5, "lr": 0.003, "batch_size": 32, "scaling": "standardise"}
    other: dict[str, Any] = {
        "clf": "linear",
        "C": None,
        "scaling": "standardise",
        "settings": settings,
        "cv_accuracy": None,
    }
    other["copies"] = REPORT.copies | {"across_splits": 3}
    linear = dataclasses.replace(REPORT, **other, n_train=64, val_accuracy_without_copies=0.5)
    lines = fit_lines(linear, [f"species {k}" for k in range(200)])
    assert lines[0].startswith("m: linear (scaling standardise), 2 classes")
    assert lines[1] == "  classes: species 0, species 1, species 2, species 3, species 4 and 195 more"
    assert lines[2] == "  12.5 epochs in steps of 32, lr 0.003"
    assert (
        fit_lines(dataclasses.replace(linear, n_train=30), ["x"])[2] == "  12.5 epochs in steps of at most 32, lr 0.003"
    )
    assert lines[3] == "  val accuracy 96.08%, 50.00% without copies of training images"
    mlp = {"clf": "mlp", "settings": settings | {"hidden": [64, 8], "dropout": [0.25, 0.0]}}
    lines = fit_lines(dataclasses.replace(linear, **mlp, val_accuracy_without_copies=None), ["x" * 100, "y"])
    assert lines[1] == f"  classes: {'x' * 100} and 1 more"
    assert lines[2] == "  hidden 64, 8; dropout 0.25, 0; 12.5 epochs in steps of 32, lr 0.003"
    assert lines[3] == "  val accuracy 96.08%, all of them are copies of training images"


SCORES: dict[str, Any] = {
    "n": 153,
    "split": "val",
    "refused": 1,
    "accuracy": 0.96,
    "accuracy_interval": [0.9, 1.0],
    "balanced_accuracy": 0.9,
    "macro_f1": 0.8,
    "log_loss": 0.1234,
    "ece": 0.01,
    "top5_accuracy": None,
    "answered": None,
    "copies": {"across_splits": 0},
    "accuracy_without_copies": 0.96,
    "per_class": {
        "a": {"n": 70, "recall": 0.9571, "precision": 0.9571},
        "b": {"n": 0, "recall": None, "precision": 0.0},
        "c": {"n": 83, "recall": 0.9639, "precision": None},
    },
    "confusion": [[67, 3, 0], [0, 0, 0], [0, 3, 80]],
}


def test_what_evaluate_found() -> None:
    assert evaluation_lines(SCORES, ["ants", "b", "bees"]) == [
        "153 images (val), refused 1",
        "  accuracy 96.00% (95% interval 90.00% to 100.00%)",
        "  balanced accuracy 90.00%, macro F1 80.00%",
        "  log loss 0.1234, calibration error 1.00%",
        "  ants: 70 images, recall 95.71%, precision 95.71%",
        "  bees: 83 images, recall 96.39%, precision -",
        "  rows: the true class; columns: what was predicted",
        "          ants    b  bees",
        "    ants  [67]   3     .",
        "    b       .   [0]    .",
        "    bees    .    3   [80]",
    ]
    for without, words in (
        (0.5, "accuracy 50.00% on images that training has not seen"),
        (None, "has seen all of them"),
    ):
        copies = {"copies": {"across_splits": 2}, "accuracy_without_copies": without}
        assert words in evaluation_lines(SCORES | copies, list("abc"))[4]


def test_how_well_predictions_know_their_limits() -> None:
    curve = [(1.0, 0.96, 0.5), (0.5, 0.98, 0.9), (0.25, 1.0, 0.95)]
    points = [{"share": share, "accuracy": accuracy, "least_probability": p} for share, accuracy, p in curve]
    ways = {"before": {"log_loss": 0.2, "ece": 0.03}, "after": {"log_loss": 0.1234, "ece": 0.01}}
    shares = {"mean_size": 1.02, "largest": 3, "one_class": 0.9, "empty": 0.04, "several": 0.06}
    reached = {"a": {"n": 70, "reached": 0.94}, "b": {"n": 0, "reached": None}, "c": {"n": 83, "reached": 0.96}}
    sets = {"asked": 0.95, "reached": 0.951, "interval": [0.9, 0.98], "own_thresholds": 2, "per_class": reached}
    answered = {"n": 138, "share": 0.9, "accuracy": 0.985, "unfamiliar": 0.04}
    facts = {"top5_accuracy": 0.99, "calibration": {"temperature": 1.25} | ways, "answer_curve": points}
    facts |= {"coverage": sets | shares, "answered": answered}
    lines = evaluation_lines(SCORES | facts, list("abc"))
    assert lines[2] == "  the true class is among the five most probable in 99.00%"
    assert lines[5:15] == [
        "  by the temperature 1.25: log loss 0.2000 -> 0.1234, error 3.00% -> 1.00%",
        "  coverage 95.10% (95% interval 90.00% to 98.00%), asked for 0.95",
        "    sets of 1.02 classes (at most 3): one 90.00%, none 4.00%, several 6.00%",
        "    by class 94.00% to 96.00%; own thresholds: 2 classes",
        "  unlike the training images 4.00%",
        "  138 images are answered (90.00%), accuracy 98.50%",
        "  accuracy on the surest images (bars: errors):",
        "    100%: accuracy 96.00%, probability from 0.5000 ####################",
        "     50%: accuracy 98.00%, probability from 0.9000 ##########",
        "     25%: accuracy 100.00%, probability from 0.9500",
    ]
    assert max(map(len, lines)) <= 80
    nothing = facts | {"coverage": None, "answered": answered | {"n": 0, "accuracy": None}}
    assert "  no image is answered" in evaluation_lines(SCORES | nothing, list("abc"))


# ------------------------------------------------------------------------------------------------------- confusion

HEADING = "  rows: the true class; columns: what was predicted"


def test_a_table_of_names_in_any_script() -> None:
    """A wide character takes two columns, a mark none."""
    names = ["\u5b57\u5b57", "e\u0301te\u0301", "\u1112\u1161\u11ab", "\u05e9\u05c1"]
    assert [columns(name) for name in names] == [4, 3, 2, 1]
    assert confusion_lines([[5, 1, 0, 0], [0, 5, 1, 0], [0, 0, 5, 1], [0, 0, 0, 5]], names) == [
        HEADING,
        f"          {names[0]}  {names[1]}   {names[2]}    {names[3]}",
        f"    {names[0]}   [5]   1    .    .",
        f"    {names[1]}     .   [5]   1    .",
        f"    {names[2]}      .    .   [5]   1",
        f"    {names[3]}       .    .    .   [5]",
    ]


@pytest.mark.parametrize("name", ["", "abc", "\u5b57\u5b57", "\u00e9t\u00e9", "\ud55c\uad6d", "\u304c\u30d1"])
def test_columns_are_counted_alike_however_a_name_is_composed(name: str) -> None:
    widths = {form: columns(unicodedata.normalize(form, name)) for form in ("NFC", "NFD")}
    assert widths == dict.fromkeys(widths, sum(1 + (character >= "\u3000") for character in name))


def test_numbers_stand_for_names_that_do_not_fit_above_their_columns() -> None:
    names = [f"{which} of the classes with long names" for which in ("first", "second", "third")]
    counts = [[10, 0, 2], [0, 3, 0], [0, 1, 7]]
    assert confusion_lines(counts, names) == [
        HEADING,
        "                                               1   2   3",
        "    1 first of the classes with long names  [10]  .   2",
        "    2 second of the classes with long names   .  [3]  .",
        "    3 third of the classes with long names    .   1  [7]",
    ]
    names[1] = "the second, which is " * 3 + "longest"
    assert confusion_lines(counts, names) == [
        HEADING,
        "                                                                       1   2   3",
        "    1 first of the classes with long names                          [10]  .   2",
        "    2 the second, which is the secon.. the second, which is longest   .  [3]  .",
        "    3 third of the classes with long names                            .   1  [7]",
        f"    2 = {names[1]}",
    ]


def test_where_a_table_is_too_wide_the_largest_confusions_stand() -> None:
    names = [f"class {k}" for k in range(30)]
    counts = np.diag(np.full(30, 50))
    assert confusion_lines(counts.tolist(), names) == ["  no image was taken for another class"]
    counts[3, 7], counts[7, 3], counts[2, 9] = 12, 4, 12
    assert confusion_lines(counts.tolist(), names) == [
        "  largest confusions, true -> predicted",
        "    class 2 -> class 9: 12 of 62",
        "    class 3 -> class 7: 12 of 62",
        "    class 7 -> class 3: 4 of 54",
    ]
    counts[:, 0] += 1
    lines = confusion_lines(counts.tolist(), [*names[:3], "long " * 30 + "name", *names[4:]])
    assert lines[0] == "  largest confusions, true -> predicted; 22 more pairs were confused"
    assert lines[2] == f"    {'long ' * 5}lo..g{' long' * 4} name -> class 7: 12 of 63"
    assert len(lines) == 11


@pytest.mark.parametrize("length", [1, 6, 30, 300])
@pytest.mark.parametrize("classes", [1, 2, 5, 9, 13, 17, 21, 100])
def test_no_table_is_wider_than_a_terminal(classes: int, length: int) -> None:
    rng = np.random.default_rng(classes)
    names = ["".join(rng.choice([*"ab \u5b57\u0301\u304c"], length)) for _ in range(classes)]
    for most in (2, 90, 10**6):
        counts = rng.integers(0, most, (classes, classes)) + np.eye(classes, dtype=int)
        lines = confusion_lines(counts.tolist(), names)
        assert max(columns(line) for line in lines if " = " not in line) <= 80


def test_classes_that_play_no_part_take_no_room() -> None:
    counts = np.zeros((1000, 1000), int)
    counts[5, 5], counts[5, 990] = 3, 1
    assert confusion_lines(counts.tolist(), [f"c{k}" for k in range(1000)]) == [
        HEADING,
        "           c5  c990",
        "    c5    [3]    1",
        "    c990   .    [0]",
    ]


def test_counts_stand_below_each_other_whatever_the_script() -> None:
    lines = aligned(
        [["class", "train", "all"], ["日本語", "3", "3"], ["🐱 cat", "12", "12"], ["e\u0301te\u0301", "1", "1"]]
    )
    assert len({columns(line) for line in lines}) == 1
    assert aligned([["class", "n"], ["ab", "12"]]) == ["  class   n", "  ab     12"]
