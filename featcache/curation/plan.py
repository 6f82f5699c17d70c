"""``plan.csv``: what to do with each image of a cache, edited on the page or by hand; and the table that follows from it.

The file holds every image, so that neither the cache nor anything else is needed to apply it. A row without a decision is kept.
Before anything is written, all that is wrong with a plan is found. Images are only read.
"""

import dataclasses
import difflib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from featcache.cache.cache import FeatureCache
from featcache.curation.finding import KINDS, Finding
from featcache.errors import FeatcacheError, RefusedImage, SourceError, UsageError
from featcache.images.archives import is_home
from featcache.images.columns import split_in
from featcache.images.folders import Entry
from featcache.images.home import find_home, places_in, some_of
from featcache.images.layout import split_of
from featcache.images.read import Paths, read_images
from featcache.images.records import as_text, csv_line, read_table, without_escape
from featcache.images.tables import Files
from featcache.spec import SPLITS
from featcache.system.display import printable
from featcache.system.files import check_may_replace, check_output, publish_file
from featcache.system.path_advice import missing

# The first four are the contract; then the image's split, its label as the cache has it, and the kinds of findings about it.
COLUMNS = ("path", "sha256", "decision", "label", "split", "given", "found")
DECISIONS = (
    "keep",
    "drop",
    "relabel",
)  # ``label`` is the label to have: of ``relabel`` the new one, else the given one
_NEEDED = COLUMNS[:4]


def plan_lines(cache: FeatureCache, findings: Iterable[Finding]) -> Iterator[bytes]:
    """The plan without any decision, as lines of a CSV: a header, and each image of the cache in its order."""
    kinds: defaultdict[int, set[str]] = defaultdict(set)
    for finding in findings:
        kinds[finding.row].add(finding.kind)
    yield csv_line(COLUMNS)
    labels = [cache.classes[label] if label >= 0 else "" for label in cache.y.tolist()]
    splits = [SPLITS[split] if split else "" for split in cache.rows.splits.tolist()]
    for row, (path, label, split) in enumerate(zip(cache.paths, labels, splits, strict=True)):
        found = ";".join(kind for kind in KINDS if kind in kinds.get(row, ()))
        yield csv_line([path, cache.rows.digests[row].tobytes().hex(), "", label, split, label, found])


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a plan, as written: ``number`` of the line, from 1; ``given`` is None without such a column."""

    number: int
    path: str
    sha256: str
    decision: str
    label: str
    split: str
    given: str | None


@dataclasses.dataclass(frozen=True)
class Applied:
    """What became of a plan.

    Attributes:
        output: the table. root: the folder of its images; None: not found, so that no file was looked at.
        images: rows of the table. kept, dropped, relabelled: of the plan; kept are also those without a decision.
        classes, splits: of the table, each with its images.
    """

    output: Path
    root: Path | None
    images: int
    kept: int
    dropped: int
    relabelled: int
    classes: dict[str, int]
    splits: dict[str, int]


def apply_plan(
    plan: Path,
    output: Path,
    *,
    root: Path | None = None,
    overwrite: bool = False,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Applied:
    """Write the table of the images that a plan keeps: ``path,label`` and, if there are any, ``split``; a source for ``extract``.

    Args:
        plan: a ``plan.csv``. output: a .csv. root: what its paths are relative to; looked for beside the plan and in the
            working folder when None. overwrite: replace ``output`` if it is there. progress: called with files compared and
            to compare.

    Raises:
        SourceError: it is no plan, or not consistent; ``facts["problems"]`` are all that was found. Nothing is written then.
        UsageError: ``output`` exists, or is no .csv. StorageError: it cannot be written.
    """
    _check_output(plan, output, overwrite=overwrite)
    if root is not None and not is_home(root):
        raise SourceError(f"--root {root} is no folder; give the folder that holds the images")
    lines = read_plan(plan, root)
    root = _home(plan, lines) if root is None else root
    problems = [*_problems(lines), *(_problems_of_files(lines, root, workers, progress) if root is not None else ())]
    problems.sort(key=lambda problem: problem[0])
    if problems:
        said = [f"line {number}: {printable(text)}" for number, text in problems]
        more = f"; and {len(said) - 3} more" if len(said) > 3 else ""
        raise SourceError(
            f"{plan} has {len(said)} problem{'s' * (len(said) > 1)}, and nothing is written: {'; '.join(said[:3])}{more}",
            facts={"problems": said},
        )
    kept = [line for line in lines if line.decision != "drop"]
    if not kept:
        raise SourceError(f"{plan} drops every image, and nothing is written; keep some")
    _write(output, kept)
    counts, splits = (
        Counter(line.label for line in kept if line.label),
        Counter(line.split for line in kept if line.split),
    )
    relabelled = sum(line.decision == "relabel" for line in kept)
    return Applied(
        output=output,
        root=root,
        images=len(kept),
        kept=len(kept) - relabelled,
        dropped=len(lines) - len(kept),
        relabelled=relabelled,
        classes=dict(sorted(counts.items())),
        splits={split: splits[split] for split in SPLITS if split in splits},
    )


def _check_output(plan: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a table that cannot or must not be written."""
    if output.suffix.lower() != ".csv":
        raise UsageError(f"the table of a plan is a CSV; name it .csv, found {output}")
    check_output(output)
    if output.exists() and plan.exists() and output.samefile(plan):
        raise UsageError(f"{output} is the plan, and would be replaced; choose another -o")
    check_may_replace(output, "--overwrite", given=overwrite)


