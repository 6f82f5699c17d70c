"""What the samples of a file mean where Pillow takes them for something else: the formats' definitions, not Pillow, decide.

In: an image that Pillow has opened, not loaded, and the file's bytes. Out: ``Reading``: how its samples become 8-bit RGB; or
``RefusedImage`` where nothing says what black and white are, or Pillow loses what would say it. What Pillow opens well
enough is mended in place before it is loaded.

Sources: PNG ISO 15948, TIFF 6.0, TIFF/EP, Adobe DNG 1.7, Truevision TGA 2.0, Microsoft's BITMAPINFOHEADER and V4, JPEG 2000 ISO 15444-1.
"""

import dataclasses
import io
import logging
import mmap
import re
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageOps, ImagePalette

from featcache.errors import RefusedImage

Content = bytes | mmap.mmap
log = logging.getLogger("featcache")
REVISION = 2  # of all that a file's bytes are turned into; more whenever a picture comes out otherwise than before
_PNG = b"\x89PNG\r\n\x1a\n"
_PICTURE = {b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"}  # ancillary chunks of a PNG that change the picture
_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
_RAW = "a camera's raw data: export it as JPEG or TIFF, from the camera's program or by `darktable-cli FILE FILE.jpg`"
# fmt: off
_ELSEWHERE = [(re.compile(begins, re.DOTALL), words) for begins, words in (
    (rb"II(?:R[OS]|U\0|\x1a\0|II)|MMOR|FUJIFILMCCD-RAW|FOVb|\0MRM|.{4}ftypcrx |II\*\0.{4}CR", _RAW),
    (rb"II[*+]\0|MM\0[*+]", f"a TIFF of a kind that is not read, or {_RAW}"),
    (rb"\s*(?:<\?xml.{,999})?<svg[\s/>]", "not an image of pixels but SVG: export it as PNG"),
    (rb"8BPS", "a Photoshop file is made of layers: export it as PNG or TIFF"),
    (rb"%PDF-", "not an image but a PDF: save its pages as images, as by `pdftoppm -png FILE PAGE`"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "not an image but PostScript, which is a program: export it as PNG"),
    (rb".{4}ftyp(?!avi[fs]|m[is]f1)|\x1aE\xdf\xa3|RIFF.{4}AVI ",
     "not an image but a video: take frames out of it, as by `ffmpeg -i FILE -r 1 FRAMES/%06d.jpg`"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL is not read: convert it, as by `djxl FILE FILE.png`"),
    (rb".{128}DICM", "DICOM leaves open what is black and white: export it as PNG from a viewer"),
    (rb"v/1\x01", "OpenEXR leaves open what is white: export it as PNG or TIFF of 8 or 16 bits"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "not an image but an archive: give a .zip or .tar itself as the source, or unpack it"),
    (rb"(?i)\s*<(?:!doctype )?html", "not an image but a web page, as a failed download leaves: download the image again"),
    (rb"version https://git-lfs", "not an image but what Git LFS leaves in its place: run `git lfs pull`"),
)]
# fmt: on
_TURNING = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"exif\0")  # texts that may hold an orientation


def no_image(data: bytes) -> str:
    """What to say of a file that Pillow does not know: what it is, as far as that can be told, and what to do."""
    known = (words for begins, words in _ELSEWHERE if begins.match(data))
    return next(known, "not an image, or of an unsupported format")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the samples of an opened image become 8-bit RGB.

    Attributes:
        white: the sample that is white, of more than 8 bits; 0 if there is none. inverted: white is 0, black is ``white``.
        assumed: nothing says that ``white`` is white, it is the largest number of 16 bits.
        alpha: ``straight``, ``premultiplied``, a ``bit`` that some take for opaque and some for clear, or ``none``: what looks
            like alpha means nothing.
        clear: the 16-bit colour that is transparent.
        mended: whether the opened image was changed.
    """

    white: int = 0
    inverted: bool = False
    assumed: bool = False
    alpha: str = "straight"
    clear: tuple[int, int, int] | None = None
    mended: bool = False

    @property
    def is_new(self) -> bool:
        """Whether revision 0 of this module made another picture of such an image."""
        return dataclasses.replace(self, assumed=False, white=self.white % 65535) != Reading()


def reading_of(image: Any, data: Content) -> Reading:
    """How to read an opened image, which is mended in place. Raises RefusedImage."""
    kinds = {"PNG": _png, "TIFF": _tiff, "TGA": _tga, "BMP": _bmp, "DIB": _bmp, "JPEG2000": _jpeg2000, "HEIF": _heif}
    reading = kinds[image.format](image, data) if image.format in kinds else Reading()
    return reading if reading.white else dataclasses.replace(reading, **_depth(image))


def _depth(image: Any) -> dict[str, Any]:
    """``white`` and ``assumed`` of an opened image whose format has nothing special to say of them."""
    if not image.tile:
        return {}
    raw, *rest = _arguments(image.tile[0])
    if image.format == "PPM":  # which knows what is white
        top = rest[0] if rest and image.tile[0].codec_name.startswith("ppm") else 65535 if ";16" in raw else 255
        return {"white": 65535, "assumed": top == 65535} if top > 255 else {}
    deep = image.format in ("PNG", "TIFF") and ";16" in raw and image.mode != "CMYK"
    return {"white": 65535, "assumed": True} if deep or image.mode.startswith("I;16") else {}


def _arguments(tile: Any) -> tuple[Any, ...]:
    """Of Pillow's decoder; the first is its name for how samples are stored."""
    return (tile.args,) if isinstance(tile.args, str) else tuple(tile.args)


# -------------------------------------------------------------------------------------------------------------- PNG


def plain_png(data: bytes) -> bytes:
    """A PNG without the chunks that say nothing of the picture, so that neither their size nor their damage matters.

    Other files as they are. Raises RefusedImage where a checksum is wrong that matters; those of pixels are not looked at.
    """
    if not data.startswith(_PNG):
        return data
    view, kept, start = memoryview(data), [], 0
    for kind, at, end in _chunks(data):
        if kind in (b"IDAT", b"fdAT"):
            continue
        sound = zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")
        turning = sound and kind in _TEXTS and bytes(view[at + 8 : at + 40]).startswith(_TURNING)
        if kind[0] & 32 and kind not in _PICTURE and not turning:
            kept.append(view[start:at])
            start = end
        elif not sound and kind in (b"IHDR", b"PLTE", b"tRNS", b"eXIf"):
            raise RefusedImage(f"damaged: wrong checksum of PNG chunk {kind.decode()}")
    return b"".join([*kept, view[start:]]) if kept else data


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the chunks of a PNG, as far as they are whole."""
    at = len(_PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if at + 12 + length > len(data) or kind == b"IEND":
            return
        yield kind, at, at + 12 + length
        at += 12 + length


def _png(image: Any, _: Content) -> Reading:
    clear = image.info.get("transparency")
    return Reading(clear=clear) if image.tile and image.tile[0].args == "RGB;16B" and clear is not None else Reading()


# ------------------------------------------------------------------------------------------------------------- TIFF


def _tiff(image: Any, data: Content) -> Reading:
    tags = image.tag_v2
    # CR2; DNG; others begin with a thumbnail, NewSubfileType 1, and say where the whole image is, SubIFDs.
    if data[8:10] == b"CR" or 50706 in tags or (330 in tags and tags.get(254, 0) & 1):
        raise RefusedImage(_RAW)
    bits, photometric, kinds = tags.get(258, (1,))[0], tags.get(262), tags.get(339, (1,))
    if photometric is None:
        raise RefusedImage("the TIFF does not say whether 0 is black or white (PhotometricInterpretation)")
    if set(kinds) != {1}:
        what = {2: "signed", 3: "floating-point"}.get(kinds[0], "other than unsigned")
        raise RefusedImage(f"{what} samples have no defined range; save it with unsigned samples of 8 or 16 bits")
    mended = tags.get(284, 1) == 2 and _mend_planes(image, bits)
    if photometric == 6 and not image.use_load_libtiff and tuple(tags.get(530, (2, 2))) != (1, 1):
        raise RefusedImage("uncompressed YCbCr of reduced resolution is not read; save the TIFF as RGB")
    inverted = photometric == 0 and image.mode.startswith("I")
    return Reading(white=4095 if bits == 12 else 0, inverted=inverted, mended=mended)


def _mend_planes(image: Any, bits: int) -> bool:
    """Pillow takes the first letters of a mode's name for the names of its planes. Returns whether anything was changed."""
    if image.tag_v2.get(277, 1) == 1:  # one plane: there is nothing to separate
        image.tag_v2[284] = 1
        image._setup()
        return not image.use_load_libtiff
    if image.mode not in ("RGB", "RGBA", "CMYK"):
        raise RefusedImage(f"planes of their own are not read of a TIFF of mode {image.mode}; save it interleaved")
    if bits == 8 or image.use_load_libtiff:
        return False
    if image.mode != "RGB":
        raise RefusedImage(f"planes of {bits} bits are not read of a TIFF of mode {image.mode}; save it interleaved")
    order = "B" if image.tag_v2.prefix == b"MM" else "L"
    image.tile = [tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:])) for tile in image.tile]
    return True


