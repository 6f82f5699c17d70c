"""Why an image was not embedded: a state of that image, with a reason fit to be stored and shown."""

import dataclasses


class RefusedImage(Exception):  # noqa: N818 - a state of an image, not an error of the program
    """One image cannot be embedded; ``str()`` is the reason, fit to be stored."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An image that was not embedded: its path relative to the root, and why.

    ``position`` is how many images are listed before it.
    """

    path: str
    reason: str
    position: int = 0
