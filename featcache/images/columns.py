"""What the columns of a table hold: paths, labels, splits. In: its headers, and those that the user named. Out: their positions.

Nothing here touches the disk. Where two columns may hold one thing, the user is asked.
"""

import difflib
import itertools
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from featcache.errors import SourceError, UsageError
from featcache.images.layout import split_of

log = logging.getLogger("featcache")
NONE = "none"  # instead of a header: there is no such column
# Headers as people write them, small and without what separates words -> what the column holds.
_NAMES = {
    "path": "path paths file files filename filenames filepath imagepath imagefile imagefilename imagefilepath image images img "
    "imgpath imgfile imgname imagename photo photopath photofile photoname picture picturepath picturefile pic",
    "label": "label labels labelname class classes classname classlabel category categoryname species speciesname target "
    "targets breed groundtruth",
    "split": "split splits set subset partition dataset usage isvalid isval istest",
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
_LESS = frozenset(("id", "imageid", "imgid", "photoid", "name", "uri", "src"))  # paths, where no header says so better
_YES, _NO = ("true", "1", "yes"), ("false", "0", "no")
_NO_CLASSES = frozenset(("nan", "na", "n/a", "null", "none", "<na>", "?"))
_MOST = 12  # headers that a message shows


class Columns(NamedTuple):
    """Positions of the columns, None where there is none; ``header``: what each is called, empty without a header."""

    path: int
    label: int | None
    split: int | None
    header: tuple[str, ...] = ()
    group: int | None = None

    @property
    def used(self) -> list[int]:
        """Positions of those that there are."""
        return [column for column in (*self[:3], self.group) if column is not None]

    def said(self, *, hint: bool) -> str:
        """``path from 'filename', label from 'species'; ignored: id``; ``hint``: also how to name a label if there is none."""
        pairs = zip(("path", "label", "split", "group"), (*self[:3], self.group), strict=True)
        titles = {k: repr(name) for k, name in enumerate(self.header)}
        parts = [f"{role} from {titles.get(k, f'column {k + 1}')}" for role, k in pairs if isinstance(k, int)]
        ignored = [name for k, name in enumerate(self.header) if k not in self.used]
        hint = hint and self.label is None and any(map(str.strip, ignored))
        more = " (--label-column NAME takes one for the label)" if hint else ""
        return ", ".join(parts) + (f"; ignored: {shown(ignored)}{more}" if ignored else "")


def known(header: Sequence[str], chosen: Mapping[str, str | None]) -> int:
    """How many of ``header`` are known or were chosen; 0 if there is no column of paths among them."""
    if chosen["path"] is None:
        paths = any(_ROLES.get(_plain(name)) == "path" or _plain(name) in _LESS for name in header)
    else:
        paths = bool(same_header(header, chosen["path"]))
    return sum(_plain(name) in _ROLES for name in header) + 1 if paths else 0


def is_label(key: str) -> bool:
    """Whether a key of a file beside an image says its class."""
    return _ROLES.get(_plain(key)) == "label" or key == "cls"


def find_columns(
    source: str,
    header: Sequence[str],
    chosen: Mapping[str, str | None],
    *,
    hint: str = "",
    unread: Collection[str] = (),
) -> Columns:
    """The columns of the table ``source``.

    Args:
        chosen: path, label, split and group -> the header the user named, ``none`` if there is to be no such column, or None: one
            of the names that people use. What else is chosen is none of these. hint: the header of a column that holds paths, for a
            message. unread: headers of columns that hold no text: paths are in one of them only if in no other.

    Raises:
        UsageError: there is no column of paths; a chosen one is not there; there are several for one thing.
    """
    found = {role: _chosen(source, header, role, name) for role, name in chosen.items() if name is not None}
    taken = {column for column in found.values() if column is not None}
    for role in [role for role in chosen if role not in found]:
        columns = [k for k, name in enumerate(header) if _ROLES.get(_plain(name)) == role]
        if role == "path":
            less = [k for k, name in enumerate(header) if _plain(name) in _LESS]
            readable = ([k for k in each if header[k] not in unread] for each in (columns, less))
            columns = next(filter(None, readable), columns or less)
        if role != "path" or len(columns) > 1:
            columns = [column for column in columns if column not in taken]
        if len(columns) > 1:
            names = [header[column] for column in columns]
            leave_out = "" if role == "path" else f", or --{role}-column {NONE}"
            raise UsageError(
                f"{source}: {shown(map(repr, names))} may each hold the {role}; choose one, as --{role}-column "
                f"{quoted(hint if hint in names else names[-1])}{leave_out}"
            )
        found[role] = columns[0] if columns else None
    used = [column for column in found.values() if column is not None]
    if len(set(used)) < len(used):
        raise UsageError(
            f"{source}: one column cannot be two things, see {_options(chosen)}; it has {shown(map(repr, header))}"
        )
    if found["path"] is None:
        example = quoted(hint or next((name for name in header if name.strip()), "NAME"))
        raise UsageError(
            f"{source} has the columns {shown(map(repr, header))}, none of them known as one of paths (path, file_name, image, "
            f"...); say which is, as --path-column {example}"
        )
    return Columns(found["path"], found["label"], found["split"], tuple(header), found.get("group"))


def without_header(source: str, rows: Iterable[Sequence[str]], files: Sequence[bool]) -> Columns:
    """The columns of a table that has no header: path, path and label, or path, label and split.

    Args:
        rows: its cells. files: for each cell of the first row, whether it names a file.

    Raises:
        UsageError: nothing proves that these are its columns; the message has the header to write.
    """
    are_splits = [not file for file in files]
    for row in itertools.islice(rows, 10_000):
        are_splits = [every and split_of(cell.strip()) > 0 for every, cell in zip(are_splits, row, strict=False)]
    kinds = ["path" if file else "split" if split else "label" for file, split in zip(files, are_splits, strict=False)]
    if kinds in (["path"], ["path", "label"], ["path", "label", "split"]):
        return Columns(0, 1 if len(kinds) > 1 else None, 2 if len(kinds) > 2 else None)
    path = kinds.index("path") if "path" in kinds else 0
    label = next((k for k, kind in enumerate(kinds) if kind == "label" and k > path), None)
    names = ["label" if k == label else f"other{k}" for k in range(len(kinds))]
    for kind in ("split", "path"):
        if kind in kinds:
            names[kinds.index(kind)] = kind
    raise UsageError(
        f"{source} has no header, and nothing proves what its {len(kinds)} columns hold; put a line above it that names them, "
        f"such as {','.join(names[:_MOST])}"
    )


def split_in(header: str, cell: str) -> int | None:
    """The position in ``SPLITS`` that a cell of a split column means; None if it means none of them."""
    text, name = cell.strip().lower(), _plain(header)
    if name.startswith("is") and name in _ROLES and text:  # fastai's is_valid; everything else trains
        return split_of(name[2:]) if text in _YES else split_of("train") if text in _NO else None
    return split_of(text) or (0 if text in ("", "none") else None)


def wrong_type(source: str, column: str, kind: str, role: str = "") -> SourceError:
    """What to say of a column that cannot be read; ``role``: what it was taken for, if it can be done without."""
    instead = f"; name another by --{role}-column, or say --{role}-column {NONE}" if role in ("label", "split") else ""
    return SourceError(
        f"{source}: the column {column!r} is of the type {kind}; expected text or whole numbers{instead}"
    )


def warn_of_no_classes(source: object, labels: Iterable[str | None]) -> None:
    """Say which classes are probably none."""
    if odd := {label for label in labels if label and label.lower() in _NO_CLASSES}:
        log.warning(
            "%s: %s is taken for a class; leave the cell empty where there is no label", source, shown(sorted(odd))
        )


def shown(names: Iterable[str]) -> str:
    """The first few of ``names``, each of a bearable length."""
    names = [name if len(name) <= 60 else f"{name[:57]}..." for name in names]
    blank = len(names) - len(names := [name for name in names if name.strip()])
    parts = [*names[:_MOST], *([f"{len(names) - _MOST} more"] if len(names) > _MOST else [])]
    return ", ".join([*parts, *([f"{blank} without a name"] if blank else [])])


def quoted(name: str) -> str:
    """``name`` as an argument on the command line, in one line."""
    return name if re.fullmatch(r"[\w./-]+", name) else f"'{printable(name[:200])}'"


def printable(text: str) -> str:
    """``text`` without what ends a line or moves the cursor."""
    return "".join(filter(str.isprintable, text))


def _chosen(source: str, header: Sequence[str], role: str, name: str) -> int | None:
    columns = same_header(header, name)
    if len(columns) == 1:
        return columns[0]
    option = f"--{role}-column {quoted(name)}"
    if columns:
        raise UsageError(f"{source} has {len(columns)} columns called {name!r}; rename one, or leave {option} out")
    if name.lower() == NONE and role != "path":
        return None
    near = difflib.get_close_matches(_plain(name), [_plain(each) for each in header[:1000]], 1)
    meant = next((f"; did you mean {quoted(each)}?" for each in header if near and _plain(each) == near[0]), "")
    raise UsageError(f"{source} has no column for {option}; it has {shown(map(repr, header))}{meant}")


def same_header(header: Sequence[str], name: str) -> list[int]:
    """Where it stands: letter by letter, or else in other capitals or with blanks around it."""
    exact = [column for column, each in enumerate(header) if each == name]
    return exact or [column for column, each in enumerate(header) if each.strip().casefold() == name.strip().casefold()]


def _plain(header: str) -> str:
    return re.sub(r"[\s_.\-\"'`#]", "", header).lower()


def _options(chosen: Mapping[str, str | None]) -> str:
    return " ".join(f"--{role}-column {quoted(name)}" for role, name in chosen.items() if name is not None)