# ------------------------------------------------------------------------------------------------ TGA, BMP, JPEG 2000, HEIF


def _tga(image: Any, data: Content) -> Reading:
    """Alpha is what the descriptor and, in version 2, the extension area say."""
    depth = data[7] if image.mode == "P" else data[16]
    if depth not in (16, 32):
        return Reading()
    kind = 3
    if data[-18:] == b"TRUEVISION-XFILE.\0" and (start := int.from_bytes(data[-26:-22], "little")):
        kind = (data[start + 494 : start + 495] or b"\3")[0]
    if not data[17] & 15 or kind in (0, 1, 2):
        return Reading(alpha="none")
    straight = "bit" if depth == 16 and image.mode != "LA" else "straight"
    return Reading(alpha="premultiplied" if kind == 4 else straight)


def _bmp(image: Any, data: Content) -> Reading:
    """A palette that looks like a scale of greys makes Pillow take indices for greys, whatever their depth."""
    start = 14 if image.format == "BMP" else 0
    size = int.from_bytes(data[start : start + 4], "little")
    bits = int.from_bytes(data[start + 14 : start + 16], "little") if size > 12 else data[start + 10]
    if bits == 16 and size >= 56 and image.info["compression"] == 3 and any(data[start + 52 : start + 56]):
        raise RefusedImage("BMP of 16 bits with alpha is not read; save it with 32 bits")
    if image.mode not in ("1", "L") or bits == {"1": 1, "L": 8}[image.mode]:
        return Reading()
    greys = [0, 255] if image.mode == "1" else list(range(2**bits))
    tile = image.tile[0]
    raw = "P" if tile.codec_name == "bmp_rle" or bits == 8 else f"P;{bits}"
    image._mode, image.palette = "P", ImagePalette.raw("RGB", bytes(grey for grey in greys for _ in range(3)))
    image.tile = [tile._replace(args=(raw, *tile.args[1:]))]
    return Reading(mended=True)


