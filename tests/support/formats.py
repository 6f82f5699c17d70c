"""A table of what PNG, TIFF, TGA, BMP, PNM, WebP and JPEG 2000 can hold, each file with its right 8-bit RGB picture.

In: nothing. Out: ``Entry``s by format. Files are laid out here from the formats' definitions (PNG: ISO 15948; TIFF 6.0; Truevision
TGA 2.0; BMP: Microsoft's BITMAPINFOHEADER and V4; Netpbm), never by Pillow's writers, but for the codecs of WebP and
JPEG 2000 (ISO 15444-1). The right picture follows from the samples and what the format says of them: grey replicated,
palettes expanded, CMYK as (1 - C)(1 - K), alpha composited on white, n bits scaled by 255 / (2^n - 1).
"""

import dataclasses
import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from corpus import _directory as directory
from corpus import chunk, png, writes
from PIL import Image

Array = np.ndarray
HEIGHT, WIDTH = 7, 13


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file.

    Attributes:
        name: what is special about it. data: the file.
        right: (H, W, 3) float, 0 to 255; None: it must be refused, being damaged, or of samples whose look is not defined.
        within: levels that a pixel may be off: rounding, and what a lossy codec loses.
    """

    name: str
    data: bytes
    right: Array | None
    within: float = 1.0


def wrong(entry: Entry, pixels: Array) -> str:
    """What is wrong with an entry that was decoded to ``pixels``, uint8 (H, W, 3); nothing if it is right."""
    if entry.right is None:
        return f"{entry.name}: embedded, should be refused"
    if pixels.shape != entry.right.shape:
        return f"{entry.name}: shape {pixels.shape}, right is {entry.right.shape}"
    off = float(np.abs(pixels - entry.right).max())
    return "" if off <= entry.within else f"{entry.name}: another picture, off by {off:.1f} levels"


# ------------------------------------------------------------------------------------ samples and what they look like


def samples(bands: int, top: int, seed: int = 0) -> Array:
    """(HEIGHT, WIDTH, bands) from 0 to ``top``, both of which occur, half of them at the ends."""
    rng = np.random.default_rng([bands, top, seed])
    found = rng.integers(0, top + 1, (HEIGHT, WIDTH, bands))
    ends = rng.integers(0, 4, found.shape)
    return np.where(ends == 0, 0, np.where(ends == 1, top, found))


def colours_of(count: int, top: int) -> Array:
    """(count, 3), of a palette."""
    return np.random.default_rng(count).integers(0, top + 1, (count, 3))


def grey(values: Array, top: int) -> Array:
    """(H, W, 1) of 0 (black) to ``top`` (white) as RGB."""
    return np.repeat(values * (255 / top), 3, axis=2)


def on_white(colour: Array, alpha: Array) -> Array:
    """(H, W, 3) of 0 to 255 composited by alpha (H, W, 1) of 0 to 1."""
    return colour * alpha + 255 * (1 - alpha)


def cmyk(values: Array, top: int) -> Array:
    """(H, W, 4) inks as RGB."""
    inks = values / top
    return 255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])


# -------------------------------------------------------------------------------------------------------------- PNG


def pngs() -> Iterator[Entry]:
    """Colour types x depths x transparency x interlacing; chunks that do not change the picture, and checksums."""
    for interlaced, depth in itertools.product((False, True), (1, 2, 4, 8, 16)):
        top, how = 2**depth - 1, {"interlaced": interlaced}
        note = f"png {depth} bit{' interlaced' if interlaced else ''}"
        one = samples(1, top)
        yield Entry(f"{note} grey", png(one, depth, 0, **how), grey(one, top))
        clear = chunk(b"tRNS", struct.pack(">H", one[0, 0, 0]))
        yield Entry(f"{note} grey tRNS", png(one, depth, 0, clear, **how), on_white(grey(one, top), one != one[0, 0]))
        if depth <= 8:
            yield from _palette_pngs(note, depth, how)
        if depth >= 8:
            yield from _colour_pngs(note, depth, how)
    yield from _png_chunks()


def _palette_pngs(note: str, depth: int, how: dict[str, bool]) -> Iterator[Entry]:
    index, colours = samples(1, 2**depth - 1)[..., 0], colours_of(2**depth, 255)
    palette = chunk(b"PLTE", colours.astype(np.uint8).tobytes())
    yield Entry(f"{note} palette", png(index[..., None], depth, 3, palette, **how), colours[index].astype(float))
    for alphas in ([0], [7, 255][: 2**depth], [128] * 2**depth):
        clear = chunk(b"tRNS", bytes(alphas))
        alpha = np.array(alphas + [255] * (2**depth - len(alphas)))[index][..., None] / 255
        data = png(index[..., None], depth, 3, palette, clear, **how)
        yield Entry(f"{note} palette tRNS {alphas[:2]}", data, on_white(colours[index], alpha))


def _colour_pngs(note: str, depth: int, how: dict[str, bool]) -> Iterator[Entry]:
    top = 2**depth - 1
    rgb, alpha = samples(3, top), samples(1, top, seed=1)
    shown = rgb * (255 / top)
    if depth == 16:  # same upper bytes, so that only all 16 bits tell what is transparent
        rgb[1, :5] = rgb[0, 0] ^ 1
        rgb[2, 0] = rgb[0, 0]
        shown = rgb * (255 / top)
    yield Entry(f"{note} rgb", png(rgb, depth, 2, **how), shown)
    clear = chunk(b"tRNS", struct.pack(">HHH", *rgb[0, 0].tolist()))
    gone = (rgb == rgb[0, 0]).all(axis=2, keepdims=True)
    yield Entry(f"{note} rgb tRNS", png(rgb, depth, 2, clear, **how), np.where(gone, 255, shown))
    within = 1.0 if depth == 8 else 2.0  # the upper bytes of colour and alpha, then composited
    yield Entry(
        f"{note} rgba", png(np.dstack([rgb, alpha]), depth, 6, **how), on_white(shown, alpha / top), within=within
    )
    data = png(np.dstack([rgb[..., :1], alpha]), depth, 4, **how)
    yield Entry(f"{note} grey alpha", data, on_white(grey(rgb[..., :1], top), alpha / top), within=within)


def _png_chunks() -> Iterator[Entry]:
    rgb = samples(3, 255)
    long = zlib.compress(bytes(3_000_000))
    harmless = {
        "tEXt": chunk(b"tEXt", b"Comment\0" + b"x" * 70_000_000),
        "zTXt": chunk(b"zTXt", b"Comment\0\0" + long),
        "iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + long),
        "iCCP": chunk(b"iCCP", b"profile\0\0" + long),
        "iCCP of an unknown method": chunk(b"iCCP", b"profile\0\7" + long),
        "gAMA cut short": chunk(b"gAMA", b"\0"),
    }
    for name, text in harmless.items():
        yield Entry(f"png long {name}", png(rgb, 8, 2, text), rgb.astype(float))
        late = png(rgb, 8, 2)
        yield Entry(f"png long {name} behind the pixels", late[:-12] + text + late[-12:], rgb.astype(float))
    for kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"tIME", b"pHYs", b"prVt"):
        text = chunk(kind, b"Comment\0\0\0\0\0")
        data = png(rgb, 8, 2, _wrong_checksum(text, kind))
        yield Entry(f"png wrong checksum of {kind.decode()}", data, rgb.astype(float))
    plain = png(samples(1, 255), 8, 3, chunk(b"PLTE", bytes(768)), chunk(b"tRNS", bytes(9)))
    for kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
        yield Entry(f"png wrong checksum of {kind.decode()}", _wrong_checksum(plain, kind), None)


def _wrong_checksum(data: bytes, kind: bytes) -> bytes:
    start = data.index(kind) - 4
    at = start + 8 + int.from_bytes(data[start : start + 4], "big")
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# ------------------------------------------------------------------------------------------------------------- TIFF


def tiff(
    values: Array,
    bits: int,
    photometric: int | None,
    *,
    order: str = "<",
    kind: str = "u",
    extra: Sequence[int] = (),
    planar: bool = False,
    fill: int = 1,
    rows: int = HEIGHT,
    tiled: bool = False,
    deflate: bool = False,
    colours: Array | None = None,
    more: dict[int, tuple[str, list[int]]] | None = None,
) -> bytes:
    """A TIFF of (H, W, C) samples of ``bits`` bits in strips of ``rows`` or in tiles of 16 x 16.

    Args:
        kind: u, i or f, numpy's letter for SampleFormat. extra: ExtraSamples. fill: FillOrder. colours: (2^bits, 3) uint16.
        more: further tags: struct letter and values.
    """
    planes = [values[..., band : band + 1] for band in range(values.shape[2])] if planar else [values]
    if tiled:  # of which one covers the picture
        planes, rows = [np.pad(plane, ((0, 16 - HEIGHT), (0, 16 - WIDTH), (0, 0))) for plane in planes], 16
    parts = [plane[at : at + rows] for plane in planes for at in range(0, len(plane), rows)]
    strips = [_packed(part, bits, order, kind) for part in parts]
    if fill == 2:
        strips = [np.packbits(np.unpackbits(np.frombuffer(s, np.uint8)), bitorder="little").tobytes() for s in strips]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    starts = np.cumsum([8, *map(len, strips)]).tolist()
    bands = values.shape[2]
    tags = {256: ("I", [WIDTH]), 257: ("I", [HEIGHT]), 258: ("H", [bits] * bands), 259: ("H", [8 if deflate else 1])}
    lengths = [len(strip) for strip in strips]
    if tiled:
        tags |= {322: ("I", [16]), 323: ("I", [16]), 324: ("I", starts[:-1]), 325: ("I", lengths)}
    else:
        tags |= {273: ("I", starts[:-1]), 278: ("I", [rows]), 279: ("I", lengths)}
    tags |= {277: ("H", [bands]), 284: ("H", [1 + planar]), 339: ("H", ["uif".index(kind) + 1] * bands)}
    tags |= {} if photometric is None else {262: ("H", [photometric])}
    tags |= {266: ("H", [fill])} if fill != 1 else {}
    tags |= {338: ("H", list(extra))} if extra else {}
    tags |= {320: ("H", colours.T.reshape(-1).tolist())} if colours is not None else {}
    start = starts[-1] + starts[-1] % 2
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    body = (head + b"".join(strips)).ljust(start, b"\0")
    return body + directory(tags | (more or {}), order, start, last=True) + bytes(64)


def _packed(values: Array, bits: int, order: str, kind: str) -> bytes:
    """Whole bytes in the file's order; other depths from the highest bit on, each row padded to a byte."""
    if bits % 8 == 0 and bits != 24:
        return values.astype(f"{order}{kind}{bits // 8}").tobytes()
    lines = values.reshape(len(values), -1, 1).astype(">u4").view(np.uint8)
    return np.packbits(np.unpackbits(lines, axis=2)[..., 32 - bits :].reshape(len(values), -1), axis=1).tobytes()


