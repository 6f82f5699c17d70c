"""What is kept of an image to train on: the whole of it, somewhat larger than the network's input, for crops of all sizes.

In: a file's bytes. Out: uint8 (H, W, 3). Imports little, as worker processes decode by it.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from featcache.images.decode import decode_pixels
from featcache.images.formats import Brightest
from featcache.images.preprocess import MOST_PIXELS, resize
from featcache.spec import PreprocessSpec

Picture = npt.NDArray[np.uint8]
_ENLARGED = 10 / 7  # stored edge of training images / edge of the network's input: room for random crops


@dataclasses.dataclass(frozen=True)
class TrainingInput:
    """The whole image, its shorter edge somewhat longer than the input of the network whose ``spec`` it is, never enlarged."""

    spec: PreprocessSpec

    def __call__(self, data: bytes, *, seen: Brightest | None = None) -> Picture:
        """Of a file's bytes. ``seen``: not told, as ``extract`` was. Raises RefusedImage."""
        edge = round(max(self.spec.crop) * _ENLARGED)
        image = _shortened(decode_pixels(data, white_level=self.spec.white_level), edge)
        height, width, _ = image.shape
        factor = edge / min(height, width)
        if factor >= 1:
            return np.array(image)  # a copy: of a narrow image the ends would stay in memory
        return resize(image, (max(1, round(height * factor)), max(1, round(width * factor))), "bilinear")


def _shortened(image: Picture, edge: int) -> Picture:
    """Cut off both ends of an image so narrow that it would have more than ``MOST_PIXELS``, its shorter edge ``edge``."""
    height, width, _ = image.shape
    shorter = min(height, width)
    longest = MOST_PIXELS // min(shorter, edge) * max(shorter, edge) // edge
    top, left = (max(0, length - longest) // 2 for length in (height, width))
    return image[top : height - top, left : width - left]
