"""Images of every format, each with what must become of it; ``damage`` damages them.

In: a seed. Out: ``Case``s: a name, a file's bytes, and what to expect of it. What an intact image must decode to comes from
the array it was made of, never from the decoder under test; PNG, TIFF and PNM files are laid out here, byte by byte.
"""

import dataclasses
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        name: says what was done to it. data: the file.
        pixels: (H, W, 3) uint8 of the intact image, None where nobody knows.
        near: how far the pixels may be from that on average (lossy formats).
        fate: ``embedded``; ``refused``; ``cut``: refused, or with all the intact pixels; ``any``: refused or any picture.
        reason: what the reason of a refusal must match.
        whole, at: of a cut file: what it was, and where it was cut.
    """

    name: str
    data: bytes
    pixels: Array | None = None
    near: float = 0.0
    fate: str = "embedded"
    reason: str = ""
    whole: bytes = b""
    at: int = 0

    @property
    def suffix(self) -> str:
        """The extension for its file, by its name."""
        return "." + self.name.split(" ")[0].lower()


def picture(rng: np.random.Generator, height: int, width: int) -> Array:
    """(H, W, 3) uint8: smooth, so that lossy formats keep it, yet different everywhere, and never the grey of nothing."""
    y, x = np.mgrid[0:height, 0:width]
    phase = rng.uniform(0, 6, 3)
    waves = [110 * np.sin((x * rng.uniform(1, 4) + y * rng.uniform(1, 4)) / max(height, width) + p) for p in phase]
    return np.clip(np.stack(waves, axis=-1) + rng.integers(90, 165, 3), 0, 255).astype(np.uint8)


def writes(kind: str) -> bool:
    """Whether this build of Pillow writes the format; some distributions leave one out."""
    Image.init()
    return kind in Image.SAVE


def grey_as_rgb(grey: Array) -> Array:
    """(H, W) to (H, W, 3)."""
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2).astype(np.uint8)


def on_white(colour: Array, alpha: Array) -> Array:
    """(H, W, 3) composited on white by alpha (H, W), 0 to 255."""
    share = alpha[..., None] / 255.0
    return np.round(colour * share + 255.0 * (1 - share)).astype(np.uint8)


def saved(array: Array, kind: str, mode: str | None = None, **options: object) -> bytes:
    """The bytes Pillow writes for an array, or for a palette image."""
    image = Image.fromarray(array) if isinstance(array, np.ndarray) else array
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


# -------------------------------------------------------------------------------------------------------- PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def packed(samples: Array, depth: int) -> bytes:
    """(H, W, C) samples as PNG rows, filter 0."""
    if 0 in samples.shape:
        return b""
    rows = samples.reshape(len(samples), -1)
    if depth == 16:
        lines = rows.astype(">u2").view(np.uint8)
    elif depth == 8:
        lines = rows.astype(np.uint8)
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        lines = np.packbits(bits.reshape(len(rows), -1), axis=1)
    return np.hstack([np.zeros((len(rows), 1), np.uint8), lines]).tobytes()


def png(samples: Array, depth: int, colour: int, *extra: bytes, interlaced: bool = False, pieces: int = 1) -> bytes:
    """A PNG of (H, W, C) samples; ``extra`` chunks stand before the pixels, which come in ``pieces`` IDATs."""
    parts = [samples[y::v, x::h] for y, x, v, h in _ADAM7] if interlaced else [samples]
    body = zlib.compress(b"".join(packed(part, depth) for part in parts))
    step = -(-len(body) // pieces)
    idats = [chunk(b"IDAT", body[at : at + step]) for at in range(0, len(body), step)]
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour, 0, 0, interlaced)
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *extra, *idats, chunk(b"IEND", b"")))


def pngs(rng: np.random.Generator, rgb: Array) -> Iterator[Case]:
    """All colour types and depths, with and without transparency, interlaced or not."""
    height, width = rgb.shape[:2]
    for interlaced in (False, True):
        note = " interlaced" if interlaced else ""
        keep = {"interlaced": interlaced, "pieces": int(rng.integers(1, 4))}
        for depth in (1, 2, 4, 8, 16):
            grey = rng.integers(0, 2**depth, (height, width))
            shown = grey_as_rgb(np.round(grey * (255 / (2**depth - 1))))
            yield Case(f"png grey {depth} bit{note}", png(grey[..., None], depth, 0, **keep), shown)
            clear = chunk(b"tRNS", struct.pack(">H", grey[0, 0]))
            seen = np.where((grey == grey[0, 0])[..., None], 255, shown).astype(np.uint8)
            yield Case(f"png grey {depth} bit tRNS{note}", png(grey[..., None], depth, 0, clear, **keep), seen)
            if depth <= 8:
                yield from _palette_pngs(rng, (height, width), depth, note, keep)
        yield from _colour_pngs(rng, rgb, note, keep)


def _palette_pngs(
    rng: np.random.Generator, shape: tuple[int, ...], depth: int, note: str, keep: dict
) -> Iterator[Case]:
    index, colours = _indexed(rng, shape, 2**depth)
    palette, samples, name = chunk(b"PLTE", colours.tobytes()), index[..., None], f"png palette {depth} bit"
    yield Case(f"{name}{note}", png(samples, depth, 3, palette, **keep), colours[index])
    alphas = rng.choice([0, 255, 128], 2**depth)
    clear = chunk(b"tRNS", alphas.astype(np.uint8).tobytes())
    seen = on_white(colours[index], alphas[index])
    yield Case(f"{name} tRNS{note}", png(samples, depth, 3, palette, clear, **keep), seen, 0.6)


def _colour_pngs(rng: np.random.Generator, rgb: Array, note: str, keep: dict) -> Iterator[Case]:
    alpha = rng.choice([0, 255, 100], rgb.shape[:2])
    seen = np.where((rgb == rgb[0, 0]).all(axis=2, keepdims=True), 255, rgb).astype(np.uint8)
    grey = on_white(grey_as_rgb(rgb[..., 0]), alpha)
    for depth, scale in ((8, 1), (16, 257)):  # so that whatever becomes of the lower byte, the result is the same
        samples, opacity, name = rgb.astype(int) * scale, alpha * scale, f"{depth} bit{note}"
        clear = chunk(b"tRNS", struct.pack(">HHH", *samples[0, 0].tolist()))
        yield Case(f"png rgb {name}", png(samples, depth, 2, **keep), rgb)
        yield Case(f"png rgb tRNS {name}", png(samples, depth, 2, clear, **keep), seen)
        yield Case(f"png rgba {name}", png(np.dstack([samples, opacity]), depth, 6, **keep), on_white(rgb, alpha), 0.6)
        both = np.dstack([samples[..., 0], opacity])
        yield Case(f"png grey alpha {name}", png(both, depth, 4, **keep), grey, 0.6)


# ------------------------------------------------------------------------------------------------------- TIFF


def tiff(
    samples: Array,
    *,
    order: str = "<",
    rows: int | None = None,
    tile: int | None = None,
    compression: int = 1,
    photometric: int = 2,
    omit: int = 0,
    more: dict[int, tuple[str, list[int]]] | None = None,
    pages: int = 1,
) -> bytes:
    """A TIFF of (H, W, C) samples, uint8 or uint16, in strips of ``rows`` or in square tiles.

    Args:
        omit: so many of the last strips or tiles are not in the table. more: further tags: struct letter and values.
        pages: the same page so often.
    """
    samples = samples.astype(samples.dtype.newbyteorder(order))
    height, width, bands = samples.shape
    blocks = _blocks(samples, rows or height, tile)
    if compression == 8:
        blocks = [zlib.compress(block) for block in blocks]
    lengths = [len(block) for block in blocks]
    start = 8 + sum(lengths)
    offsets = [8 + sum(lengths[:number]) for number in range(len(blocks) - omit)]
    lengths = lengths[: len(offsets)]
    tags = {256: ("I", [width]), 257: ("I", [height]), 258: ("H", [samples.dtype.itemsize * 8] * bands)}
    tags |= {259: ("H", [compression]), 262: ("H", [photometric]), 277: ("H", [bands])}
    if tile:
        tags |= {322: ("I", [tile]), 323: ("I", [tile]), 324: ("I", offsets), 325: ("I", lengths)}
    else:
        tags |= {273: ("I", offsets), 278: ("I", [rows or height]), 279: ("I", lengths)}
    tags |= more or {}
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start + start % 2)
    body = head + b"".join(blocks) + bytes(start % 2)
    for page in range(pages):
        body += _directory(tags, order, len(body), last=page == pages - 1)
    return body


def _blocks(samples: Array, rows: int, tile: int | None) -> list[bytes]:
    if tile is None:
        return [samples[at : at + rows].tobytes() for at in range(0, len(samples), rows)]
    height, width, _ = samples.shape
    padded = np.pad(samples, ((0, -height % tile), (0, -width % tile), (0, 0)))
    corners = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
    return [padded[y : y + tile, x : x + tile].tobytes() for y, x in corners]


def _directory(tags: dict[int, tuple[str, list[int]]], order: str, at: int, *, last: bool) -> bytes:
    """An image file directory that lies at ``at``; the next one, if any, right behind it."""
    outside, entries = b"", b""
    start = at + 2 + 12 * len(tags) + 4
    for tag, (letter, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{letter}", *values)
        kind = {"B": 1, "H": 3, "I": 4}[letter]
        if len(packed) > 4:
            place = struct.pack(order + "I", start + len(outside))
            outside += packed + bytes(len(packed) % 2)
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + place
    following = 0 if last else start + len(outside)
    return struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", following) + outside


def tiffs(rng: np.random.Generator, rgb: Array) -> Iterator[Case]:
    """Strips and tiles, both byte orders, what Pillow compresses, modes, orientations."""
    grey = rgb[..., :1]
    for order in "<>":
        name = f"tif {'big' if order == '>' else 'little'} endian"
        for rows in (None, 5):
            yield Case(f"{name} strips {rows}", tiff(rgb, order=order, rows=rows), rgb)
            deflated = tiff(rgb, order=order, rows=rows, compression=8)
            yield Case(f"{name} deflated strips {rows}", deflated, rgb)
        yield Case(f"{name} tiles", tiff(rgb, order=order, tile=16), rgb)
        yield Case(f"{name} deflated tiles", tiff(rgb, order=order, tile=16, compression=8), rgb)
        deep = tiff(grey.astype(np.uint16) * 257, order=order, rows=7, photometric=1)
        yield Case(f"{name} 16 bit", deep, grey_as_rgb(grey[..., 0]))
        yield Case(f"{name} pages", tiff(rgb, order=order, rows=6, pages=3), rgb)
        for number in range(1, 9):
            turned = tiff(rgb, order=order, rows=9, more={274: ("H", [number])})
            yield Case(f"{name} orientation {number}", turned, UPRIGHT[number](rgb))
    for compression in ("tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd", "lzma"):
        yield Case(f"tif {compression}", saved(rgb, "TIFF", compression=compression), rgb)
    yield Case("tif jpeg", saved(rgb, "TIFF", compression="jpeg"), rgb, 4)
    alpha = rng.choice([0, 255, 90], rgb.shape[:2]).astype(np.uint8)
    yield Case("tif rgba", saved(np.dstack([rgb, alpha]), "TIFF", compression="tiff_lzw"), on_white(rgb, alpha), 0.6)
    bits = rng.integers(0, 2, rgb.shape[:2]).astype(bool)
    for compression in ("group3", "group4", "tiff_ccitt", "raw"):
        yield Case(f"tif {compression} 1 bit", saved(bits, "TIFF", compression=compression), grey_as_rgb(bits * 255))
    index, colours = _indexed(rng, rgb.shape[:2], 256)
    yield Case("tif palette", saved(_palette_image(index, colours), "TIFF"), colours[index])


# ------------------------------------------------------------------------------------------------ other formats

UPRIGHT = {  # what a viewer must do to stored pixels, from the EXIF specification
    1: lambda p: p,
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p.transpose(1, 0, 2), 2),
    8: lambda p: np.rot90(p, 1),
}


def _indexed(rng: np.random.Generator, shape: tuple[int, int], count: int) -> tuple[Array, Array]:
    return rng.integers(0, count, shape).astype(np.uint8), rng.integers(0, 256, (count, 3)).astype(np.uint8)


def _palette_image(index: Array, colours: Array) -> Image.Image:
    image = Image.fromarray(index).convert("L")
    image.putpalette(colours.tobytes())
    return image


def exif_of(orientation: int) -> Image.Exif:
    """EXIF that says nothing else."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def jpegs(rgb: Array) -> Iterator[Case]:
    """Baseline and progressive, grey, colour and CMYK, every subsampling, with and without restart markers."""
    for progressive in (False, True):
        for restart in ({}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 2}):
            how = {"quality": 92, "progressive": progressive, **restart}
            name = f"jpg {'progressive' if progressive else 'baseline'} {'restarts' if restart else 'plain'}"
            for subsampling in (0, 1, 2):
                yield Case(f"{name} {subsampling}", saved(rgb, "JPEG", subsampling=subsampling, **how), rgb, 7)
            yield Case(f"{name} grey", saved(rgb[..., 0].copy(), "JPEG", **how), grey_as_rgb(rgb[..., 0]), 4)
            yield Case(f"{name} cmyk", saved(rgb, "JPEG", "CMYK", **how), rgb, 7)


