"""Statistics of a source in a folder: a page to look at, and its numbers. In: ``Statistics``. Out: ``stats.html``, ``stats.json``."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import bidirectional

from markupsafe import Markup

from featcache.errors import StorageError
from featcache.images.layout import some
from featcache.images.read import Paths
from featcache.images.source import AnySource, ImageList, check_apart
from featcache.reports.elements.cards import Card, cards_data
from featcache.reports.elements.charts import Chart, Series, bars, histogram, lines, share_bar, sizes
from featcache.reports.elements.numbers import bytes_text, count_text, percent_text
from featcache.reports.elements.page import render_page
from featcache.reports.elements.thumbnails import Thumbnail, thumbnails
from featcache.reports.source_stats.advice import SMALL, images, training_counts
from featcache.reports.source_stats.text import MODES, score
from featcache.system.display import middle_out, printable, quantity
from featcache.system.files import check_is_folder, publish_folder
from featcache.system.path_advice import typed

if TYPE_CHECKING:
    from featcache.reports.source_stats.stats import Statistics

PAGE, NUMBERS = "stats.html", "stats.json"
_MARK = '{"kind": "stats", '  # how our numbers begin
_BUDGET = 3_000_000  # bytes of thumbnails, at most; some hundreds of pictures
_MANY_CLASSES = 20
_MOST_GROUPS, _MOST_COPIES, _MOST_UNREADABLE = 60, 12, 500
_COPIES = {
    "labels": ("Under several labels", "one picture under several labels"),
    "splits": ("In several splits", "one picture in several splits"),
    "within": ("Within one split", "one picture several times"),
}


def check_folder(folder: Path, source: AnySource | ImageList) -> None:
    """Raise StorageError, before any work, unless ``folder`` may be written: it is new, empty, or holds earlier statistics."""
    check_is_folder(folder, "statistics are", "a page and its numbers")
    check_apart(folder, source)
    if folder.is_dir():
        _check_ours(folder)


def _check_ours(folder: Path) -> None:
    try:
        others = [entry.name for entry in folder.iterdir() if entry.name not in (PAGE, NUMBERS)]
        numbers = folder / NUMBERS
        foreign = numbers.is_symlink() or (numbers.exists() and not _is_ours(numbers))
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}; choose another -o") from error
    if others or foreign or ((folder / PAGE).exists() and not numbers.exists()):
        raise StorageError(
            f"cannot write {folder}: it holds other things ({some(others or [NUMBERS if foreign else PAGE])}), which would be "
            f"replaced; choose another -o, such as {typed(folder / 'stats')}"
        )


def _is_ours(numbers: Path) -> bool:
    if not numbers.is_file():
        return False
    with numbers.open("rb") as file:
        return file.read(len(_MARK)) == _MARK.encode()


def write_folder(found: "Statistics", folder: Path) -> None:
    """Write the page and the numbers; both appear at once. Raises StorageError, also where ``check_folder`` would by now."""
    if folder.is_dir():
        _check_ours(folder)
    numbers = _MARK + json.dumps(found.to_json())[1:] + "\n"
    page = stats_page(found)
    with publish_folder(folder) as temporary:
        (temporary / NUMBERS).write_text(numbers, encoding="ascii")
        (temporary / PAGE).write_bytes(page.encode("utf-8", "backslashreplace"))


def stats_page(found: "Statistics") -> str:
    """The page, as text. Thumbnails are made of the files, where they still are; the user's files are only read."""
    gallery = _Gallery(found)
    groups = [
        (title, why, [rows for kind_of, rows in gallery.groups if kind_of == kind])
        for kind, (title, why) in _COPIES.items()
    ]
    parts = {
        "class_rows": (classes := _classes(found))[1],
        "charts": stats_charts(found),
        "unreadable": [(image["path"], image["reason"]) for image in found.unreadable[:_MOST_UNREADABLE]],
        "groups": [group for group in groups if group[2]],
        "standing_out": gallery.standing_out(),
        "cards": gallery.cards,
    }
    words = ("Classes", "Sizes", "Unreadable", "Copies", "Standing out", "Pictures")
    ids = ("classes", "sizes", "unreadable", "copies", "out", "pictures")
    contents = [(id_, word) for id_, word, part in zip(ids, words, parts.values(), strict=True) if part]
    return render_page(
        "stats.html",
        parts=("stats.css",),
        title=found.source,
        data={"cards": cards_data(gallery.cards, [*found.classes])},
        contents=[("short", "In short"), *contents],
        lead=_lead(found),
        tiles=_tiles(found),
        advice=[_isolated(sentence, found.classes) for sentence in found.advice],
        class_caption="Readable images of each class" + (" in each split" if len(found.splits) > 1 else ""),
        class_head=classes[0],
        class_chart=_class_sizes(found),
        examples=gallery.examples,
        facts=_facts(found),
        unreadable_caption=_unreadable_caption(found),
        copies_words=_copies_words(found),
        sample_words=_sample_words(found),
        pictures_words="All pictures of this page, each once. What is chosen above is picked out here; the list of its paths can be "
        "saved.",
        sorts=[("order", "as on this page"), ("path", "path"), ("label", "label")],
        foot=f"Made by featcache stats in {found.seconds:.1f} s; this page asks for nothing from anywhere.",
        **parts,
    )


