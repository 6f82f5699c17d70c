"""Statistics of a source in a folder: a page to look at, and its numbers. In: ``Statistics``. Out: ``stats.html``, ``stats.json``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.errors import StorageError
from featcache.images.layout import some
from featcache.images.source import AnySource, ImageList, Source
from featcache.system.files import check_output, publish_folder
from featcache.system.path_kinds import typed

if TYPE_CHECKING:
    from featcache.reports.stats import Statistics

PAGE, NUMBERS = "stats.html", "stats.json"
_MARK = '{"kind": "stats", '  # how our numbers begin


def check_folder(folder: Path, source: AnySource | ImageList) -> None:
    """Raise StorageError, before any work, unless ``folder`` may be written: it is new, empty, or holds earlier statistics."""
    check_output(folder, folder_allowed=True)
    root = source.root if isinstance(source, ImageList) else Source.of(source).path
    if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
        raise StorageError(
            f"cannot write {folder}: it lies in {root}, where a folder counts as a class; choose another -o"
        )
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"cannot write {folder}: it is a file, and statistics are a folder; choose another -o")
    if folder.is_dir():
        _check_ours(folder)


def _check_ours(folder: Path) -> None:
    try:
        others = [entry.name for entry in folder.iterdir() if entry.name not in (PAGE, NUMBERS)]
        numbers = folder / NUMBERS
        foreign = numbers.exists() and numbers.open("rb").read(len(_MARK)) != _MARK.encode()
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}; choose another -o") from error
    if others or foreign or ((folder / PAGE).exists() and not numbers.exists()):
        raise StorageError(
            f"cannot write {folder}: it holds other things ({some(others or [NUMBERS if foreign else PAGE])}), which would be "
            f"replaced; choose another -o, such as {typed(folder / 'stats')}"
        )


def write_folder(found: "Statistics", folder: Path) -> None:
    """Write the page and the numbers; both appear at once. Raises StorageError, also where ``check_folder`` would by now."""
    folder = folder.resolve()  # of a link, the folder it leads to is replaced, not the link
    if folder.is_dir():
        _check_ours(folder)
    numbers = _MARK + json.dumps(found.to_json())[1:] + "\n"
    with publish_folder(folder) as temporary:
        (temporary / NUMBERS).write_text(numbers, encoding="ascii")
