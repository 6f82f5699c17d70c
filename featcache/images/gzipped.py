"""A gzip file as if it were not packed: read in order at the speed of zlib, and from anywhere at a bounded cost. In: what opens it.
Out: a file that can be sought in. Memory stays below about 50 MB, whatever the size.

Positions to start from are kept on the way, as in zlib's own example ``zran.c``: the state of the decompressor every so many bytes.
"""

import io
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import BinaryIO

from featcache.errors import RefusedImage
from featcache.images.members import CUT, is_bomb

_CHUNK = 2**16  # packed bytes that are read at a time
_BLOCK = 2**20  # bytes that are unpacked at a time
_BLOCKS = 24  # that are kept: threads ask for neighbours in any order
_STARTS = 128  # positions to start from, at most; about 100 kB each
_GZIP = b"\x1f\x8b"


class _State:
    """Where unpacking stands: ``at`` bytes are unpacked, ``packed`` were read, of which ``waiting`` are still to be looked at."""

    def __init__(self) -> None:
        self.at, self.packed, self.waiting, self.inflater = 0, 0, b"", zlib.decompressobj(31)

    def copy(self) -> "_State":
        other = _State.__new__(_State)
        other.at, other.packed, other.waiting, other.inflater = self.at, self.packed, self.waiting, self.inflater.copy()
        return other


class GzipFile(io.RawIOBase):
    """The content of a gzip file, which ``open_packed`` opens where it is read; a position of its own for each thread.

    Reading raises RefusedImage: damaged, a decompression bomb. ``fault``: why it is to be trusted up to its end at most: it is cut
    off, or something else follows; ``damaged``: nothing of it is to be trusted.
    """

    def __init__(self, open_packed: Callable[[], BinaryIO]) -> None:
        self._open, self._lock, self._local = open_packed, threading.Lock(), threading.local()
        self._state, self._starts, self._spacing = _State(), [_State()], 16 * _BLOCK
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self.fault, self.damaged = "", False

    def seekable(self) -> bool:
        """Yes."""
        return True

    def readable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Nothing is unpacked before something is read. From the start, or from here."""
        self._local.at = offset + (self.tell() if whence == io.SEEK_CUR else 0)
        return self.tell()

    def tell(self) -> int:
        """The position."""
        return int(getattr(self._local, "at", 0))

    def read(self, size: int = -1) -> bytes:
        """So many bytes, or all that there are behind the position."""
        at, parts, left = self.tell(), [], size if size >= 0 else 2**62
        while left:
            with self._lock:
                block = self._block(at // _BLOCK)
            part = block[at % _BLOCK :][:left]
            if not part:
                break
            parts.append(part)
            at, left = at + len(part), left - len(part)
        self._local.at = at
        return b"".join(parts)

    def _block(self, number: int) -> bytes:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        wanted = number * _BLOCK
        if self._state.at > wanted:
            self._state = next(start for start in reversed(self._starts) if start.at <= wanted).copy()
        block = b""
        while self._state.at <= wanted:
            here = self._state.at
            if here % _BLOCK:  # the end
                return b""
            block = self._unpack(_BLOCK)
            self._blocks[here // _BLOCK] = block
            if len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
            if len(block) < _BLOCK:  # the end
                return block if here == wanted else b""
            self._keep_start()
        return block

    def _unpack(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer at the end."""
        try:
            with self._open() as file:
                return self._unpack_on(file, self._state, size)
        except (zlib.error, RefusedImage) as error:
            self._state, self.damaged = self._starts[0].copy(), True
            raise error if isinstance(error, RefusedImage) else RefusedImage(f"damaged: {error}") from error

    def _unpack_on(self, file: BinaryIO, state: _State, left: int) -> bytes:
        parts = []
        while left:
            if len(state.waiting) < len(_GZIP):
                file.seek(state.packed)
                state.waiting += (more := file.read(_CHUNK))
                state.packed += len(more)
            if not state.waiting:
                self.fault = "" if state.inflater.eof else CUT
                break
            if state.inflater.eof:  # another member of the file follows, or nothing of use
                if not state.waiting.startswith(_GZIP):
                    self.fault = "followed by what is not gzip" if state.waiting.strip(b"\0") else ""
                    break
                state.inflater = zlib.decompressobj(31)
            part = state.inflater.decompress(state.waiting, left)
            state.waiting = state.inflater.unused_data if state.inflater.eof else state.inflater.unconsumed_tail
            parts.append(part)
            left, state.at = left - len(part), state.at + len(part)
            if is_bomb(state.at, state.packed):
                raise RefusedImage(f"a decompression bomb: {state.packed} bytes that become more than {state.at}")
        return b"".join(parts)

    def _keep_start(self) -> None:
        """Every ``_spacing`` bytes; if they become too many every second one goes."""
        if self._state.at >= self._starts[-1].at + self._spacing:
            self._starts.append(self._state.copy())
            if len(self._starts) > _STARTS:
                self._starts, self._spacing = self._starts[::2], 2 * self._spacing
