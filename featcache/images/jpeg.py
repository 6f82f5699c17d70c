"""Refuse JPEGs whose pixels are not all there: libjpeg paints the missing ones grey, with a warning that Pillow hides.

In: a JPEG that Pillow has opened, and the file's bytes. Out: the image, loaded, or ``RefusedImage``.

The decoder is given the file piece by piece. A run is the entropy-coded data between two markers. After each run the decoder
gets some bytes that are no code. If it has all blocks of the run, it skips them to find the next marker; otherwise it
keeps them for its next block. libjpeg warns about whatever is refused here, so that a decoder that stops at warnings agrees.

What goes unnoticed:
- the last few blocks of a run, as libjpeg reads eight bytes ahead (16 bytes at most, when tried);
- damage that leaves as many blocks as there should be;
- a progressive file that ends exactly between two scans: it is blurred, but valid;
- arithmetic coding, where any data will do;
- with more than one restart interval per 4096 pixels, what is missing within a scan.
"""

import re
from typing import Any

from PIL import Image

from featcache.errors import RefusedImage

_EOI, _SOS, _DRI, _PROGRESSIVE = 0xD9, 0xDA, 0xDD, 0xC2
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_HUFFMAN = {b"\xc0", b"\xc1", b"\xc2"}  # decoders that can wait for more data
_BARE = {0x01, *range(0xD0, 0xDA)}  # markers without a segment
_MARK = re.compile(rb"\xff[^\x00\xff]")
_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_FILL = b"\xff\x00"  # eight ones, which no code begins with: a block of them takes at least four
_AHEAD = 8 * _FILL
MANY_SCANS = 64  # more than any camera or encoder writes; each takes as long as the whole image, however short it is
_SURPLUS = 64  # bytes behind the last block that are tolerated


def load_jpeg(image: Any, data: bytes) -> None:
    """Load a JPEG as ``image.load()`` does, but raise RefusedImage instead of inventing pixels. Other errors are Pillow's."""
    image.decodermaxblock = max(len(data), image.decodermaxblock)  # arithmetic decoding cannot wait for more
    try:
        runs, single = _find_runs(data, image.width * image.height)
    except (LookupError, ValueError, ZeroDivisionError):  # a header that makes no sense: Pillow decides
        runs, single = [], False
    if runs and hasattr(Image, "_getdecoder"):  # otherwise cut off, or of a kind that cannot be followed
        image.load_prepare()
        name, extents, _, arguments = image.tile[0]
        decoder = Image._getdecoder(image.mode, name, arguments, image.decoderconfig)
        try:
            decoder.setimage(image.im, extents)
            if _decode(_Feeder(decoder), data, runs, single=single):
                image.tile, image.readonly = [], 0
        finally:
            decoder.cleanup()
    image.load()  # nothing is left to do, or it says what is wrong


def may_have_many_scans(image: Any, data: bytes) -> bool:
    """Return whether a JPEG that Pillow has opened could take far longer than its size suggests. Cheap for usual ones."""
    segment = image.fp.tell() - 6 - 2 * image.layers  # the one that Pillow read last, if it is of all layers
    single = data[segment - 2 : segment] == b"\xff\xda" and data[segment + 2] == image.layers
    return ("progressive" in image.info or not single) and has_many_scans(data)


def has_many_scans(data: bytes) -> bool:
    """Return whether there are, at most, more than any camera writes."""
    return data.count(b"\xff\xda") > MANY_SCANS


