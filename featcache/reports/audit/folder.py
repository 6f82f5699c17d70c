"""The folder of an audit: audit.csv, audit.html, plan.csv and audit.json. In: what was found. Out: the files, all at once.

An earlier audit is replaced; a plan.csv that somebody has edited since stays what it is, and the new plan is written beside it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from featcache.errors import StorageError
from featcache.images.layout import some
from featcache.images.records import csv_line
from featcache.system.files import check_is_folder, publish_folder
from featcache.system.path_advice import typed
from featcache.system.safe_load import parse_json

ROWS, PAGE, FACTS = "audit.csv", "audit.html", "audit.json"
COLUMNS = ("path", "label", "split", "kind", "score", "group", "verified", "other_path", "suggested_label")
_MARK = '{"kind": "audit", '  # how our facts begin
_PLAN = re.compile(r"plan(\.new\d*)?\.csv")
_MOST_FACTS = 2**26  # bytes


def check_folder(folder: Path) -> None:
    """Raise StorageError, before any work, unless ``folder`` may be written: it is new, empty, or holds an earlier audit."""
    check_is_folder(folder, "an audit is", "a page and tables")
    if folder.is_dir():
        _check_ours(folder)


def _check_ours(folder: Path) -> None:
    try:
        names = [entry.name for entry in folder.iterdir()]
        others = [name for name in names if not (name in (ROWS, PAGE, FACTS) or _PLAN.fullmatch(name))]
        others += [name for name in names if name not in others and not _is_file(folder / name)]
        ours = not names or _is_ours(folder / FACTS)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}; choose another -o") from error
    if others or not ours:
        raise StorageError(
            f"cannot write {folder}: it holds other things ({some(others or names)}), which would be replaced; choose another "
            f"-o, such as {typed(folder / 'audit')}"
        )


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_ours(facts: Path) -> bool:
    if not _is_file(facts):
        return False
    with facts.open("rb") as file:
        return file.read(len(_MARK)) == _MARK.encode()


def write_folder(
    folder: Path, *, rows: Iterable[dict[str, Any]], page: str, plan: Iterable[bytes], facts: dict[str, Any]
) -> str:
    """Write the files; they appear at once. Returns the name of the plan: another than plan.csv where that was edited.

    Args:
        rows: of audit.csv, ``COLUMNS`` at least. page: HTML. plan: lines, ``curation.plan.plan_lines``. facts: JSON values.

    Raises:
        StorageError: it cannot be written, also where ``check_folder`` would say so by now.
    """
    if folder.is_dir():
        _check_ours(folder)
    edited = _edited_plans(folder)
    name = next(name for name in _plan_names() if name not in edited)
    with publish_folder(folder) as temporary:
        for kept, content in edited.items():
            (temporary / kept).write_bytes(content)
        with (temporary / ROWS).open("wb") as file:
            file.write(csv_line(COLUMNS))
            file.writelines(csv_line([_cell(row[column]) for column in COLUMNS]) for row in rows)
        digest = hashlib.sha256()
        with (temporary / name).open("wb") as file:
            for line in plan:
                file.write(line)
                digest.update(line)
        (temporary / PAGE).write_bytes(page.encode("utf-8", "backslashreplace"))
        text = _MARK + json.dumps({"plan_sha256": digest.hexdigest(), **facts}, default=str)[1:] + "\n"
        (temporary / FACTS).write_text(text, encoding="ascii")
    return name


def _cell(value: Any) -> Any:
    """Yes and no as a program writes them, nothing as nothing."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value


def _plan_names() -> Iterator[str]:
    yield from ("plan.csv", "plan.new.csv")
    number = 2
    while True:
        yield f"plan.new{number}.csv"
        number += 1


def _edited_plans(folder: Path) -> dict[str, bytes]:
    """Name and content of each plan of an earlier audit that is not as it was written: somebody has worked on it."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return {}
    with (folder / FACTS).open("rb") as file:
        try:
            written = str(parse_json(file.read(_MOST_FACTS).decode()).get("plan_sha256"))
        except ValueError:  # damaged: then nothing is thrown away
            written = ""
    plans = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if _PLAN.fullmatch(path.name)}
    return {name: content for name, content in plans.items() if hashlib.sha256(content).hexdigest() != written}
