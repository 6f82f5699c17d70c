"""Scores in words. In: what ``fit_head`` or ``evaluate`` returned. Out: lines of a text, for a terminal of 80 columns.

Class names come as they are to be shown, on one line each and harmless to a terminal; they may be of any script and length.
"""

import heapq
import itertools
import shlex
import unicodedata
from collections.abc import Sequence
from typing import Any

from featcache.models.fit import FitReport
from featcache.system.display import columns, printable, quantity, width_of

_WIDTH = 80  # columns of a terminal
_LEAST_NAME = 8  # columns, in front of a row
_MOST_CONFUSIONS = 10


def fit_lines(report: FitReport, names: Sequence[str]) -> list[str]:
    """What ``fit_head`` did, a line per fact. ``names``: of its classes."""
    chosen = f"C {report.C:g}, " if report.C is not None else ""
    trained = f"{quantity(report.classes, 'class')}, {quantity(report.n_train, 'training image')}"
    lines = [
        f"{report.model}: {report.clf} ({chosen}scaling {report.scaling}), {trained}",
        f"  classes: {_some(names, _WIDTH - len('  classes: '))}",
    ]
    if report.clf != "logreg":
        settings = {"hidden": (), "dropout": ()} | report.settings
        layers = [
            f"{key} {', '.join(f'{x:g}' for x in settings[key])}; " for key in ("hidden", "dropout") if settings[key]
        ]
        most = "at most " if report.n_train % settings["batch_size"] else ""
        steps = (
            f"{quantity(settings['epochs'], 'epoch')} in steps of {most}{settings['batch_size']}, lr {settings['lr']:g}"
        )
        lines.append(f"  {''.join(layers)}{steps}")
    if report.cv_accuracy is not None:
        choice = ", corrected for the choice of the setting" if report.clf == "logreg" else ""
        lines.append(f"  cross-validated accuracy {report.cv_accuracy:.2%}{choice}")
        lines.append(f"    standard deviation over folds {report.cv_std:.2%}; temperature {report.temperature:.3g}")
        if report.groups is not None:
            lines.append(
                f"    {quantity(report.groups['training'], 'group')} ({printable(report.groups['column'])}) in one fold each"
            )
    lines += itertools.chain.from_iterable(_split_lines(report, split) for split in ("val", "test"))
    return [*lines, f"  {report.seconds:.1f} s; details in {report.model / 'metrics.json'}"]


def _split_lines(report: FitReport, split: str) -> list[str]:
    """The scores on val or test, and how far they can be believed; nothing where there are none."""
    of_split = f"{split}_"
    scores = {key.removeprefix(of_split): value for key, value in vars(report).items() if key.startswith(of_split)}
    if scores["accuracy"] is None:
        return []
    remark, without = "on images nothing was chosen on", scores["accuracy_without_copies"]
    if report.copies["across_splits"]:
        all_seen = "all of them are copies of training images"
        remark = all_seen if without is None else f"{without:.2%} without copies of training images"
    low, high = scores["accuracy_interval"]
    return [
        f"  {split} accuracy {scores['accuracy']:.2%}, {remark}",
        f"    95% interval {low:.2%} to {high:.2%}; {_balanced(scores)}",
    ]


def _balanced(scores: dict[str, Any]) -> str:
    return f"balanced accuracy {scores['balanced_accuracy']:.2%}, macro F1 {scores['macro_f1']:.2%}"


def audit_line(suspects: int | None, copies: int | None, cache: str | None, *, of: str = "") -> str:
    """What ``audit`` would find as far as it is known already, and the command. ``copies``: across splits. of: whose labels."""
    known = (
        ((f"label{of} in doubt", f"labels{of} in doubt"), suspects),
        (("exact copy across splits", "exact copies across splits"), copies),
    )
    counts = ", ".join(quantity(count, *words) for words, count in known if count is not None)
    name = "FEATURES.h5" if cache is None else shlex.quote(cache)
    return f"  {counts or 'wrong labels, copies'}: featcache audit {name} -o audit/"


