"""Addresses among paths: ``s3://bucket/key`` as typed, as kept, and as shown to anybody. In: a path. Out: text, or a path.

Nothing is asked of any place. As a ``Path`` an address has one slash left of two. What may be a secret in it is kept in this process alone.
"""

import itertools
import os
import re
from pathlib import Path

AnyPath = str | os.PathLike[str]  # an open cache and a loaded model are paths, too
_ADDRESS = re.compile(r"(https?|s3|gs|gcs|hf|ftp|file):/+(.+)", re.IGNORECASE)  # a Path has one slash left of two
_PLACE = re.compile(r"(?:[^:\[\]]*|\[[\da-fA-F:.]+\])(?::\d*)?")  # host and port
_typed_addresses: dict[str, str] = {}  # as kept -> as typed


def parse(path: AnyPath) -> re.Match[str] | None:
    """Scheme and rest, if ``path`` is of the form of an address."""
    return _ADDRESS.fullmatch(path if isinstance(path, str) and "//" in path else Path(path).as_posix())


def address_of(path: AnyPath) -> str | None:
    """The address that ``path`` is, with both slashes and all that was typed, unless something here is called so; else None."""
    if (found := parse(path)) is None or os.path.lexists(path):
        return None
    return _typed_addresses.get(str(Path(path)), f"{found[1].lower()}://{found[2]}")


def shown(path: AnyPath) -> str:
    """``path``; of an address without user, password and what follows a ``?`` or ``#``: what may be shown to anybody."""
    if (found := parse(path)) is None:
        return str(path)
    scheme, rest = found[1], found[2]
    if scheme.lower() == "file":
        return f"{scheme}:///{rest}"
    place = re.split(r"[/?#]", rest)[0]
    if "@" in place:
        rest = rest[place.rindex("@") + 1 :]
    elif not _PLACE.fullmatch(place):  # a password with a / or ? in it
        rest = rest.rpartition("@")[2]
    return f"{scheme}://" + (
        rest if scheme.lower() in ("s3", "gs", "gcs") else re.sub(r"[?#].*", "", rest, flags=re.DOTALL)
    )


def typed_below(root: Path) -> dict[str, str]:
    """What was typed of ``root`` and of addresses below it, secrets included: for ``know`` in a process that works for this one."""
    below = f"{root}{os.sep}"
    return {key: typed for key, typed in _typed_addresses.items() if key == str(root) or key.startswith(below)}


def know(typed: dict[str, str]) -> None:
    """Take over what another process had typed."""
    _typed_addresses.update(typed)


def without_secrets(path: AnyPath) -> Path:
    """An address as ``shown``, which ``address_of`` knows the rest of, in this process: it gets into no message and no file.

    Another address that is shown alike gets a number before the place where it lies.
    """
    if (found := parse(path)) is None or str(path) in _typed_addresses:
        return Path(path)
    whole, (scheme, rest) = f"{found[1].lower()}://{found[2].rstrip('/')}", shown(path).split("://", 1)
    for number in itertools.count(1):
        key = str(Path(f"{scheme}://{rest}" if number == 1 else f"{scheme}://{number}@{rest}"))
        if _typed_addresses.setdefault(key, whole) == whole:
            break
    return Path(key)