def _is_plan(path: Path) -> bool:
    try:
        header = read_table(path, lambda _: False, {"path": None, "label": None, "split": None}).header
    except (FeatcacheError, OSError):
        return False
    return {*_NEEDED} <= {name.strip().lower() for name in header}


def read_plan(plan: Path, root: Path | None = None) -> list[Line]:
    """The lines of a plan, also as a spreadsheet saves it: other separators, encodings and orders of columns.

    Without a column of splits they are those that the folders say. Raises SourceError: missing, or no plan.
    """
    if not plan.exists():
        raise SourceError(
            missing(plan, "`featcache audit features.h5 -o audit` writes audit/plan.csv", wanted=_is_plan)
        )
    folders = [Files(place) for place in (_places(plan) if root is None else [root])]

    def is_file(cell: str) -> bool:  # only asked of names that are not UTF-8
        return any(files.has(cell) for files in folders)

    table = read_table(plan, is_file, {"path": None, "label": None, "split": None})
    header = [name.strip().lower() for name in table.header]
    if absent := [name for name in _NEEDED if name not in header]:
        raise SourceError(
            f"{plan} is no plan: it has no column {' and no column '.join(absent)}; expected the header {','.join(COLUMNS)}"
        )
    places = [header.index(name) if name in header else None for name in COLUMNS]
    lines: list[Line] = []
    written = dict[str, str]()  # class -> as the cache has it
    for cells, where in table.rows():
        texts = [None if place is None else without_escape(as_text(cells[place], where)) for place in places]
        path, sha256, decision, label, split, given = ("" if text is None else text for text in texts[:6])
        number = int(where.rpartition(" ")[2]) if where.rpartition(" ")[2].isdecimal() else len(lines) + 2
        known = given.strip() if texts[5] is not None else None
        if written.setdefault(given.strip(), given) != given:
            raise SourceError(
                f"{where}: the class {printable(given)!r} and another differ in blanks around them alone, which do not count in a table; "
                "rename one"
            )
        lines.append(Line(number, path, sha256.strip().lower(), decision.strip().lower(), label.strip(), split, known))
    if not lines:
        raise SourceError(f"{plan} holds no image; expected a line for each below its header")
    return _with_splits(lines, written=places[4] is not None)


def _with_splits(lines: Sequence[Line], *, written: bool) -> list[Line]:
    """Splits under their own names; where no column says any, by the top folder if that names one everywhere."""
    if written:
        names = [split_in("split", line.split) for line in lines]
        named = [line.split.strip() if name is None else SPLITS[name] for line, name in zip(lines, names, strict=True)]
        named = ["" if name == "none" else name for name in named]
    else:
        tops = [split_of(line.path.partition("/")[0]) for line in lines]
        named = [SPLITS[top] for top in tops] if all(tops) else [""] * len(lines)
    return [dataclasses.replace(line, split=split) for line, split in zip(lines, named, strict=True)]


