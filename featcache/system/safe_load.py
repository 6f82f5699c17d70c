"""Read files and texts that nobody vouches for: of ``torch.save``, and JSON. Never code, never half of it.

In: a file of ``torch.save``, or a JSON text. Out: tensors and plain values. PyTorch ignores the checksums that it writes, so that a
flipped bit would become a weight like any other; here they are compared first. No other file unpickles anything.
"""

import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

_FOLDER = 0x10  # among an entry's attributes
_MAX_DEPTH = 32  # of nested JSON; ours has four levels
_COLOURS = re.compile(r"\x1b\[[\d;]*m")  # PyTorch's messages have some
_REFUSED_TYPE = re.compile(r"GLOBAL ([\w.]+)")  # in the message of PyTorch's ``weights_only`` reader


class DamagedFile(Exception):  # noqa: N818 - whoever knows what the file is for makes an error of it
    """The file is not, or no longer, what ``torch.save`` writes; ``str()`` says why."""


class ForeignFile(DamagedFile):
    """It holds what only its own code can read; ``str()`` says of which type."""


def load_tensors(path: Path) -> Any:
    """Read a file of ``torch.save``: what it was given, on the CPU.

    Raises:
        DamagedFile: a checksum differs; it is no file of ``torch.save``, or claims to be larger than it is.
        ForeignFile: it holds more than tensors and plain values.
        OSError: the system cannot read it.
    """
    import torch

    with path.open("rb") as file:
        try:
            if zipfile.is_zipfile(file):
                _check_archive(file, path.stat().st_size)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except (DamagedFile, OSError):
            raise
        except Exception as error:  # pickle and zip each have their own, dozens in all
            text = _COLOURS.sub("", str(error))
            if kind := _REFUSED_TYPE.search(text):
                raise ForeignFile(f"it holds a {kind[1][:100]}") from error
            raise DamagedFile(f"{type(error).__name__}: {' '.join(text.split())[:200]}") from error


def parse_json(text: str) -> dict[str, Any]:
    """Read one JSON object. Raises ValueError: no JSON, no object, a key twice, NaN or infinity, or nested beyond reason."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is no JSON number")
        return value

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    level = [found]
    for _ in range(_MAX_DEPTH):
        level = [entry for value in level if isinstance(value, dict | list) for entry in _entries(value)]
    if level:
        raise ValueError("nested too deep")
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    return found


def _check_archive(file: Any, size: int) -> None:
    """Check what PyTorch takes on trust: the archive's names, sizes and checksums. Raises DamagedFile."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        kinds = {entry.filename.rpartition("/")[2] for entry in entries}
        if "constants.pkl" in kinds:
            raise ForeignFile("it holds a TorchScript program")
        if "archive_format" in kinds:
            raise DamagedFile("it holds a torch.export program, whose table is torch.export.load(...).state_dict")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise DamagedFile("it is a compressed archive, which torch.save does not write")
        if any(entry.external_attr & _FOLDER or entry.is_dir() for entry in entries):
            raise DamagedFile("its archive holds a folder, for which PyTorch would return memory that nobody wrote")
        if sum(entry.file_size for entry in entries) > size:
            raise DamagedFile("its archive claims to hold more bytes than the file has")
        if len({entry.filename for entry in entries}) < len(entries):
            raise DamagedFile("its archive holds one name twice")
        try:
            bad = archive.testzip()
        except Exception as error:
            raise DamagedFile(f"its archive is broken ({error})") from error
        if bad is not None:
            raise DamagedFile(f"checksum mismatch in {bad}")


def _entries(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value