def _jpeg2000(_: Any, data: Content) -> Reading:
    """Pillow shifts samples to 8 bits: those of fewer bits come out too dark, of more than 8 in colour white comes out black."""
    start = data.find(b"\xff\x4f\xff\x51") + 2  # SIZ
    count = int.from_bytes(data[start + 38 : start + 40], "big")
    depths = set(data[start + 40 : start + 40 + 3 * count : 3])
    if any(depth & 128 for depth in depths):
        raise RefusedImage("signed samples have no defined range; save it with unsigned samples of 8 bits")
    bits = max(depths) + 1
    if bits != 8 and (count > 1 or not 8 < bits <= 16):
        raise RefusedImage(f"JPEG 2000 with {count} samples of {bits} bits is not read; save it with 8 bits")
    return Reading(white=65535 if bits > 8 else 0, assumed=bits == 16)  # Pillow shifts them to 16 bits


def _heif(image: Any, _: Content) -> Reading:
    """Grey of more than 8 bits is shifted to 16; colour comes with 8."""
    bits = image.info["bit_depth"]
    return Reading(white=(1 << 16) - (1 << 16 - bits)) if image.mode.startswith("I") else Reading()


# ------------------------------------------------------------------------------------------------------ conversions


def orientation(image: Image.Image) -> int:
    """1 to 8, as the EXIF data of an opened image asks for; 1, upright, where none can be read."""
    try:
        asked = image.getexif().get(0x0112, 1)
    except Exception:  # nearly anything; it says nothing about the pixels
        return 1
    return int(asked) if asked in range(2, 9) else 1


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF data of an opened image asks for another orientation."""
    return orientation(image) > 1


class Brightest:
    """The largest sample of the 16-bit images that were read. Threads may share it."""

    def __init__(self) -> None:
        self.images, self.sample, self._said, self._lock = 0, 0, False, threading.Lock()

    def see(self, sample: int) -> None:
        """One more image, whose largest sample this is."""
        with self._lock:
            self.images, self.sample = self.images + 1, max(self.sample, sample)

    def warn(self, *, at_least: int = 1) -> None:
        """Say, once, that images use too little of the range, if there are ``at_least`` so many."""
        if self._said or self.images < at_least or not 0 < self.sample * 10 < 65535:
            return
        self._said, bits = True, self.sample.bit_length()
        log.warning(
            "images of 16 bits use at most %.0f %% of the range (%d of 65535, in %d seen) and come out nearly black; if their "
            "samples have %d bits, extract with --white-level %d",
            *(self.sample / 655.35, self.sample, self.images, bits, 2**bits - 1),
        )


def to_rgb(
    image: Image.Image, reading: Reading, data: bytes, *, white_level: int | None = None, seen: Brightest | None = None
) -> Image.Image:
    """A loaded, upright image as 8-bit RGB.

    Args:
        image, reading: as opened and loaded; what ``reading_of`` said of it.
        data: the file, ``plain_png``.
        white_level: the 16-bit sample that is white where the format does not say so; 65535 when None.
        seen: is told the largest sample of such images if no level is given.

    Raises:
        RefusedImage: samples without a defined range, or that cannot be read with a white level.
    """
    if reading.white and image.mode[0] == "I":
        return _grey(image, reading, white_level, seen)
    if reading.assumed and seen and not white_level:
        bands: Any = image.getextrema()
        seen.see(257 * max(high for _, high in bands[:3]))
    if reading.clear or (reading.assumed and white_level):
        image = _deep_colour(image, reading, data, white_level or reading.white)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F"):
        raise RefusedImage(f"32-bit pixels (mode {image.mode}) have no defined range; save it with 8 or 16 bits")
    opaque = reading.alpha == "none" or not image.has_transparency_data
    return image.convert("RGB") if opaque else _on_white(image, reading.alpha)


def _grey(image: Image.Image, reading: Reading, white_level: int | None, seen: Brightest | None) -> Image.Image:
    """Of more than 8 bits."""
    values, white = np.asarray(image).astype(np.uint32), reading.white
    if reading.assumed and seen and not white_level:
        seen.see(int(values.max()))
    white = white_level or white if reading.assumed else white
    clear = values == image.info.get("transparency", -1)
    values = white - np.minimum(values, white) if reading.inverted else values
    values[clear] = white
    return Image.fromarray(_scaled(values, white)).convert("RGB")


def _scaled(samples: npt.NDArray[np.uint32], white: int) -> npt.NDArray[np.uint8]:
    return np.minimum((samples * 255 + white // 2) // white, 255).astype(np.uint8)


def _deep_colour(image: Image.Image, reading: Reading, data: bytes, white: int) -> Image.Image:
    """RGB or RGBA of 8 bits, made of all 16: Pillow's own pixels are the upper bytes."""
    samples = np.asarray(image).astype(np.uint32) << 8 | np.asarray(_lower_bytes(image, data))
    colour, alpha = _scaled(samples[..., :3], white), np.asarray(image)[..., 3:]
    if reading.clear:
        alpha = np.where((samples == reading.clear).all(axis=2, keepdims=True), 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([colour, alpha]))


