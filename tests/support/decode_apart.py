"""Decode files in a process of their own, so that a crash, a hang or a hunger for memory is one file's result.

In, on stdin: a pickled list of files' bytes (or paths, read here), seconds and bytes allowed. Out, on stdout: one pickled
``Outcome`` per file, as it is known; no more after the file that ended the process. Anything on stderr is a leak, but for
what libtiff prints itself.
"""

import contextlib
import dataclasses
import faulthandler
import io
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_HUGE = 4_000_000  # pixels of which only the shape is sent back


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a file: pixels (None if refused, or huge), reason, whether both decoders agree, seconds, peak MB."""

    shape: tuple[int, ...] | None
    pixels: np.ndarray | None
    reason: str
    agrees: bool
    seconds: float
    megabytes: int


def decode_apart(
    files: Sequence[bytes | Path], *, seconds: float = 20, megabytes: int = 4000
) -> tuple[list[Outcome], str]:
    """The outcomes, fewer than files if the process died; and what it wrote to stderr."""
    process = subprocess.run(
        [sys.executable, "-W", "error", __file__],
        input=pickle.dumps((list(files), seconds, megabytes)),
        capture_output=True,
        timeout=60 + seconds * len(files),
    )
    stream, outcomes = io.BytesIO(process.stdout), []
    while stream.tell() < len(process.stdout):
        outcomes.append(pickle.load(stream))
    return outcomes, process.stderr.decode(errors="replace")


def _limit(megabytes: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system has such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


def _peak() -> int:
    """MB; 0 where the system does not say. Not getrusage's, which begins with what the parent had when it forked."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), 0)
    return 0


def _decode(data: bytes) -> tuple[np.ndarray | None, str, bool]:
    from featcache.errors import RefusedImage
    from featcache.images import decode as decoders

    results: list[tuple[np.ndarray | None, str]] = []
    for way in (decoders.decode_pixels, lambda content: np.asarray(decoders.decode(content))):
        try:
            results.append((way(data), ""))
        except RefusedImage as reason:
            results.append((None, str(reason)))
    (pixels, reason), (others, other_reason) = results
    same = reason == other_reason and (others is None if pixels is None else np.array_equal(pixels, others))
    return pixels, reason, same


def main() -> None:
    """Decode what stdin holds."""
    from featcache.images.decode import strict_decoding

    # It was made a moment ago, by the process that waits for us.
    files, seconds, megabytes = pickle.loads(sys.stdin.buffer.read())
    _limit(megabytes)
    with strict_decoding():
        for file in files:
            data = file if isinstance(file, bytes) else file.read_bytes()
            faulthandler.dump_traceback_later(seconds, exit=True)
            started = time.perf_counter()
            pixels, reason, agrees = _decode(data)
            took = time.perf_counter() - started
            faulthandler.cancel_dump_traceback_later()
            shape = None if pixels is None else pixels.shape
            sent = None if pixels is None or pixels.size > 3 * _HUGE else pixels
            pickle.dump(Outcome(shape, sent, reason, agrees, took, _peak()), sys.stdout.buffer)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.modules["decode_apart"] = sys.modules["__main__"]  # so that outcomes are pickled under the importer's name
    Outcome.__module__ = "decode_apart"
    main()