class _Gallery:
    """The pictures of a page, each once, copies first.

    Attributes:
        cards: of all. groups: kind and rows of each group of copies. examples: rows.
    """

    def __init__(self, found: "Statistics") -> None:
        self.found = found
        self._rows: dict[str, int] = {}
        self._images: list[dict[str, Any]] = []
        self._notes: defaultdict[int, list[str]] = defaultdict(list)
        self.groups = [
            (group["kind"], [self._row(image, _COPIES[group["kind"]][1]) for image in group["images"][:_MOST_COPIES]])
            for group in found.copies["groups"][:_MOST_GROUPS]
        ]
        self._dark = [self._row(image, f"dark: {image['value']:.0f}") for image in found.darkest]
        self._blurred = [self._row(image, f"not sharp: {image['value']:.0f}") for image in found.blurriest]
        self._odd = [self._row(image, f"odd: {image['why']}") for image in found.oddest]
        self.examples = [self._row(image) for image in found.examples]
        self.cards = self._cards()

    def _row(self, image: dict[str, Any], note: str = "") -> int:
        """Of an image that may be here already. One path may be listed several times, under several labels."""
        key = f"{image['path']}\0{image['label']}\0{image['split']}"
        row = self._rows.setdefault(key, len(self._images))
        if row == len(self._images):
            self._images.append(image)
        if note and note not in self._notes[row]:
            self._notes[row].append(note)
        return row

    def _cards(self) -> list[Card]:
        paths = [image["path"] for image in self._images]
        pictures = thumbnails(Paths(Path(self.found.root), tuple(paths)), size=160, budget=_BUDGET) if paths else []
        return [self._card(row, picture) for row, picture in enumerate(pictures)]

    def _card(self, row: int, picture: Thumbnail) -> Card:
        image = self._images[row]
        return Card(
            path=image["path"],
            thumbnail=picture.uri,
            no_thumbnail=picture.reason,
            label=image["label"],
            split=image["split"] or "",
            note="; ".join(self._notes[row]),
        )

    def standing_out(self) -> list[tuple[str, str, list[int], list[str]]]:
        """Title, explanation, rows and a text for each picture."""
        found = self.found
        dark = [f"{image['value']:.0f}" for image in found.darkest]
        blurred = [f"{image['value']:.0f}" for image in found.blurriest]
        odd = [f"{image['why']}, {score(image['value'])}" for image in found.oddest]
        parts = [
            ("Darkest", "Mean grey, from 0, black, to 255, white.", self._dark, dark),
            (
                "Blurriest",
                "Variance of the Laplacian of grey, at 256 pixels along the longer edge (Pech-Pacheco et al. 2000). Plain surfaces "
                "are as low as blur.",
                self._blurred,
                blurred,
            ),
            (
                "Oddest",
                "How far an image lies from the middle of all, in its oddest feature: modified z-score of width : height, pixels, "
                "bytes a pixel, contrast, or colour; beyond 3.5 is an outlier (Iglewicz and Hoaglin 1993). Three of a kind at most.",
                self._odd,
                odd,
            ),
        ]
        return [part for part in parts if part[2]]