def evaluation_lines(scores: dict[str, Any], names: Sequence[str]) -> list[str]:
    """What ``evaluate`` found, a line per fact. ``names``: of the model's classes."""
    low, high = scores["accuracy_interval"]
    elsewhere = scores.get("refused_of_unknown_split")
    more = f", and {elsewhere} of a split that is not known" if elsewhere else ""
    lines = [
        f"{quantity(scores['n'], 'image')} ({scores['split']}), refused {scores['refused']}{more}",
        f"  accuracy {scores['accuracy']:.2%} (95% interval {low:.2%} to {high:.2%})",
        f"  {_balanced(scores)}",
        f"  log loss {scores['log_loss']:.4f}, calibration error {scores['ece']:.2%}",
    ]
    if scores["top5_accuracy"] is not None:
        lines.insert(2, f"  the true class is among the five most probable in {scores['top5_accuracy']:.2%}")
    if chosen := scores.get("chosen_on"):
        lines.append(f"  optimistic: {chosen_on(chosen, scores['n'])}")
    lines += limit_lines(scores)
    if scores["copies"]["across_splits"]:
        new = scores["accuracy_without_copies"]
        all_seen = "training has seen all of them"
        lines.append(f"  {all_seen if new is None else f'accuracy {new:.2%} on images that training has not seen'}")
    for name, entry in zip(names, scores["per_class"].values(), strict=True):
        if entry["n"]:
            precision = "-" if entry["precision"] is None else f"{entry['precision']:.2%}"
            lines.append(
                f"  {name}: {quantity(entry['n'], 'image')}, recall {entry['recall']:.2%}, precision {precision}"
            )
    return lines + confusion_lines(scores["confusion"], names)


def chosen_on(count: int, n: int) -> str:
    """Which of ``n`` images the epoch and the mixture of a fine-tuned model were chosen by: ``count`` of them."""
    return f"epoch and mixture were chosen on {'these images' if count == n else f'{count:,} of these images'}"


def limit_lines(scores: dict[str, Any]) -> list[str]:
    """How well predictions know their limits; nothing unless a coverage or an abstention was asked for."""
    if (answered := scores["answered"]) is None:
        return []
    calibration = scores["calibration"]
    before, after = (calibration[way] for way in ("before", "after"))
    losses = f"log loss {before['log_loss']:.4f} -> {after['log_loss']:.4f}"
    errors = f"error {before['ece']:.2%} -> {after['ece']:.2%}"
    lines = [f"  by the temperature {calibration['temperature']:.3g}: {losses}, {errors}"]
    if scores["coverage"] is not None:
        lines += _coverage_lines(scores["coverage"])
    if answered["unfamiliar"] is not None:
        lines.append(f"  unlike the training images {answered['unfamiliar']:.2%}")
    share = f"  {quantity(answered['n'], 'image is', 'images are')} answered ({answered['share']:.2%})"
    lines.append(f"{share}, accuracy {answered['accuracy']:.2%}" if answered["n"] else "  no image is answered")
    return lines + _curve_lines(scores["answer_curve"])


def _coverage_lines(sets: dict[str, Any]) -> list[str]:
    low, high = sets["interval"]
    reached = [entry["reached"] for entry in sets["per_class"].values() if entry["n"]]
    shares = f"one {sets['one_class']:.2%}, none {sets['empty']:.2%}, several {sets['several']:.2%}"
    return [
        f"  coverage {sets['reached']:.2%} (95% interval {low:.2%} to {high:.2%}), asked for {sets['asked']:.4g}",
        f"    sets of {sets['mean_size']:.2f} classes (at most {sets['largest']}): {shares}",
        f"    by class {min(reached):.2%} to {max(reached):.2%}; own thresholds: {quantity(sets['own_thresholds'], 'class')}",
    ]


def _curve_lines(curve: Sequence[dict[str, float]]) -> list[str]:
    """Accuracy of the surest images, and bars as long as their share of errors, twenty signs for that of all images."""
    most = 1 - curve[0]["accuracy"] or 1
    lines = ["  accuracy on the surest images (bars: errors):"]
    for point in curve:
        bar = "#" * min(30, round(20 * (1 - point["accuracy"]) / most))
        accuracy, least = point["accuracy"], point["least_probability"]
        lines.append(f"    {point['share']:4.0%}: accuracy {accuracy:.2%}, probability from {least:.4f} {bar}".rstrip())
    return lines


# ------------------------------------------------------------------------------------------------------- confusion


