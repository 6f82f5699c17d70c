"""What an audit found, as text for a terminal of 80 columns. In: ``Found``. Out: lines, names harmless to a terminal."""

import textwrap
from collections.abc import Iterator, Sequence

from featcache.curation.audit import Found
from featcache.curation.finding import KINDS, Finding, Kind
from featcache.curation.honest_score import Score
from featcache.curation.label_errors import HOW_MANY_ARE_REAL
from featcache.reports.scores import shortened
from featcache.system.display import columns, printable

_WIDTH = 80
_NAMED = 3  # overlaps and examples of a kind
TITLES: dict[Kind, str] = {
    "exact_copy": "exact copies",
    "near_copy": "near copies",
    "label": "label suspects",
    "outlier": "outliers",
    "off_topic": "off topic",
    "dark": "dark",
    "blurred": "blurred",
    "blank": "blank",
    "tiny": "tiny",
}
_HALF = f"{HOW_MANY_ARE_REAL[0].upper()}{HOW_MANY_ARE_REAL[1:]}. Look before you drop or relabel."
_OVERLAP = 0.9  # of labels that heads agree with; fewer: wrong ones hide among those that are hard to tell
_UNUSUAL = "Outliers and off-topic images are unusual ones: look at them; most may be right."
_NOTHING = {"without_leaks": "no copy of these in training", "without_suspects": "no label suspects in training"}


def audit_lines(found: Found) -> list[str]:
    """What was found, the next step left to the caller."""
    parts = (_head(found), _kinds(found), _scores(found.scores), _sentences(found))
    return [line for part in parts for line in part]


def _head(found: Found) -> Iterator[str]:
    concerned, n = len({finding.row for finding in found}), len(found.cache)
    classes = len(found.cache.classes)
    of = f"{classes} class{'es' * (classes != 1)}" if classes else "no classes"
    facts = f": {n:,} image{'s' * (n != 1)}, {of}; {concerned:,} worth a look"
    yield shortened(printable(str(found.cache.path)), max(_WIDTH - columns(facts), 12)) + facts


def _kinds(found: Found) -> Iterator[str]:
    """A line per kind with its count and the first examples; those that were not looked for together, by reason."""
    width = max(len(f"{len(findings):,}") for findings in [*found.findings.values(), []])
    for kind in KINDS:
        if kind in found.findings:
            findings = found.findings[kind]
            line = f"  {TITLES[kind]:<14}  {len(findings):>{width},}"
            yield line + _note(found, kind, findings)
            if findings:
                yield from _examples(found, findings)
    names: dict[str, str] = {"scores": "score", "overlaps": "classes that overlap"}
    names |= {str(kind): title for kind, title in TITLES.items()}
    for why in dict.fromkeys(found.not_done.values()):
        kinds = [names[name] for name, reason in found.not_done.items() if reason == why]
        yield from _wrapped(f"not looked for: {', '.join(kinds)}: {printable(why)}")


def _note(found: Found, kind: Kind, findings: Sequence[Finding]) -> str:
    if kind not in ("exact_copy", "near_copy") or not findings:
        return ""
    groups = len({finding.group for finding in findings} - {None})
    crossing = {*found.across_splits().tolist()} & {finding.row for finding in findings}
    across = f", {len(crossing):,} of val or test in an earlier split, too" if crossing else ""
    return f"  in {groups:,} group{'s' * (groups != 1)}{across}"


def _examples(found: Found, findings: Sequence[Finding]) -> Iterator[str]:
    cache, seen = found.cache, set[object]()
    for finding in findings:
        key = finding.row if finding.group is None else (finding.kind, finding.group)
        if key in seen or len(seen) == _NAMED:
            continue
        seen.add(key)
        path = printable(cache.paths[finding.row])
        if finding.suggested is not None:
            names = [printable(cache.classes[k]) for k in (int(cache.y[finding.row]), finding.suggested)]
            behind = f"  {shortened(names[0], 16)}, rather {shortened(names[1], 16)}"
        elif finding.other is not None:
            behind = f" = {shortened(printable(cache.paths[finding.other]), (_WIDTH - 9) // 2)}"
        else:
            label = int(cache.y[finding.row])
            behind = f"  {shortened(printable(cache.classes[label]), 16)}" if label >= 0 else ""
        yield f"    {shortened(path, _WIDTH - 4 - columns(behind))}{behind}"


def _scores(scores: Sequence[Score]) -> Iterator[str]:
    """Accuracies with their intervals, each on stricter terms than the one before; stricter terms that change nothing in a line."""
    for some, nothing in telling(scores):
        for score in some:
            title = "  " * (score.terms != "as_given") + score_title(score)
            low, high = score.interval
            yield f"  {title:<43} {score.accuracy:>6.2%} of {score.n:,} ({low:.2%} to {high:.2%})"
        if nothing:
            yield f"    {nothing}"


def telling(scores: Sequence[Score]) -> Iterator[tuple[list[Score], str]]:
    """For each split the scores that differ in their terms, and in words which terms leave nothing out; empty if all do."""
    for split in dict.fromkeys(score.split for score in scores):
        some, nothing = [], []
        for score in (score for score in scores if score.split == split):
            folds = split == "out_of_fold" and score.terms == "without_leaks"  # in which nothing is left out
            if score.terms == "as_given" or score.left_out or folds:
                some.append(score)
            else:
                nothing.append(_NOTHING[score.terms])
        yield some, ", ".join(nothing)


def score_title(score: Score) -> str:
    """What an accuracy counts, beside the one before it."""
    name, out = score.split.replace("_", " "), f"{score.left_out:,}"
    folds = score.split == "out_of_fold"
    return {
        "as_given": f"{name} accuracy",
        "without_leaks": "copies of an image in one fold" if folds else f"without {out} that training has copies of",
        # Those that training alone contradicts: not the suspects of the list, which come of all labels.
        "without_suspects": f"without each fold's suspects (about {out})"
        if folds
        else f"and without {out} suspect{'s' * (score.left_out != 1)} of training",
    }[score.terms]


def _sentences(found: Found) -> Iterator[str]:
    names = [printable(name) for name in found.cache.classes]
    for pair in found.overlaps[:_NAMED]:
        yield from _wrapped(f"{names[pair.first]} and {names[pair.second]} may be one class: {pair.reason}")
    for sentence in how_sure(found):
        yield from _wrapped(sentence)
    for sentence in found.notes:
        yield from _wrapped(printable(sentence))
    if found.interrupted:
        yield "  interrupted: what was finished by then is kept"


def how_sure(found: Found) -> Iterator[str]:
    """What is to be known of findings that are opinions."""
    if found.findings.get("label"):
        yield _HALF
        if (agree := _agreement(found)) < _OVERLAP:
            yield (
                f"Heads answer {agree:.0%} of the labels: either classes overlap, and fewer of the suspects are wrong than that half (31% "
                "where it was 77%), or many labels are wrong, and more of them are. The first suspects tell the two apart: labels are "
                "wrong if the pictures are plainly of the classes that are suggested."
            )
    if found.findings.get("outlier") or found.findings.get("off_topic"):
        yield _UNUSUAL


def _agreement(found: Found) -> float:
    """The share of labels that heads give, too, which did not see them."""
    if found.opinions is None or not len(rows := found.opinions.known):
        return 1.0
    return float((found.opinions.probabilities_of(rows).argmax(axis=1) == found.cache.y[rows]).mean())


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")