class _Feeder:
    """One of Pillow's decoders, given the file piece by piece."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.rest = b""  # what it has not used yet
        self.done = False  # it wants no more
        self.failed = False  # it wants no more, because of an error

    def takes(self, piece: bytes) -> bool:
        """Give it ``piece``, unless it is done. Returns whether it used all of that at once and wants more."""
        if not self.done:
            piece = self.rest + piece
            used, status = self._decoder.decode(piece)
            self.rest, self.done, self.failed = piece[used:], used < 0, status < 0
        return not self.done and not self.rest


def _decode(feeder: _Feeder, data: bytes, runs: list[int], *, single: bool) -> bool:
    """Give the decoder the whole file, whose ``runs`` end there; of a ``single`` scan, it is done with the last one.

    Returns whether all is decoded; if not, the decoder failed. Raises RefusedImage.
    """
    start = 0
    for end in runs:
        if end - start > 4 * _SURPLUS:
            before = end - _SURPLUS
            pieces = data[start:before], data[before : before + 1], data[before + 1 : before + 2]
            taken = [feeder.takes(piece) for piece in pieces]  # single bytes are no code: it would wait for more
            if all(taken) or feeder.done:
                _check_surplus(data[before:end], feeder)
            start = before + 2
        whole = [feeder.takes(piece) for piece in (data[start:end] + _AHEAD, _FILL)]
        if feeder.done:
            _check_surplus(data[end : runs[-1]], feeder)
            return not feeder.failed
        if not all(whole):
            raise RefusedImage("damaged: JPEG data ends before the last pixel")
        start = end
    if single:
        raise RefusedImage("damaged: JPEG data ends before the last pixel")
    feeder.takes(data[start:])
    return feeder.done and not feeder.failed


def _check_surplus(surplus: bytes, feeder: _Feeder) -> None:
    """Raise RefusedImage if what is left is more than padding."""
    if not feeder.failed and len(surplus) >= _SURPLUS and len(set(surplus)) > 2:
        raise RefusedImage("damaged: JPEG data goes on after the last pixel")


def _find_runs(data: bytes, pixels: int) -> tuple[list[int], bool]:
    """Return where each run ends, and whether there is one scan only.

    There are no runs if the file has no end or cannot be followed. Of very many runs, only those that end a scan are
    returned. Raises RefusedImage.
    """
    runs: list[int] = []
    scans: list[int] = []
    frame, restart, at = b"", 0, 2
    while found := _next_segment(data, at):
        kind, segment, at = found
        if kind == _EOI:
            return runs if len(runs) <= 64 + pixels // 4096 else scans, False
        if kind in _FRAMES:
            frame = data[segment - 1 : at]
        elif kind == _DRI:
            restart = int.from_bytes(data[segment + 2 : at], "big")
        elif kind == _SOS:
            ends = _runs_of_scan(data, at, restart)
            if not ends or frame[:1] not in _HUFFMAN:
                break
            if restart and len(ends) * restart < _units(frame, data[segment:at]):
                raise RefusedImage("damaged: JPEG data lacks restart markers")
            runs, scans, at = runs + ends, [*scans, ends[-1]], ends[-1]
            if frame[0] != _PROGRESSIVE and frame[8] == data[segment + 2]:
                return runs if len(runs) <= 64 + pixels // 4096 else scans, True
            if len(scans) > MANY_SCANS and (len(scans) > 500 or len(scans) * pixels > 2**33):
                raise RefusedImage(f"damaged: more than {len(scans) - 1} scans, which would take too long")
    return [], False


def _next_segment(data: bytes, at: int) -> tuple[int, int, int] | None:
    """Return the marker at or after ``at``, and where its segment starts and ends; None at the end of the file."""
    if not (marker := _MARK.search(data, at)):
        return None
    kind, start = data[marker.end() - 1], marker.end()
    end = start + (0 if kind in _BARE else int.from_bytes(data[start : start + 2], "big"))
    return (kind, start, end) if end <= len(data) else None


def _runs_of_scan(data: bytes, start: int, restart: int) -> list[int]:
    """Return where the runs of the scan at ``start`` end; nothing if the scan has no end. Raises RefusedImage."""
    if not (end := (_END if restart else _MARK).search(data, start)):
        return []
    ends = [match.start() for match in _RESTART.finditer(data, start, end.start())] if restart else []
    if any(data[place + 1] - 0xD0 != number % 8 for number, place in enumerate(ends)):
        raise RefusedImage("damaged: JPEG restart markers are out of order")
    return [*ends, end.start()]


def _units(frame: bytes, scan: bytes) -> int:
    """Return how many MCUs a scan has (ISO 10918-1, A.2): ``frame`` from its marker on, ``scan`` from its length on."""
    height, width = int.from_bytes(frame[4:6], "big"), int.from_bytes(frame[6:8], "big")
    factors = {frame[i]: (frame[i + 1] >> 4, frame[i + 1] & 15) for i in range(9, 9 + 3 * frame[8], 3)}
    most = [max(values) for values in zip(*factors.values(), strict=True)]
    own = factors[scan[3]] if scan[2] == 1 else (1, 1)
    across, down = (-(-edge * of // (8 * all_)) for edge, of, all_ in zip((width, height), own, most, strict=True))
    return int(across * down)