def stats_charts(found: "Statistics") -> list[Chart]:
    """The charts of the page; none if nothing is readable."""
    if not found.readable:
        return []
    made = [
        sizes(found.sizes, title="Width and height", caption=_sizes_caption(found)),
        bars(
            [(_shape(name), count / found.readable) for name, count in found.shapes.items() if count],
            title="Width : height",
            caption="Share of images nearest to each usual shape.",
            percent=True,
            columns=("shape", "share"),
        ),
        _histogram(found, "shorter_edge", "Shorter edge", "pixels", mark=(SMALL, f"{SMALL}, input of most backbones")),
        _histogram(found, "bytes", "File sizes", "size of a file", x_text=bytes_text),
    ]
    for counts, title in ((found.formats, "Formats"), ({_mode(mode): n for mode, n in found.modes.items()}, "Modes")):
        if len(counts) > 1:
            shares = [(name, count / found.readable) for name, count in counts.items()]
            made.append(bars(shares, title=title, percent=True, columns=(title.lower(), "share")))
    return made


def _histogram(found: "Statistics", name: str, title: str, label: str, **options: Any) -> Chart:
    edges, counts = (found.histograms[name][key] for key in ("edges", "counts"))
    if (mark := options.get("mark")) and not edges[0] < mark[0] < edges[-1]:
        del options["mark"]
    if edges[0] <= 0:  # of an empty file, or none: a logarithm has no place for it
        edges = [min(edges[1] / 2, 0.5), *edges[1:]]
    return histogram(edges, [int(count) for count in counts], title=title, x_label=label, log_x=True, **options)


def _sizes_caption(found: "Statistics") -> str:
    first = ", ".join(f"{w} x {h} ({percent_text(n / found.readable, 0)})" for w, h, n in found.sizes[:2])
    shown = f"; the {len(found.sizes):,} most frequent are drawn" if found.distinct_sizes > len(found.sizes) else ""
    return f"{quantity(found.distinct_sizes, 'size')}, most often {first}{shown}. Area: number of images."


def _shape(name: str) -> str:
    return {"taller": "taller than 1:2", "wider": "wider than 2:1"}.get(name, name)


def _mode(mode: str) -> str:
    return MODES.get(mode, mode)


def _classes(found: "Statistics") -> tuple[list[str], list[list[Any]]]:
    """Head and rows of the table: a column per split, a sum and a bar."""
    splits = [*found.splits]
    titles = ["no split" if split == "none" else split for split in splits] if splits != ["none"] else []
    counts = {name: [of.get(split, 0) for split in splits] for name, of in found.classes.items()}
    if found.unlabelled and (counts or titles):
        counts["(no label)"] = [found.unlabelled.get(split, 0) for split in splits]
    if not counts:
        return [], []
    most = max(map(sum, counts.values())) or 1
    rows: list[list[Any]] = [
        [
            name,
            *(map(count_text, of) if titles else ()),
            count_text(sum(of)),
            percent_text(sum(of) / (found.readable or 1)),
            Markup('<div class="wide">{}</div>').format(share_bar(sum(of) / most)),
        ]
        for name, of in counts.items()
    ]
    sums = [count_text(found.splits[split]) for split in splits] if titles else []
    return ["class", *titles, "all", "share", ""], [*rows, ["all", *sums, count_text(found.readable), "", ""]]


def _class_sizes(found: "Statistics") -> Chart | None:
    """How large the classes are, where they are too many to see it in a table."""
    counts = sorted((sum(of.values()) for of in found.classes.values()), reverse=True)
    if len(counts) <= _MANY_CLASSES:
        return None
    curve = Series("images", [*range(1, len(counts) + 1)], counts)
    caption = (
        f"The largest holds {counts[0]:,}, the middle one {counts[len(counts) // 2]:,}, the smallest {counts[-1]:,}."
    )
    span = (0, counts[0] * 1.05)
    return lines(
        [curve],
        title="Images per class",
        caption=caption,
        x_label="classes, the largest first",
        y_label="images",
        y_range=span,
        points=False,
    )


