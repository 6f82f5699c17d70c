"""Refuse an image whose decoder crashes, so that it does not end the run.

In: the bytes of an image that is about to be decoded. Out: a note of it for the process that waits. If a worker crashed while
such an image was noted, it is first tried in a process of its own, and refused if it crashes that one. An image costs a
few microseconds this way; to decode each in another process would cost copying its pixels.
"""

import contextlib
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence

from featcache.errors import RefusedImage
from featcache.system.supervisor import Notes, current_notes, signal_name

_CRASHED, _ENDLESS = "its decoder crashed", "its decoder comes to no end"
FATAL = (_CRASHED, _ENDLESS)  # how the reasons begin


@contextlib.contextmanager
def decoding(
    data: bytes, program: Sequence[str], *, suspect: bool = False, notes: Notes | None = None
) -> Iterator[None]:
    """Note ``data`` while it is decoded inside of this context. Try it apart first if a worker crashed on what looks like it.

    Args:
        data: the file.
        program: Python's arguments for a program that decodes what it finds on stdin.
        suspect: try it apart in any case.
        notes: of the process that waits; ``current_notes()`` when None.

    Raises:
        RefusedImage: it crashes the process in which it is tried, or does not end there.
    """
    notes, key = notes or current_notes(), _key(data)
    if suspect or (notes and key in notes.suspects):
        try_apart(data, program, notes=notes)
    if notes is None:
        yield
        return
    notes.write(key)
    try:
        yield
    finally:
        notes.write(0)


def try_apart(data: bytes, program: Sequence[str], *, notes: Notes | None = None, patience: float = 120.0) -> None:
    """Decode ``data`` in a process of its own. Raises RefusedImage if that crashes, or takes longer than ``patience`` (s)."""
    # It imports from where this process does, never from the user's working folder.
    command, environment = [sys.executable, "-P", *program], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        code = subprocess.run(
            command, input=data, capture_output=True, timeout=patience, check=False, env=environment
        ).returncode
        reason = f"{_CRASHED} ({signal_name(-code)})" if code < 0 else ""
    except subprocess.TimeoutExpired:
        reason = f"{_ENDLESS}, {patience:g} s were not enough"
    if reason:
        if notes:
            notes.shared.crashed_images += 1
        raise RefusedImage(reason)


def _key(data: bytes) -> int:
    """Return what tells this content from others, well enough: whatever is suspected wrongly is only tried apart."""
    return (len(data) << 32 | zlib.crc32(data[-4096:], zlib.crc32(data[:4096]))) & (2**64 - 1) or 1
