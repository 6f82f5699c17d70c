"""What the script of an audit's page knows. In: items. Out: columns of images and items, and each picture once."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcache.errors import RefusedImage
from featcache.images.decode import strict_decoding
from featcache.images.headers import read_header
from featcache.reports.audit.items import Item, Subject, answers, most_alike, proposed
from featcache.reports.elements.numbers import bytes_text
from featcache.reports.elements.pictures import Pictures
from featcache.reports.elements.thumbnails import Thumbnail, fitting_size
from featcache.spec import SPLITS

COPIES_SHOWN = 24  # of a group; the others share its decision
_LARGE, _BYTES_OF_LARGE, _SMALL, _LEAST = 256, 8000, 96, 64  # pixels and bytes of pictures; of those that are evidence only
_OF_EVIDENCE = 0.3  # of the bytes
_FOUR_THIRDS = 4 / 3  # base64


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image of the page.

    Attributes:
        row: its number in the cache. split: its name, empty: none. size: in pixels, (0, 0): not known.
        picture: or why there is none. number: of its picture among the page's, -1: none.
    """

    row: int
    path: str
    label: str | None
    split: str
    bytes: int
    size: tuple[int, int]
    picture: Thumbnail
    number: int

    @property
    def facts(self) -> str:
        """Size in pixels and bytes."""
        return ", ".join([f"{self.size[0]} × {self.size[1]} px"] * any(self.size) + [bytes_text(self.bytes)])

    @property
    def words(self) -> str:
        """For who does not see the picture."""
        return ", ".join(filter(None, [self.path, self.label, self.split]))


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """Items, and the images that they show: by row; first those that are decided on, then evidence. ``uris``: each picture once."""

    subject: Subject
    items: Sequence[Item]
    images: dict[int, Shown]
    uris: list[str]

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        """Row -> number among ``images``."""
        return {row: k for k, row in enumerate(self.images)}

    @property
    def left_out(self) -> int:
        """Images whose picture did not fit in."""
        return sum(one.picture.reason.startswith("left out") for one in self.images.values())

    @property
    def missing(self) -> int:
        """Images whose file is not there, is no longer the same, or cannot be decoded."""
        return sum(one.picture.webp is None for one in self.images.values()) - self.left_out


def gather(subject: Subject, items: Sequence[Item], root: Path | None, *, budget: int) -> Material:
    """Read the images of ``items`` in the folder ``root``, if there is one; ``budget``: bytes of all pictures on the page."""
    decided = list(dict.fromkeys(row for item in items for row in item.rows[:COPIES_SHOWN]))
    evidence = list(dict.fromkeys(row for item in items for row, _ in most_alike(subject, item)))
    finder = Pictures(root)
    first, second = (_by_content(subject, rows) for rows in (decided, evidence))
    second = {digest: row for digest, row in second.items() if digest not in first}
    total = int(budget / _FOUR_THIRDS)
    kept = int(total * _OF_EVIDENCE) if second else 0
    large = len(first) * _BYTES_OF_LARGE <= total - kept
    edge = _LARGE if large else max(fitting_size(len(first), total - kept), _LEAST)
    found = _thumbnails(finder, subject, first, size=edge, budget=total - kept)
    found |= _thumbnails(finder, subject, second, size=_SMALL, budget=kept)
    numbers = {digest: k for k, digest in enumerate(digest for digest, one in found.items() if one.webp)}
    sizes = _sizes(subject, [row for item in items if item.is_copies for row in item.rows[:COPIES_SHOWN]], root, numbers)
    none = Thumbnail(None, "no picture of so many copies")
    images = {}
    for row in dict.fromkeys([*decided, *(row for item in items for row in item.rows), *evidence]):
        digest = subject.digests[row].tobytes()
        label = int(subject.labels[row])
        images[row] = Shown(
            row=row,
            path=subject.paths[row],
            label=subject.classes[label] if label >= 0 else None,
            split=SPLITS[subject.splits[row]] if subject.splits[row] else "",
            bytes=int(subject.sizes[row]),
            size=sizes.get(row, (0, 0)),
            picture=found.get(digest, none),
            number=numbers.get(digest, -1),
        )
    return Material(subject, items, images, [one.uri for one in found.values() if one.uri])


