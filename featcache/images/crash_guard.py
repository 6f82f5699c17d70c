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
from featcache.system.supervisor import notes, signal_name

_CRASHED, _ENDLESS = "its decoder crashed", "its decoder comes to no end"
FATAL = (_CRASHED, _ENDLESS)  # how the reasons begin


@contextlib.contextmanager
def decoding(data: bytes, program: Sequence[str], *, suspect: bool = False) -> Iterator[None]:
    """Note ``data``, a file, while it is decoded inside of this context.

    If it is ``suspect``, or a worker crashed on what looks like it, it is first tried apart: by ``program``, Python's
    arguments for a program that decodes what it finds on stdin. Raises RefusedImage if that crashes or does not end.
    """
    # It tells this content from others, well enough: whatever is suspected wrongly is only tried apart.
    key = (len(data) << 32 | zlib.crc32(data[-4096:], zlib.crc32(data[:4096]))) & (2**64 - 1) or 1
    if suspect or key in notes.suspects:
        try_apart(data, program)
    notes.write(key)
    try:
        yield
    finally:
        notes.write(0)


def try_apart(data: bytes, program: Sequence[str], *, patience: float = 120.0) -> None:
    """Decode ``data`` in a process of its own. Raises RefusedImage if it crashes, or is not done in ``patience`` seconds."""
    # It imports from where this process does, never from the user's working folder.
    command, environment = [sys.executable, "-P", *program], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=patience, check=False, env=environment)
        reason = f"{_CRASHED} ({signal_name(-done.returncode)})" if done.returncode < 0 else ""
    except subprocess.TimeoutExpired:
        reason = f"{_ENDLESS}, {patience:g} s were not enough"
    if reason:
        notes.shared.crashed_images += 1
        raise RefusedImage(reason)