def _isolated(sentence: str, names: Iterable[str]) -> Markup:
    """``sentence``; names written from right to left do not turn what stands beside them."""
    turning = [name for name in map(printable, names) if any(bidirectional(sign) in ("R", "AL") for sign in name)]
    parts = [printable(sentence)]
    if turning:
        longest_first = "|".join(re.escape(name) for name in sorted(turning, key=len, reverse=True))
        parts = re.split(f"({longest_first})", parts[0])
    return Markup().join(Markup("<bdi>{}</bdi>").format(part) if k % 2 else part for k, part in enumerate(parts))


def _lead(found: "Statistics") -> str:
    splits = [split for split in found.splits if split != "none"]
    of = f" in {' and '.join([', '.join(splits[:-1]), splits[-1]] if splits[1:] else splits)}" if splits else ""
    classes = f" of {quantity(len(found.classes), 'class')}" if found.classes else ""
    return f"{images(found.images)}{classes}{of}, {bytes_text(found.total_bytes)}. Nothing has been trained yet."


def _tiles(found: "Statistics") -> list[tuple[str, str, str]]:
    """Headline numbers."""
    unreadable, copies = len(found.unreadable), found.copies
    tiles = [("Images", count_text(found.images), f"{unreadable:,} unreadable" if unreadable else "all are readable")]
    if found.classes:
        training = [count for count in training_counts(found).values() if count]
        low, high = min(training, default=0), max(training, default=0)
        span = f"{low:,} to {high:,} training images" if low < high else f"{quantity(high, 'training image')} each"
        tiles.append(("Classes", count_text(len(found.classes)), span))
    if found.constant:
        split = next((split for split in ("val", "test") if split in found.constant), "all")
        facts, where = found.constant[split], "" if split == "all" else f"of {split}, "
        always = f"{where}by always saying {middle_out(printable(facts['label']), 24)}"
        tiles.append(("One answer scores", percent_text(facts["accuracy"]), always))
    if found.width and found.height:
        middle = f"{found.width['median']:,.0f} × {found.height['median']:,.0f}"
        tiles.append(("Median size", middle, quantity(found.distinct_sizes, "different size")))
    kinds = (("across_labels", "under several labels"), ("across_splits", "across splits"))
    worst = [f"{copies[kind]:,} {word}" for kind, word in kinds if copies[kind]]
    number = sum(len(group["images"]) - 1 for group in copies["groups"])
    tiles.append(
        ("Copies", count_text(number), ", ".join(worst) or ("byte for byte" if number else "no file is there twice"))
    )
    return tiles


def _facts(found: "Statistics") -> list[tuple[str, str]]:
    if not (found.bytes and found.width and found.height and found.aspect):
        return []

    def tally(counts: dict[str, int]) -> str:
        return ", ".join(f"{_mode(name)} {count:,}" for name, count in counts.items())

    def span(values: dict[str, float], text: Any = count_text) -> str:
        return f"{text(values['min'])} to {text(values['max'])}, median {text(values['median'])}"

    return [
        ("width", f"{span(found.width)} pixels, as shown"),
        ("height", f"{span(found.height)} pixels"),
        ("width : height", span(found.aspect, lambda value: f"{value:.2f}")),
        ("file size", span(found.bytes, bytes_text)),
        ("formats", tally(found.formats)),
        ("modes", tally(found.modes)),
        ("EXIF orientation", f"turns {images(found.turned)}" if found.turned else "turns none"),
    ]


def _unreadable_caption(found: "Statistics") -> str:
    n = len(found.unreadable)
    rest = f"; the first {_MOST_UNREADABLE} are shown, {NUMBERS} has all" if n > _MOST_UNREADABLE else ""
    return f"{images(n)} cannot be read, for the reasons for which extract will refuse them{rest}"


def _copies_words(found: "Statistics") -> str:
    n = len(found.copies["groups"])
    rest = f" The first {_MOST_GROUPS} are shown, {NUMBERS} has all." if n > _MOST_GROUPS else ""
    return f"{quantity(n, 'picture lies', 'pictures lie')} in several places, byte for byte.{rest}"


def _sample_words(found: "Statistics") -> str:
    sample = found.sample
    if sample["images"] == sample["of"]:
        return "Of all readable images."
    return (
        f"Pixels of {sample['images']:,} of {images(sample['of'])} were looked at, drawn at random (seed {sample['seed']}); "
        "damage behind the header of others has not been seen."
    )
