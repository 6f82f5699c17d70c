"""An in-memory file that stores only what is written to it, so that a layout with a large hole costs no memory."""

import io
import os
from collections.abc import Iterator
from typing import Any

_PAGE = 4096


class SparseFile(io.RawIOBase):
    """A binary file for h5py's file-object driver; what was never written reads as zeros."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._position = 0
        self.size = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to ``offset``, counted as ``whence`` says; returns the position."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        return self._position

    def write(self, data: Any) -> int:
        """Write all of ``data`` at the position; returns its length."""
        view = memoryview(data).cast("B")
        for page, start, stop, done in self._spans(len(view)):
            self._pages.setdefault(page, bytearray(_PAGE))[start:stop] = view[done : done + stop - start]
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from the position on; returns its length."""
        view = memoryview(buffer).cast("B")
        for page, start, stop, done in self._spans(len(view)):
            view[done : done + stop - start] = self._pages.get(page, bytes(_PAGE))[start:stop]
        self._position += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the length of the file, in bytes."""
        self.size = self._position if size is None else size
        return self.size

    def readable(self) -> bool:
        """Always."""
        return True

    def writable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def segments(self, hole: range) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of all that was written, except inside ``hole``, in order."""
        for page in sorted(self._pages):
            start, stop = page * _PAGE, min((page + 1) * _PAGE, self.size)
            for first, last in ((start, min(stop, hole.start)), (max(start, hole.stop), stop)):
                if first < last:
                    yield first, bytes(self._pages[page][first - start : last - start])

    def _spans(self, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(page, first byte in it, last, bytes before it) for ``length`` bytes from the position on."""
        done = 0
        while done < length:
            page, start = divmod(self._position + done, _PAGE)
            stop = min(_PAGE, start + length - done)
            yield page, start, stop, done
            done += stop - start
