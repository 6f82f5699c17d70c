"""What probabilities are worth, in pictures. In: scores as ``evaluate`` returns them. Out: the section of a report, and its charts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from featcache.heads.metrics import accuracy_interval
from featcache.reports.elements import charts
from featcache.reports.elements.charts import Chart
from featcache.reports.elements.numbers import count_text, number_text, percent_text
from featcache.reports.elements.page import Section

Scores = Mapping[str, Any]
_FEW = 5  # errors, below which the curve is no ground for advice


def calibration_section(scores: Scores) -> Section:
    """Reliability, coverage against accuracy, and what they say in words."""
    calibration = scores["calibration"]
    rows = [
        [way, number_text(found["log_loss"]), *map(percent_text, (found["ece"], found["ece_by_chance"]))]
        for way, found in (("before", calibration["before"]), ("after", calibration["after"]))
    ]
    if calibration["temperature"] == 1:
        rows = [["all", *rows[1][1:]]]
    context = {
        "charts": calibration_charts(scores),
        "rows": rows,
        "temperature": calibration["temperature"],
        "words": _in_words(calibration["after"]),
        "advice": _advice(scores),
    }
    return Section("calibration", "What probabilities are worth", "section_calibration.html", context, "Probabilities")


def calibration_charts(scores: Scores) -> list[Chart]:
    """Reliability and coverage."""
    calibration = scores["calibration"]
    before, after = (_bins(calibration[way]["reliability"]) for way in ("before", "after"))
    pair = (after, None) if calibration["temperature"] == 1 else (before, after)
    caption = (
        "On the diagonal, answers of a probability of 80% are right in 80%; below it, the model is too sure of itself. "
        "Whiskers are 95% intervals."
    )
    return [charts.reliability(*pair, caption=caption), _coverage_chart(scores)]


def _bins(rows: Sequence[Mapping[str, Any]]) -> charts.Bins:
    return charts.Bins(*([row[name] for row in rows] for name in ("confidence", "accuracy", "n")))


def _coverage_chart(scores: Scores) -> Chart:
    """Accuracy of the surest answers with its interval, and where a chosen abstention lies."""
    curve, answered = scores["answer_curve"][::-1], scores["answered"]
    ends = [accuracy_interval(round(point["accuracy"] * point["n"]), point["n"]) for point in curve]
    band = [low for low, _ in ends], [high for _, high in ends]
    shares, values = ([point[name] for point in curve] for name in ("share", "accuracy"))
    series = [charts.Series("surest", shares, values, *band)]
    caption = "Accuracy of the answers that are given if the least sure ones are not. The band is a 95% interval."
    if answered is not None and answered["n"]:
        series.append(charts.Series("as asked", [answered["share"]], [answered["accuracy"]]))
        caption += f" As asked, {percent_text(answered['share'])} are answered, {percent_text(answered['accuracy'])} of them rightly."
    return charts.lines(
        series,
        title="Coverage against accuracy",
        caption=caption,
        x_label="share of images answered",
        y_label="accuracy",
        percent_x=True,
        percent_y=True,
    )


def _in_words(after: Mapping[str, Any]) -> str:
    """How far the error of calibration can be told from that of a calibrated model."""
    error, chance = after["ece"], after["ece_by_chance"]
    found = f"The calibration error is {percent_text(error)}"
    expected = f"a perfectly calibrated model would show about {percent_text(chance)} on as few images"
    if error <= 1.5 * chance:
        return f"{found}, no more than chance explains: {expected}."
    return f"{found}; {expected}. Read probabilities with that in mind."


def _advice(scores: Scores) -> tuple[str, str] | None:
    """The least abstention on the curve that halves the share of errors, and the option for it; None where there is none."""
    curve = scores["answer_curve"]
    wrong, n = _wrong(curve[0]), curve[0]["n"]
    for point in curve[1:]:
        if wrong >= _FEW and 2 * _wrong(point) * n <= wrong * point["n"]:
            least = point["least_probability"]
            words = (
                f"Leaving the {count_text(scores['n'] - point['n'])} least sure images to people, those whose answer is less "
                f"probable than {percent_text(least)}, brings the errors from {_errors(curve[0])} to {_errors(point)}."
            )
            return words, f"--abstain-below {math.floor(least * 10_000) / 10_000:g}"
    return None


def _errors(point: Mapping[str, float]) -> str:
    return f"{percent_text(1 - point['accuracy'])} ({count_text(_wrong(point))} of {count_text(point['n'])})"


def _wrong(point: Mapping[str, float]) -> int:
    return round(point["n"] * (1 - point["accuracy"]))
