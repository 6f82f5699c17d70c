"""Every kind of pixels that a format can hold is decoded to the right picture or refused, never to another picture."""

import formats
import pytest
from formats import FORMATS

from featcache.errors import RefusedImage
from featcache.images.decode import decode_pixels, strict_decoding

RIGHT = {
    "PNG": 87,
    "TIFF": 261,
    "TGA": 120,
    "BMP": 100,
    "PNM": 42,
    "WebP": 2,
    "JPEG 2000": 20,
}  # at least; the rest is refused


@pytest.mark.parametrize("name", FORMATS)
def test_right_or_refused(name: str) -> None:
    faults, right = [], 0
    with strict_decoding():
        for entry in FORMATS[name]():
            try:
                fault = formats.wrong(entry, decode_pixels(entry.data))
            except RefusedImage as reason:
                assert str(reason).strip(), entry.name
            else:
                faults += [fault] if fault else []
                right += not fault
    assert not faults, f"{len(faults)}:\n" + "\n".join(faults)
    assert right >= RIGHT[name]