def _lower_bytes(image: Image.Image, data: bytes) -> Image.Image:
    """The file once more, read as if of the other byte order."""
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    with Image.open(io.BytesIO(data), formats=(image.format or "",)) as low:
        reading_of(low, data)  # which mends it as it mended the first
        for number, tile in enumerate(low.tile):
            raw, *rest = _arguments(tile)
            if raw.split(";16")[0] not in ("RGB", "RGBA", "RGBX", "R", "G", "B") or ";16" not in raw:
                raise RefusedImage(f"16-bit samples of {image.format} {raw} cannot be read with a white level")
            low.tile[number] = tile._replace(args=(raw[:-1] + other[raw[-1]], *rest))
        low.load()
        return ImageOps.exif_transpose(low) if is_turned(low) else low


def _on_white(image: Image.Image, kind: str) -> Image.Image:
    layers = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if kind == "bit":
        if layers.getchannel("A").getextrema() == (0, 255):
            raise RefusedImage(
                "TGA of 16 bits does not define which value of its alpha bit is opaque; save it with 32 bits"
            )
        return layers.convert("RGB")
    if kind == "premultiplied":
        light = ImageChops.invert(layers.getchannel("A"))
        return ImageChops.add(layers.convert("RGB"), Image.merge("RGB", [light] * 3))
    return Image.alpha_composite(Image.new("RGBA", layers.size, (255, 255, 255, 255)), layers).convert("RGB")