def tiffs() -> Iterator[Entry]:
    """Photometrics x depths x sample formats x alpha x byte orders x layouts."""
    layouts = (
        {},
        {"rows": 3},
        {"tiled": True},
        {"deflate": True},
        {"fill": 2},
        {"planar": True},
        {"planar": True, "rows": 2, "deflate": True},
    )
    for order, how in itertools.product("<>", layouts):
        note = f"tiff {'II' if order == '<' else 'MM'} " + " ".join(f"{key}={value}" for key, value in how.items())
        for bits, photometric in itertools.product((1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32), (0, 1)):
            values, top = samples(1, 2**bits - 1), 2**bits - 1
            right = grey(top - values if photometric == 0 else values, top)
            data = tiff(values, bits, photometric, order=order, **how)
            yield Entry(f"{note} {('WhiteIsZero', 'BlackIsZero')[photometric]} {bits}", data, right)
        for photometric, bits in itertools.product((0, 1, 2), (8, 16, 32)):
            values = samples(3 if photometric == 2 else 1, 2**bits - 1) - 2 ** (bits - 1)
            data = tiff(values, bits, photometric, kind="i", order=order, **how)
            yield Entry(f"{note} signed {bits} photometric {photometric}", data, None)
            if bits > 8:
                data = tiff(values / 2**bits, bits, photometric, kind="f", order=order, **how)
                yield Entry(f"{note} float {bits} photometric {photometric}", data, None)
        yield from _colour_tiffs(note, {"order": order, **how})
    yield Entry("tiff without photometric", tiff(samples(1, 255), 8, None), None)