def turned(rgb: Array) -> Iterator[Case]:
    """Every orientation in every format that Pillow writes EXIF to."""
    for kind, suffix, near, options in (
        ("JPEG", "jpg", 4, {"quality": 95, "subsampling": 0}),
        ("PNG", "png", 0, {}),
        ("WEBP", "webp", 0, {"lossless": True}),
        ("AVIF", "avif", 8, {"quality": 95}),
    ):
        for number, upright in UPRIGHT.items() if writes(kind) else ():
            data = saved(rgb, kind, exif=exif_of(number), **options)
            yield Case(f"{suffix} orientation {number}", data, upright(rgb), near)


def pnms(rng: np.random.Generator, rgb: Array) -> Iterator[Case]:
    """All six, plain and raw, of 8 and 16 bits."""
    height, width = rgb.shape[:2]
    bits = rng.integers(0, 2, (height, width))
    size = b"%d %d" % (width, height)
    black_on_white = grey_as_rgb(255 - bits * 255)
    yield Case("pbm plain", b"P1 # bits\n" + size + b"\n" + _words(bits) + b"\n", black_on_white)
    yield Case("pbm raw", b"P4\n" + size + b"\n" + np.packbits(bits.astype(bool), axis=1).tobytes(), black_on_white)
    grey = rgb[..., 0]
    yield Case("pgm plain", b"P2\n" + size + b"\n255\n" + _words(grey) + b"\n", grey_as_rgb(grey))
    yield Case("pgm raw", b"P5\n" + size + b"\n255\n" + grey.tobytes(), grey_as_rgb(grey))
    deep = (grey.astype(">u2") * 257).tobytes()
    yield Case("pgm raw 16 bit", b"P5 " + size + b" 65535\n" + deep, grey_as_rgb(grey))
    few = np.round(grey * (100 / 255)).astype(np.uint8)
    shown = grey_as_rgb(np.round(few * 2.55))
    yield Case("pgm raw of 100", b"P5 " + size + b" 100\n" + few.tobytes(), shown, 0.6)
    yield Case("ppm plain", b"P3\n" + size + b"\n255\n" + _words(rgb) + b"\n", rgb)
    yield Case("ppm raw", b"P6\n" + size + b"\n255\n" + rgb.tobytes(), rgb)
    yield Case("ppm raw 16 bit", b"P6 " + size + b" 65535\n" + (rgb.astype(">u2") * 257).tobytes(), rgb)


