"""What the script of an audit's page knows. In: items. Out: columns of images and items, and each picture once."""

import base64
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from featcache.curation.audit import Found
from featcache.curation.finding import KINDS, Kind
from featcache.images.headers import header_of
from featcache.images.read import Paths, read_images
from featcache.reports.audit.items import Item, answers, most_alike, proposed
from featcache.reports.elements.numbers import bytes_text
from featcache.reports.elements.pictures import Pictures
from featcache.reports.elements.thumbnails import Thumbnail, fitting_size
from featcache.spec import SPLITS

COPIES_SHOWN = 24  # of a group; the others share its decision
LISTED = 50_000  # images of a cache up to which a page can write a plan of all by itself, in some megabytes
_LARGE, _BYTES_OF_LARGE, _SMALL, _LEAST = (
    256,
    8000,
    96,
    64,
)  # pixels and bytes of pictures; of those that are evidence only
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
        """Size in pixels and bytes, as far as they are known: of imported vectors neither may be."""
        return ", ".join(
            [f"{self.size[0]} × {self.size[1]} px"] * any(self.size) + [bytes_text(self.bytes)] * (self.bytes > 0)
        )

    @property
    def words(self) -> str:
        """For who does not see the picture."""
        return ", ".join(filter(None, [self.path, self.label, self.split]))


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """Items, and the images that they show: by row; first those that are decided on, then evidence. ``uris``: each picture once."""

    found: Found
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

    def keep(self, item: Item) -> int:
        """The place of the copy that is proposed to be kept; -1 for what is no group."""
        if not item.is_copies:
            return -1
        sizes = [self.images[row].size for row in item.rows]
        return proposed(self.found.cache.rows, item.rows, [width * height for width, height in sizes])


def gather(
    found: Found, items: Sequence[Item], *, budget: int, progress: Callable[[int, int], None] = lambda *_: None
) -> Material:
    """Read the images of ``items`` in the audit's folder, if there is one; ``budget``: bytes of all pictures on the page.

    progress: called with pictures made and to make: of those that are decided on, then of evidence.
    """
    decided = list(dict.fromkeys(row for item in items for row in item.rows[:COPIES_SHOWN]))
    evidence = list(dict.fromkeys(row for item in items for row, _ in most_alike(found, item)))
    pictures = _pictures(Pictures(found.root, progress=progress), found, decided, evidence, budget)
    numbers = {digest: k for k, digest in enumerate(digest for digest, one in pictures.items() if one.webp)}
    sizes = _sizes(found, decided, set(numbers))
    none = Thumbnail(None, f"the first {COPIES_SHOWN} copies have a picture")
    cache, images = found.cache, {}
    for row in dict.fromkeys([*(row for item in items for row in item.rows), *evidence]):
        digest, label = cache.rows.digests[row].tobytes(), int(cache.y[row])
        images[row] = Shown(
            row=row,
            path=cache.paths[row],
            label=cache.classes[label] if label >= 0 else None,
            split=_SPLITS[cache.rows.splits[row]],
            bytes=int(cache.rows.sizes[row]),
            size=sizes.get(row, (0, 0)),
            picture=pictures.get(digest, none),
            number=numbers.get(digest, -1),
        )
    return Material(found, items, images, [one.uri for one in pictures.values() if one.uri])


_SPLITS = ("", *SPLITS[1:])


def _pictures(
    finder: Pictures, found: Found, decided: Sequence[int], evidence: Sequence[int], budget: int
) -> dict[bytes, Thumbnail]:
    """Digest -> picture: as large as fits of what is decided on, small ones of what is evidence only."""
    digests = found.cache.rows.digests
    first: dict[bytes, int] = {}
    for row in decided:
        first.setdefault(digests[row].tobytes(), row)
    second: dict[bytes, int] = {}
    for row in evidence:
        if (digest := digests[row].tobytes()) not in first:
            second.setdefault(digest, row)

    def made(rows: dict[bytes, int], size: int, room: int) -> dict[bytes, Thumbnail]:
        names = [found.cache.paths[row] for row in rows.values()]
        return dict(zip(rows, finder.thumbnails(names, [*rows], size=size, budget=room), strict=True))

    total = int(budget / _FOUR_THIRDS)
    room = total - int(total * _OF_EVIDENCE) * bool(second)
    size = _LARGE if len(first) * _BYTES_OF_LARGE <= room else max(fitting_size(len(first), room), _LEAST)
    return made(first, size, room) | made(second, _SMALL, total - room)


