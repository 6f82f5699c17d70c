"""Labels of a folder's images from a table inside of it. In: the folder's ``Listing``. Out: the same, relabelled.

``metadata.csv`` or ``metadata.jsonl`` as in Hugging Face's ImageFolder: it may lie in any folder, and names images of that folder,
or below it. With a column of labels it decides them; without one the folders do. An image that it does not name is kept, without a
label: none is passed over in silence, and none trains under a label that nobody gave it.
"""

import bisect
import logging
import os
import posixpath
from collections.abc import Mapping
from typing import NamedTuple

from featcache.errors import FeatcacheError, Refusal, RefusedImage, SourceError
from featcache.images.columns import NONE, quoted
from featcache.images.folders import Entry, Listing
from featcache.images.layout import some
from featcache.images.tables import Files, entries, read_columns
from featcache.system.display import quantity

log = logging.getLogger("featcache")


class _Described(NamedTuple):
    """What the tables say: path -> its entry; whether of labels, splits, groups; what they name that is refused; a column."""

    entries: dict[str, Entry]
    labels: bool
    splits: bool
    groups: bool
    refused: list[Refusal]
    column: str


def describe(listing: Listing, chosen: Mapping[str, str | None]) -> Listing:
    """``listing`` with the labels and splits of its metadata, and the files that only these name.

    Raises:
        SourceError: folders and metadata both say what the classes, or the splits, are, and not the same. UsageError, SourceError:
        the tables cannot be read as the options say.
    """
    found = _read(listing, chosen)
    if found is None or not (found.labels or found.splits or found.groups):
        return listing
    known = {entry.path for entry in listing.entries}
    unlisted = [entry for path, entry in found.entries.items() if path not in known]
    every = sorted([*listing.entries, *unlisted], key=lambda entry: entry.path)
    if found.labels and chosen["label"] is None:
        _check_labels(listing, found)
    merged = [_merged(listing, entry, found) for entry in every]
    if found.labels and (bare := [entry.path for entry in every if entry.path not in found.entries]):
        log.warning(
            "%s: %s without a label, which no metadata names (%s)",
            listing.root,
            quantity(len(bare), "image"),
            some(bare),
        )
    refused = sorted({*listing.refused, *found.refused})
    at = [bisect.bisect(merged, refusal.path, key=lambda entry: entry.path) for refusal in refused]
    return listing._replace(
        entries=merged, classes=set() if found.labels else listing.classes, refused=refused, refused_at=at
    )


def _read(listing: Listing, chosen: Mapping[str, str | None]) -> _Described | None:
    """All tables of the folder; None, and a note, if they name no image of it."""
    found: dict[str, Entry] = {}
    refused: list[Refusal] = []
    labels, splits, groups, column = set[bool](), set[bool](), set[bool](), ""
    known = {entry.path: entry for entry in listing.entries}
    for name in listing.metadata:
        folder, path = posixpath.dirname(name), listing.root / name
        files = Files(path.parent)
        try:
            table, columns = read_columns(path, files, chosen)
            if not table.header:
                raise SourceError(f"{table.name} has no header; expected one with file_name")
        except FeatcacheError as error:
            if any(chosen.values()):
                raise
            log.warning("%s is not read: %s", path, error)
            continue
        log.info("%s: %s", table.name, columns.said(hint=chosen["label"] is None))
        labels.add(columns.label is not None)
        splits.add(columns.split is not None)
        groups.add(columns.group is not None)
        column = column or (columns.header[columns.label] if columns.label is not None else "")
        for entry, where in entries(table, columns):
            try:
                entry = _found(entry, folder, known, files)
            except RefusedImage as reason:
                refused.append(Refusal(posixpath.join(folder, entry.path), str(reason)))
                continue
            if found.setdefault(entry.path, entry) != entry:
                raise SourceError(f"{where}: {entry.path} is named twice, with different labels, splits or groups")
    if not any(entry.size >= 0 for entry in found.values()):
        if labels:
            log.warning("%s: no image is named by %s, which is not used", listing.root, some(listing.metadata))
        return None
    return _Described(found, any(labels), any(splits), any(groups), refused, column)


def _found(entry: Entry, folder: str, known: Mapping[str, Entry], files: Files) -> Entry:
    """The entry under its path below the source. Raises RefusedImage: it lies outside of the metadata's folder."""
    path = posixpath.normpath(posixpath.join(folder, entry.path.replace(os.sep, "/")))
    if path.startswith(f"{folder}/" if folder else "") and (there := known.get(path)):
        return there._replace(label=entry.label, split=entry.split, group=entry.group)
    resolved = files.resolved(entry)
    path = posixpath.join(folder, resolved.path)
    there = known.get(path, resolved)
    return resolved._replace(path=path, size=there.size, mtime=there.mtime)


def _check_labels(listing: Listing, found: _Described) -> None:
    """Raise SourceError if folders name classes, too, and other ones."""
    nothing = Entry("", -1, -1)
    pairs = {(entry.label, found.entries.get(entry.path, nothing).label) for entry in listing.entries if entry.label}
    odd = sorted((str(one), other or "") for one, other in pairs if one != other)
    if len({one for one, _ in pairs}) > 1 and odd:
        raise SourceError(
            f"{listing.root} can be read in two ways: a folder is called {odd[0][0]} where the metadata says "
            f"{odd[0][1] or 'nothing'}; say --label-column {quoted(found.column)} to take the metadata's classes, --label-column "
            f"{NONE} to take the folders'"
        )


def _merged(listing: Listing, entry: Entry, found: _Described) -> Entry:
    named = found.entries.get(entry.path)
    entry = entry._replace(group=named.group if named else "")
    if found.labels:
        entry = entry._replace(label=named.label if named else None)
    if found.splits and named and named.split:
        if entry.split not in (0, named.split):
            raise SourceError(
                f"{listing.root}: {entry.path} lies in the folder of one split, and its metadata names another; "
                f"--split-column {NONE} leaves the metadata's out"
            )
        entry = entry._replace(split=named.split)
    return entry