def confusion_lines(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[str]:
    """Which class is taken for which: a table, or where it would be too wide the largest confusions.

    Where names do not fit above the columns of the table, their numbers stand there. Classes that neither occur nor are
    predicted are left out.

    Args:
        confusion: a row of counts per true class, a column per predicted one.
        names: of the classes.
    """
    there = [k for k, row in enumerate(confusion) if any(row) or any(other[k] for other in confusion)]
    kept, counts = [names[k] for k in there], [[confusion[i][j] for j in there] for i in there]
    table: list[str] = []
    if len(kept) <= _WIDTH // len(" [1]"):
        cells = [[f"[{n}]" if i == j else f"{n or '.'} " for j, n in enumerate(row)] for i, row in enumerate(counts)]
        table = _table(kept, kept, cells, gap=2)
        if max(map(columns, table)) > _WIDTH:
            table = _numbered_table(kept, cells)
    heading = "  rows: the true class; columns: what was predicted"
    return [heading, *table] if table else _largest_confusions(kept, counts)


def _table(heads: Sequence[str], fronts: Sequence[str], cells: Sequence[Sequence[str]], *, gap: int) -> list[str]:
    """Cells below ``heads`` and behind ``fronts``."""
    widths = [
        max(map(columns, fronts)),
        *(gap + max(map(columns, column)) for column in zip(heads, *cells, strict=True)),
    ]
    rows = [("", *heads), *((front, *row) for front, row in zip(fronts, cells, strict=True))]
    lines = []
    for row in rows:
        blanks = [" " * (width - columns(cell)) for cell, width in zip(row, widths, strict=True)]
        first = f"    {row[0]}{blanks[0]}"
        lines.append(first + "".join(blank + cell for blank, cell in zip(blanks[1:], row[1:], strict=True)))
    return [line.rstrip() for line in lines]


def _numbered_table(names: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """The table with numbers above its columns, and names in front as far as they fit; nothing if they hardly would."""
    numbers = [str(k) for k in range(1, len(names) + 1)]
    room = _WIDTH - 1 - max(map(columns, _table(numbers, numbers, cells, gap=1)))
    if room < min(_LEAST_NAME, max(map(columns, names))):
        return []
    digits = len(numbers[-1])
    fronts = [f"{number:>{digits}} {shortened(name, room)}" for number, name in zip(numbers, names, strict=True)]
    cut = [f"    {number} = {name}" for number, name in zip(numbers, names, strict=True) if columns(name) > room]
    return _table(numbers, fronts, cells, gap=1) + cut


def _largest_confusions(names: Sequence[str], counts: list[list[int]]) -> list[str]:
    """As lines ``true -> predicted: 12 of 80``, the largest first."""
    wrong = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
    if not wrong:
        return ["  no image was taken for another class"]
    lines = []
    for n, i, j in heapq.nsmallest(_MOST_CONFUSIONS, wrong, key=lambda pair: (-pair[0], *pair[1:])):
        count = f": {n} of {sum(counts[i])}"
        room = _WIDTH - len("     -> " + count)
        true, predicted = (shortened(names[a], max(room // 2, room - columns(names[b]))) for a, b in ((i, j), (j, i)))
        lines.append(f"    {true} -> {predicted}{count}")
    more = (
        f"; {quantity(len(wrong) - len(lines), 'more pair was', 'more pairs were')} confused"
        if wrong[len(lines) :]
        else ""
    )
    return [f"  largest confusions, true -> predicted{more}", *lines]


# ----------------------------------------------------------------------------------------------------------- names


def shortened(text: str, width: int) -> str:
    """``text``, or its beginning and its end, by which names differ, in at most ``width`` columns."""
    if columns(text) <= width:
        return text
    text = unicodedata.normalize("NFC", text)
    widths = [*map(width_of, text)]
    first = sum(used <= (width - 1) // 2 for used in itertools.accumulate(widths))
    room = width - 2 - sum(widths[:first])
    last = len(text) - sum(used <= room for used in itertools.accumulate(reversed(widths)))
    while last < len(text) and not widths[last]:  # a mark without its letter
        last += 1
    return f"{text[:first]}..{text[last:]}"


def _some(names: Sequence[str], width: int) -> str:
    """The first names in ``width`` columns, one at least, and how many there are more."""
    for count in range(min(len(names), width // 3), 0, -1):
        more = f" and {len(names) - count} more" if names[count:] else ""
        text = ", ".join(names[:count]) + more
        if columns(text) <= width:
            break
    return text