def _sizes(found: Found, rows: Sequence[int], there: set[bytes]) -> dict[int, tuple[int, int]]:
    """Pixels of those whose file is the one that was embedded; the others are not known."""
    if found.root is None:
        return {}
    digests = {row: found.cache.rows.digests[row].tobytes() for row in rows}
    first = {digest: row for row, digest in reversed(digests.items()) if digest in there}
    files = Paths(found.root, tuple(found.cache.paths[row] for row in first.values()))
    headers = {read.digest: read.value for read in read_images(files, range(len(first)), header_of)}
    sizes = {digest: (header.width, header.height) for digest, header in headers.items() if header is not None}
    return {row: sizes[digest] for row, digest in digests.items() if digest in sizes}


def columns(material: Material, words: Sequence[str], *, still: int, listed: int = LISTED) -> dict[str, Any]:
    """Everything that the script needs.

    Images come in three parts: those that are decided on, evidence, and all others of the cache, for the plan.

    Args:
        words: one for each kind. still: items that the page lists without script. Their pictures are null here: the script takes
            them from that list, so that each is on the page once.
        listed: images of a cache up to which the third part is there.
    """
    found, items, shown = material.found, material.items, list(material.images.values())
    cache = found.cache
    on_list = {material.images[row].number for item in items[:still] for row in item.rows[:COPIES_SHOWN]}
    whole = len(cache) <= listed
    rows = (
        [*material.images, *(row for row in range(len(cache)) if row not in material.images)]
        if whole
        else [*material.images]
    )
    digests = cache.rows.digests[rows].tobytes()
    kinds = _kinds(found)
    return {
        "fingerprint": _fingerprint(material),
        "classes": list(cache.classes),
        "splits": _SPLITS,
        "kinds": KINDS,
        "words": list(words),
        "most": COPIES_SHOWN,
        "whole": whole,
        "pictures": [None if k in on_list else uri for k, uri in enumerate(material.uris)],
        "images": {
            "row": rows,
            "path": [cache.paths[row] for row in rows],
            "label": cache.y[rows].tolist(),
            "split": cache.rows.splits[rows].tolist(),
            "found": [sum(1 << KINDS.index(kind) for kind in kinds.get(row, ())) for row in rows],
            "digests": base64.b64encode(digests).decode(),
            "facts": [one.facts for one in shown],
            "picture": [one.number for one in shown],
            "why": [one.picture.reason for one in shown],
        },
        "items": {
            "kinds": [[KINDS.index(kind) for kind in item.kinds] for item in items],
            "score": [round(item.score, 4) for item in items],
            "rows": [[material.numbers[row] for row in item.rows] for item in items],
            "reasons": [item.reasons for item in items],
            "keep": [material.keep(item) for item in items],
            "suggested": [-1 if item.suggested is None else item.suggested for item in items],
            "answers": [_flat(answers(found, item)) for item in items],
            "alike": [
                _flat((material.numbers[row], score) for row, score in most_alike(found, item)) for item in items
            ],
        },
    }


def _kinds(found: Found) -> dict[int, set[Kind]]:
    """Row -> what was found about it."""
    kinds: dict[int, set[Kind]] = {}
    for finding in found:
        kinds.setdefault(finding.row, set()).add(finding.kind)
    return kinds


def _fingerprint(material: Material) -> str:
    """Of the images that are decided on, and what is asked of them: decisions belong to exactly these."""
    cache = material.found.cache
    rows = list(dict.fromkeys(row for item in material.items for row in item.rows))
    identity = hashlib.sha256(b"".join(cache.rows.paths[row] + b"\0" for row in rows))
    identity.update(
        cache.rows.digests[rows].tobytes() + repr([(item.kinds, item.rows) for item in material.items]).encode()
    )
    identity.update("\0".join(cache.classes).encode("utf-8", "surrogatepass"))
    return identity.hexdigest()[:16]


def _flat(pairs: Any) -> list[Any]:
    """Shares and similarities in ten-thousandths."""
    return [value for number, share in pairs for value in (number, round(10_000 * share))]