def _words(values: Array) -> bytes:
    return " ".join(map(str, values.reshape(-1).tolist())).encode()


def others(rng: np.random.Generator, rgb: Array) -> Iterator[Case]:
    """What remains: GIF, BMP, TGA, WebP, JPEG 2000, AVIF, ICO."""
    alpha = rng.choice([0, 255], rgb.shape[:2]).astype(np.uint8)
    rgba, seen = np.dstack([rgb, alpha]), on_white(rgb, alpha)
    index, colours = _indexed(rng, rgb.shape[:2], 256)
    palette = _palette_image(index, colours)
    grey, grey_rgb = rgb[..., 0].copy(), grey_as_rgb(rgb[..., 0])
    for interlace in (0, 1):
        yield Case(f"gif interlace {interlace}", saved(palette, "GIF", interlace=interlace), colours[index])
    frames = [Image.fromarray(rgb[::-1].copy())]
    yield Case("gif grey animated", saved(grey, "GIF", save_all=True, append_images=frames), grey_rgb)
    clear = int(index[0, 0])
    gone = np.where((index == clear)[..., None], 255, colours[index])
    yield Case("gif transparent", saved(palette, "GIF", transparency=clear), gone)
    yield Case("png animated", saved(rgb, "PNG", save_all=True, append_images=frames), rgb)
    for kind in ("BMP", "TGA"):
        yield Case(f"{kind} rgb", saved(rgb, kind), rgb)
        yield Case(f"{kind} grey", saved(grey, kind), grey_rgb)
        yield Case(f"{kind} palette", saved(palette, kind), colours[index])
    yield Case("tga rgba", saved(rgba, "TGA"), seen)
    yield Case("tga packed", saved(rgb, "TGA", compression="tga_rle"), rgb)
    yield Case("bmp 1 bit", saved(grey > 128, "BMP"), grey_as_rgb((grey > 128) * 255))
    if writes("WEBP"):
        yield Case("webp lossless", saved(rgb, "WEBP", lossless=True), rgb)
        yield Case("webp lossless rgba", saved(rgba, "WEBP", lossless=True, exact=True), seen)
        yield Case("webp lossy", saved(rgb, "WEBP", quality=90), rgb, 7)
        yield Case("webp animated", saved(rgb, "WEBP", lossless=True, save_all=True, append_images=frames), rgb)
    yield Case("jp2 lossless", saved(rgb, "JPEG2000"), rgb)
    yield Case("jp2 tiles", saved(rgb, "JPEG2000", tile_size=(16, 16)), rgb)
    yield Case("j2k lossy", saved(rgb, "JPEG2000", no_jp2=True, irreversible=True), rgb, 4)
    yield Case("jp2 grey", saved(grey, "JPEG2000"), grey_rgb)
    if writes("AVIF"):
        yield Case("avif", saved(rgb, "AVIF", quality=95), rgb, 8)
        yield Case("avif animated", saved(rgb, "AVIF", quality=95, save_all=True, append_images=frames), rgb, 8)
    edge = min(rgb.shape[0], rgb.shape[1])
    square = rgba[:edge, :edge]
    icons = {"sizes": [(edge, edge)]}
    yield Case("ico png", saved(square, "ICO", **icons), seen[:edge, :edge])
    yield Case("ico bmp", saved(square, "ICO", bitmap_format="bmp", **icons), seen[:edge, :edge])


def intact(seed: int) -> list[Case]:
    """One of every kind, none damaged."""
    rng = np.random.default_rng(seed)
    rgb = picture(rng, int(rng.integers(17, 45)), int(rng.integers(17, 45)))
    return [*jpegs(rgb), *pngs(rng, rgb), *tiffs(rng, rgb), *turned(rgb), *pnms(rng, rgb), *others(rng, rgb)]