def _colour_tiffs(note: str, how: dict[str, object]) -> Iterator[Entry]:
    for bits in (1, 2, 4, 8, 16):
        index, colours = samples(1, 2**bits - 1), colours_of(2**bits, 65535)
        right = colours[index[..., 0]] / 257
        yield Entry(
            f"{note} palette {bits}",
            tiff(index, bits, 3, colours=colours, **how),
            right,
        )
    for bits in (4, 8, 12, 16):
        top = 2**bits - 1
        rgb, alpha, ink = samples(3, top), samples(1, top, seed=1), samples(4, top)
        shown = rgb * (255 / top)
        pre = np.minimum(rgb, alpha)
        light = pre * (255 / top) + 255 * (1 - alpha / top)
        kinds: dict[str, tuple[Array, int, list[int], Array]] = {
            "rgb": (rgb, 2, [], shown),
            "rgb unspecified": (np.dstack([rgb, alpha]), 2, [0], shown),
            "rgb alpha": (np.dstack([rgb, alpha]), 2, [2], on_white(shown, alpha / top)),
            "rgb associated alpha": (np.dstack([pre, alpha]), 2, [1], light),
            "rgb alpha unspecified": (np.dstack([rgb, alpha, alpha]), 2, [2, 0], on_white(shown, alpha / top)),
            "cmyk": (ink, 5, [], cmyk(ink, top)),
            "cmyk unspecified": (np.dstack([ink, alpha]), 5, [0], cmyk(ink, top)),
        }
        one = rgb[..., :1]
        for photometric in (0, 1):
            seen = grey(one if photometric else top - one, top)
            name = f"photometric {photometric} grey"
            kinds[f"{name} unspecified"] = (np.dstack([one, alpha]), photometric, [0], seen)
            kinds[f"{name} alpha"] = (np.dstack([one, alpha]), photometric, [2], on_white(seen, alpha / top))
        premultiplied = grey(pre[..., :1], top) + 255 * (1 - alpha / top)
        kinds["grey associated alpha"] = (np.dstack([pre[..., :1], alpha]), 1, [1], premultiplied)
        for name, (values, photometric, extra, right) in kinds.items():
            data = tiff(values, bits, photometric, extra=extra, **how)
            within = 2.0 if "alpha" in name or bits == 16 else 1.0
            yield Entry(f"{note} {name} {bits}", data, right, within)
    yield from _ycbcr(note, how)