def _home(plan: Path, lines: Sequence[Line]) -> Path | None:
    """The folder of the images, if it lies where it probably does."""
    whole = [line for line in lines if _is_digest(line.sha256)]
    images = [(whole[k].path, bytes.fromhex(whole[k].sha256)) for k in some_of(len(whole))]
    return find_home(images, _places(plan)) if images else None


def _places(plan: Path) -> list[Path]:
    """Where the images of a plan may lie: in the working folder, beside the plan, beside the plan's folder."""
    return places_in(Path(), plan.parent, plan.resolve().parent.parent)


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(character in "0123456789abcdef" for character in text)


def _problems(lines: Sequence[Line]) -> Iterator[tuple[int, str]]:
    """What is wrong by itself: the number of the line, and a sentence."""
    labels = (
        line.label if line.given is None else line.given for line in lines if line.given or line.decision != "relabel"
    )
    classes = {*labels} - {""}
    first: dict[str, int] = {}
    for line in lines:
        number = line.number
        if not line.path.strip():
            yield number, "it has no path"
        elif (before := first.setdefault(line.path, number)) != number:
            yield number, f"{line.path} is there twice, first in line {before}"
        if line.decision not in ("", *DECISIONS):
            near = _near(line.decision, DECISIONS)
            yield number, f"the decision {line.decision!r} is unknown{near}; expected keep, drop, relabel or nothing"
        if line.split and line.split not in SPLITS:
            yield number, f"the split {line.split!r} is unknown; expected train, val, test or nothing"
        if not _is_digest(line.sha256):
            yield number, f"{line.sha256[:80]!r} is no sha256; expected 64 hexadecimal digits"
        if line.decision == "relabel" and line.label in ("", line.given):
            yield number, f"relabel needs another label{f' than the given {line.given!r}' if line.given else ''}"
        elif line.label not in {"", *classes} and classes and line.decision != "drop":
            yield number, f"the label {line.label!r} is no class of the plan{_near(line.label, classes)}"
        elif line.decision in ("", "keep") and line.given is not None and line.label != line.given:
            yield (
                number,
                f"the label {line.label!r} is not the given {line.given!r}; to change it the decision is relabel",
            )


def _near(text: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(text, list(known), 1)
    return f" (did you mean {found[0]}?)" if found else ""


def _problems_of_files(
    lines: Sequence[Line], root: Path, workers: int, progress: Callable[[int, int], None]
) -> Iterator[tuple[int, str]]:
    """What does not agree with the images, which are read."""
    files, there = Files(root), dict[int, str]()
    for place, line in enumerate(lines):
        if not line.path.strip():
            continue
        try:
            found = files.resolved(Entry(line.path, -1, -1))
        except RefusedImage as reason:
            yield line.number, f"{line.path} {reason}"
            continue
        if found.size >= 0:
            there[place] = found.path
        else:
            yield line.number, f"{line.path} is not there, below {root}"
    places = list(there)
    for read in read_images(Paths(root, tuple(there.values())), range(len(there)), len, workers=workers):
        line, now = lines[places[read.position]], read.digest.hex()
        progress(read.position + 1, len(there))
        if not now:
            yield line.number, f"{line.path} cannot be compared: {read.reason}"
        elif _is_digest(line.sha256) and now != line.sha256:
            yield (
                line.number,
                f"{line.path} is another file by now: its sha256 begins with {now[:8]}, not {line.sha256[:8]}",
            )


def _write(output: Path, lines: Sequence[Line]) -> None:
    """A table of those that are kept; in it without splits and labels where there are none."""
    names = ["path", *(["label"] if any(line.label for line in lines) else [])]
    names += ["split"] if any(line.split for line in lines) else []
    with publish_file(output) as file:
        file.write(csv_line(names))
        for line in lines:
            file.write(csv_line([getattr(line, name) for name in names]))