def _by_content(subject: Subject, rows: Sequence[int]) -> dict[bytes, int]:
    """Digest -> the first row of that content, in the order of ``rows``."""
    found: dict[bytes, int] = {}
    for row in rows:
        found.setdefault(subject.digests[row].tobytes(), row)
    return found


def _thumbnails(
    finder: Pictures, subject: Subject, rows: dict[bytes, int], *, size: int, budget: int
) -> dict[bytes, Thumbnail]:
    names = [subject.paths[row] for row in rows.values()]
    return dict(zip(rows, finder.thumbnails(names, [*rows], size=size, budget=budget), strict=True))


def _sizes(
    subject: Subject, rows: Sequence[int], root: Path | None, there: dict[bytes, int]
) -> dict[int, tuple[int, int]]:
    """Pixels of those whose file is the one that was embedded; the others are not known."""
    found = {}
    by_content: dict[bytes, tuple[int, int]] = {}
    with strict_decoding():
        for row in rows:
            digest = subject.digests[row].tobytes()
            if root is not None and digest in there and digest not in by_content:
                with contextlib.suppress(RefusedImage, OSError):
                    header = read_header(root / subject.paths[row])
                    by_content[digest] = (header.width, header.height)
            if digest in by_content:
                found[row] = by_content[digest]
    return found


def columns(material: Material, words: Sequence[str], kinds: Sequence[str], *, listed: int) -> dict[str, Any]:
    """Everything that the script needs. ``words``: one for each of ``kinds``. ``listed``: items that the page lists without it.

    Their pictures are null here: the script takes them from that list, so that each is on the page once.
    """
    subject, items, images = material.subject, material.items, list(material.images.values())
    on_list = {material.images[row].number for item in items[:listed] for row in item.rows[:COPIES_SHOWN]}
    rows = list(dict.fromkeys(row for item in items for row in item.rows))
    identity = hashlib.sha256(b"".join(subject.paths[row].encode("utf-8", "surrogatepass") + b"\0" for row in rows))
    identity.update(subject.digests[rows].tobytes())
    identity.update(repr([(item.kinds, item.rows) for item in items]).encode())
    classes = {name: k for k, name in enumerate(subject.classes)}
    return {
        "fingerprint": identity.hexdigest()[:16],
        "classes": list(subject.classes),
        "splits": list(SPLITS[1:]),
        "words": list(words),
        "most": COPIES_SHOWN,
        "pictures": [None if k in on_list else uri for k, uri in enumerate(material.uris)],
        "images": {
            "path": [one.path for one in images],
            "label": [-1 if one.label is None else classes[one.label] for one in images],
            "split": [one.split for one in images],
            "sha256": [subject.digests[one.row].tobytes().hex() for one in images[: len(rows)]],
            "facts": [one.facts for one in images],
            "picture": [one.number for one in images],
            "why": [one.picture.reason for one in images],
        },
        "items": {
            "kinds": [[kinds.index(kind) for kind in item.kinds] for item in items],
            "score": [round(item.score, 4) for item in items],
            "rows": [[material.numbers[row] for row in item.rows] for item in items],
            "reasons": [item.reasons for item in items],
            "keep": [keep(material, item) for item in items],
            "suggested": [-1 if item.suggested is None else item.suggested for item in items],
            "answers": [_flat(answers(subject, item)) for item in items],
            "alike": [
                _flat((material.numbers[row], score) for row, score in most_alike(subject, item)) for item in items
            ],
        },
    }


def keep(material: Material, item: Item) -> int:
    """The place of the copy that is proposed to be kept; -1 for what is no group."""
    if not item.is_copies:
        return -1
    images = [material.images[row] for row in item.rows]
    return proposed(material.subject, item.rows, [one.size[0] * one.size[1] for one in images])


def _flat(pairs: Any) -> list[Any]:
    """Shares and similarities in ten-thousandths."""
    return [value for number, share in pairs for value in (number, round(10_000 * share))]