def _ycbcr(note: str, how: dict[str, object]) -> Iterator[Entry]:
    """CCIR 601 as JPEG has it, 0 to 255. Without the tag YCbCrSubSampling one Cb and Cr stand behind 2 x 2 of Y."""
    values = samples(3, 255)
    yield Entry(f"{note} ycbcr", tiff(values, 8, 6, more={530: ("H", [1, 1])}, **how), _from_ycbcr(values), 2.0)
    if how.keys() == {"order"}:
        values = np.repeat(np.repeat(values[: HEIGHT // 2, : WIDTH // 2], 2, 0), 2, 1)
        y, chroma = values[..., 0], values[::2, ::2, 1:]
        units = np.dstack([y[::2, ::2], y[::2, 1::2], y[1::2, ::2], y[1::2, 1::2], chroma])
        tags = {256: ("I", [WIDTH - 1]), 257: ("I", [HEIGHT - 1]), 258: ("H", [8, 8, 8]), 277: ("H", [3])}
        data = tiff(units, 8, 6, rows=HEIGHT - 1, more=tags, **how)
        yield Entry(f"{note} ycbcr 2 x 2", data + bytes(9999), _from_ycbcr(values), 2.0)


def _from_ycbcr(values: Array) -> Array:
    y, cb, cr = (values[..., band] - float((0, 128, 128)[band]) for band in range(3))
    return np.clip(np.dstack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]), 0, 255)


# -------------------------------------------------------------------------------------------------------------- TGA


def tgas() -> Iterator[Entry]:
    """Kinds x depths x alpha bits in the descriptor x origin x run lengths x what an extension says of alpha."""
    origins = {0x00: lambda a: a[::-1], 0x10: lambda a: a[::-1, ::-1], 0x20: lambda a: a, 0x30: lambda a: a[:, ::-1]}
    for (origin, stored), packed in itertools.product(origins.items(), (False, True)):
        note = f"tga origin {origin >> 4}{' packed' if packed else ''}"
        for name, kind, depth, alpha, values, right in _tga_kinds():
            data = _tga(stored(values), kind, depth, origin | alpha, packed)
            yield Entry(f"{note} {name} {depth} alpha {alpha}", data, right)
            if depth == 32 and alpha:
                for meaning in range(5):
                    yield from _extended_tga(f"{note} alpha of type {meaning}", data, meaning, values)
        index, colours = samples(1, 15).astype(np.uint8), samples(4, 255).reshape(-1, 4)[:16]
        for depth in (15, 16, 24, 32):
            entries, shown = _tga_colours(colours, depth)
            table = (2, 14, depth, entries[2:].tobytes())  # the first two entries are left out
            data = _tga(stored(np.maximum(index, 2)), 1, 8, origin, packed, table)
            yield Entry(f"{note} palette of {depth}", data, shown[np.maximum(index[..., 0], 2)])


def _tga_kinds() -> Iterator[tuple[str, int, int, int, Array, Array | None]]:
    """Name, kind, depth, alpha bits, (H, W, bytes) as stored, right."""
    rgba, one = samples(4, 255), samples(2, 255)
    rgb, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    bgra = rgba[..., [2, 1, 0, 3]].astype(np.uint8)
    yield "grey", 3, 8, 0, one[..., :1].astype(np.uint8), grey(one[..., :1], 255)
    yield "grey", 3, 16, 8, one.astype(np.uint8), on_white(grey(one[..., :1], 255), one[..., 1:] / 255)
    yield "colour", 2, 24, 0, bgra[..., :3], rgb
    yield "colour", 2, 32, 0, bgra, rgb
    yield "colour", 2, 32, 8, bgra, on_white(rgb, alpha)
    # Truevision does not say which value of a single alpha bit is opaque, and readers differ: it must be the same everywhere.
    mixed = rgba[..., 3]
    for depth, bit, bits in (
        (15, 0, mixed),
        (16, 0, mixed),
        (16, 1, mixed),
        (16, 1, mixed * 0),
        (16, 1, mixed * 0 + 255),
    ):
        stored, shown = _tga_colours(np.dstack([rgba[..., :3], bits]).reshape(-1, 4), depth)
        right = None if bit and bits is mixed else shown.reshape(HEIGHT, WIDTH, 3)
        yield "colour", 2, depth, bit, stored.reshape(HEIGHT, WIDTH, 2), right


def _tga_colours(rgba: Array, depth: int) -> tuple[Array, Array]:
    """(N, bytes) as stored, (N, 3) right: ARRRRRGG GGGBBBBB, little-endian, or BGR(A)."""
    if depth >= 24:
        return rgba[:, [2, 1, 0, 3]][:, : depth // 8].astype(np.uint8), rgba[:, :3].astype(float)
    five = rgba[:, :3] >> 3
    words = (rgba[:, 3] > 127) << 15 | five[:, 0] << 10 | five[:, 1] << 5 | five[:, 2]
    return words.astype("<u2").view(np.uint8).reshape(-1, 2), five * (255 / 31)


def _tga(pixels: Array, kind: int, depth: int, descriptor: int, packed: bool, table: tuple | None = None) -> bytes:
    first, count, size, entries = table or (0, 0, 0, b"")
    flat = pixels.reshape(-1, pixels.shape[2])
    head = struct.pack(
        "<BBBHHBHHHHBB", 3, bool(table), kind | 8 * packed, first, count, size, 0, 0, WIDTH, HEIGHT, depth, descriptor
    )
    return head + b"id\0" + entries + (_tga_packets(pixels) if packed else flat.tobytes())


def _tga_packets(pixels: Array) -> bytes:
    """Runs of equal pixels and of others; no packet crosses a row."""
    found = b""
    for row in pixels:
        for key, run in itertools.groupby(row.tolist()):
            length = len(list(run))
            found += bytes([0x80 | length - 1 if length > 1 else 0]) + bytes(key)
    return found


def _extended_tga(name: str, data: bytes, meaning: int, values: Array) -> Iterator[Entry]:
    """Of version 2, whose extension area says what alpha is: 0 none, 1 and 2 undefined, 3 alpha, 4 premultiplied."""
    area = struct.pack("<H", 495) + bytes(492) + bytes([meaning])
    footer = struct.pack("<II", len(data), 0) + b"TRUEVISION-XFILE.\0"
    rgb, alpha = values[..., [2, 1, 0]].astype(float), values[..., 3:] / 255
    right = {3: on_white(rgb, alpha), 4: np.minimum(rgb + 255 * (1 - alpha), 255)}.get(meaning, rgb)
    yield Entry(name, data + area + footer, right)


# -------------------------------------------------------------------------------------------------------------- BMP


def bmps() -> Iterator[Entry]:
    """Headers x depths x masks x alpha x direction; palettes of every size; run lengths."""
    for top_down, header in itertools.product((False, True), (12, 40, 108)):
        if top_down and header == 12:
            continue  # whose height has no sign
        note = f"bmp header {header}{' top-down' if top_down else ''}"
        for bits in (1, 4, 8):
            for count, colours in _bmp_palettes(bits, header):
                index = samples(1, min(count, 2**bits) - 1)
                for packed in (False, True) if header == 40 and bits > 1 and not top_down else (False,):
                    data = _bmp(index, bits, header, top_down=top_down, colours=colours, packed=packed)
                    name = f"{note} {bits} bit{' packed' if packed else ''}, {count} colours from {colours[0, 0]}"
                    yield Entry(name, data, colours[index[..., 0]].astype(float))
        for bits, masks in _BMP_MASKS:
            if (header == 12 and (masks or bits in (16, 32))) or (header == 40 and len(masks) == 4):
                continue
            values, right = _masked(masks or _BMP_DEFAULT[bits], bits)
            data = _bmp(values, bits, header, top_down=top_down, masks=masks)
            yield Entry(f"{note} {bits} bit {[hex(mask) for mask in masks]}", data, right)


_BMP_DEFAULT = {16: (0x7C00, 0x3E0, 0x1F), 24: (0xFF0000, 0xFF00, 0xFF), 32: (0xFF0000, 0xFF00, 0xFF)}
_BMP_MASKS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (16, ()),
    (24, ()),
    (32, ()),
    (16, (0xF800, 0x7E0, 0x1F)),
    (16, (0x7C00, 0x3E0, 0x1F)),
    (16, (0xF00, 0xF0, 0xF)),
    (32, (0xFF0000, 0xFF00, 0xFF)),
    (32, (0xFF000000, 0xFF0000, 0xFF00)),
    (32, (0x3FF00000, 0xFFC00, 0x3FF)),
    (16, (0x7C00, 0x3E0, 0x1F, 0x8000)),
    (16, (0xF00, 0xF0, 0xF, 0xF000)),
    (32, (0xFF0000, 0xFF00, 0xFF, 0)),
    (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
    (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
    (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
)


def _bmp_palettes(bits: int, header: int) -> Iterator[tuple[int, Array]]:
    """How many colours, and colours: of any kind, and those that look like grey scales, so that readers take short cuts."""
    any_kind = colours_of(256, 255)
    black_white, ramp = np.array([[0] * 3, [255] * 3]), np.repeat(np.arange(256)[:, None], 3, 1)
    for count in {2, min(9, 2**bits), 2**bits} if header != 12 else {2**bits}:
        yield from ((count, any_kind[:count]), (count, ramp[:count]), (count, 255 - ramp[:count]))
        if count == 2:
            yield from ((count, black_white), (count, 255 - black_white))


def _masked(masks: tuple[int, ...], bits: int) -> tuple[Array, Array]:
    """Pixels (H, W, 1) and right, for channels that lie where ``masks`` say: red, green, blue, alpha."""
    pixels, channels = np.zeros((HEIGHT, WIDTH, 1), np.int64), []
    for number, mask in enumerate(masks):
        low = (mask & -mask).bit_length() - 1 if mask else 0
        top = mask >> low
        values = samples(1, top, seed=number) if mask else np.ones((HEIGHT, WIDTH, 1), np.int64)
        pixels += values << low if mask else 0
        channels.append(values / max(top, 1))
    if bits != 24:
        pixels |= ~sum(masks) & (2**bits - 1) & samples(1, 2**bits - 1, seed=9)  # what no mask covers may be anything
    colour = 255 * np.dstack(channels[:3])
    return pixels, on_white(colour, channels[3]) if len(masks) == 4 else colour


def _bmp(
    values: Array,
    bits: int,
    header: int,
    *,
    top_down: bool = False,
    masks: tuple[int, ...] = (),
    colours: Array | None = None,
    packed: bool = False,
) -> bytes:
    count = 0 if colours is None else len(colours)
    rows = values if top_down else values[::-1]
    if packed:
        runs = [[_bmp_run(key, bits, run) for key, run in itertools.groupby(row[:, 0].tolist())] for row in rows]
        body = b"".join(b"".join(row) + b"\0\0" for row in runs) + b"\0\1"
    else:
        lines = rows.astype("<u4").view(np.uint8)[..., : bits // 8] if bits >= 8 else _bits(rows, bits)
        body = b"".join(line.tobytes().ljust(-(-WIDTH * bits // 32) * 4, b"\0") for line in lines)
    table = b"" if colours is None else np.pad(colours[:, ::-1], ((0, 0), (0, header > 12))).astype(np.uint8).tobytes()
    compression = {4: 2, 8: 1}[bits] if packed else 3 if masks else 0
    if header == 12:
        head = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, bits)
    else:
        height = -HEIGHT if top_down else HEIGHT
        head = struct.pack("<IiiHHIIiiII", header, WIDTH, height, 1, bits, compression, len(body), 0, 0, count, 0)
        fields = struct.pack(f"<{len(masks)}I", *masks)
        head += fields.ljust(68, b"\0") if header == 108 else fields
    start = 14 + len(head) + len(table)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + head + table + body


def _bits(rows: Array, bits: int) -> Array:
    wide = np.unpackbits(rows.astype(np.uint8), axis=2)[..., 8 - bits :]
    return np.packbits(wide.reshape(len(rows), -1), axis=1)


def _bmp_run(value: int, bits: int, run: Iterator[int]) -> bytes:
    return bytes([len(list(run)), value if bits == 8 else value << 4 | value])


# -------------------------------------------------------------------------------------------------------------- PNM


def pnms() -> Iterator[Entry]:
    """All six of Netpbm's, x highest values."""
    size = b"%d %d" % (WIDTH, HEIGHT)
    ink = samples(1, 1)
    yield Entry("pbm plain", b"P1 # ink\n" + size + b"\n" + _words(ink), grey(1 - ink, 1))
    yield Entry("pbm raw", b"P4\n" + size + b"\n" + np.packbits(ink[..., 0], axis=1).tobytes(), grey(1 - ink, 1))
    for top, bands in itertools.product((1, 3, 15, 100, 255, 256, 1023, 4095, 65534, 65535), (1, 3)):
        values = samples(bands, top)
        right = grey(values, top) if bands == 1 else values * (255 / top)
        head = b"P%d\n" + size + b"\n%d\n"
        note = f"{'pgm' if bands == 1 else 'ppm'} of {top}"
        yield Entry(f"{note} plain", head % (2 if bands == 1 else 3, top) + _words(values), right)
        yield Entry(
            f"{note} raw",
            head % (5 if bands == 1 else 6, top) + values.astype(">u2" if top > 255 else "u1").tobytes(),
            right,
        )


def _words(values: Array) -> bytes:
    return " ".join(map(str, values.reshape(-1).tolist())).encode() + b"\n"


# ------------------------------------------------------------------------------------------- WebP and JPEG 2000


def webps() -> Iterator[Entry]:
    """Lossless, with and without alpha. The codec is Pillow's."""
    if writes("WEBP"):
        rgba = samples(4, 255)
        shown = on_white(rgba[..., :3].astype(float), rgba[..., 3:] / 255)
        yield Entry("webp", _encoded(rgba[..., :3], "WEBP", lossless=True), rgba[..., :3].astype(float))
        yield Entry("webp alpha", _encoded(rgba, "WEBP", lossless=True, exact=True), shown)


def jpeg2000s() -> Iterator[Entry]:
    """Depths x bands, boxed or bare. The codec is Pillow's, for 8 and 16 bits; the others are patched to be of other depths.

    A sample of n bits is coded as its difference to 2^(n - 1), so that changing n in the header moves all samples by
    as much as the middle moves.
    """
    ways = itertools.product((False, True), (1, 2, 3, 4), (1, 4, 8, 10, 12, 16)) if writes("JPEG2000") else ()
    for boxed, bands, bits in ways:
        wide = bands == 1 and bits > 8
        middle, own = 2 ** (bits - 1), 2 ** (15 if wide else 7)
        values = samples(bands, 2**bits - 1)
        values = values if wide else np.clip(values, middle - 128, middle + 127)
        coded = (values - middle + own).astype(np.uint16 if wide else np.uint8)
        data = _encoded(coded, "JPEG2000", no_jp2=not boxed, num_resolutions=2)
        shown = values * (255 / (2**bits - 1))
        colour = np.repeat(shown[..., :1], 3, axis=2) if bands < 3 else shown[..., :3]
        right = on_white(colour, values[..., -1:] / (2**bits - 1)) if bands in (2, 4) else colour
        note = f"jpeg 2000 {'boxed' if boxed else 'bare'} {bands} bands"
        yield Entry(f"{note} {bits} bit", _of_depth(data, bits), right, 2.0)
        yield Entry(f"{note} {bits} bit signed", _of_depth(data, bits, signed=True), None)
    yield from _white_jpeg2000s() if writes("JPEG2000") else ()


def _white_jpeg2000s() -> Iterator[Entry]:
    """Nearly white ones, of so few bytes that some samples come out above white, and have to be cut off there."""
    how = {"irreversible": True, "quality_mode": "rates", "quality_layers": [6], "no_jp2": True, "num_resolutions": 2}
    for bands, bits in itertools.product((1, 3), (8, 10, 12, 16)):
        white = np.where(samples(bands, 255) > 99, 255, 225)
        data = _of_depth(_encoded(white, "JPEG2000", **how), bits)
        right = np.broadcast_to(white, (HEIGHT, WIDTH, 3)) * 1.0
        yield Entry(f"jpeg 2000 white {bands} bands {bits} bit", data, right, 60)


def _of_depth(data: bytes, bits: int, *, signed: bool = False) -> bytes:
    """The same coefficients, as samples of another depth: in the code stream (SIZ) and in the box ``ihdr``."""
    found, siz = bytearray(data), data.index(b"\xff\x4f\xff\x51") + 2
    bands = int.from_bytes(data[siz + 38 : siz + 40], "big")
    for band in range(bands):
        found[siz + 40 + 3 * band] = bits - 1 | signed << 7
    if (box := data.find(b"ihdr")) >= 0:
        found[box + 14] = bits - 1 | signed << 7
    return bytes(found)


def _encoded(values: Array, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    values = values[..., 0] if values.shape[2] == 1 else values
    Image.fromarray(np.ascontiguousarray(values.astype(values.dtype if values.dtype == np.uint16 else np.uint8))).save(
        file, kind, **options
    )
    return file.getvalue()


FORMATS: dict[str, Callable[[], Iterator[Entry]]] = {
    "PNG": pngs,
    "TIFF": tiffs,
    "TGA": tgas,
    "BMP": bmps,
    "PNM": pnms,
    "WebP": webps,
    "JPEG 2000": jpeg2000s,
}
