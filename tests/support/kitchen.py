"""A page with every part that pages have, of names that break things. Run as a program it writes the page: ``kitchen.py OUT``."""

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from featcache.reports.elements import charts
from featcache.reports.elements.cards import Card, Evidence, cards_data
from featcache.reports.elements.numbers import bytes_text
from featcache.reports.elements.page import environment, publish_page, render_page
from featcache.reports.elements.thumbnails import thumbnails

HOSTILE = [
    "<script>document.title='taken'</script>",
    "</script><script>document.title='taken'</script>",
    "<!--<script>",
    '"><img src=x onerror="document.title=\'taken\'">',
    "' onmouseover='document.title=1' x='",
    "<svg/onload=document.title=1>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp;",
    "javascript:document.title=1",
    "\u202egnp.exe\u202c",  # turns the direction of writing
    "قطة صغيرة",
    "new\nline\r\ttab\x1b[31m\x00",
    os.fsdecode(b"caf\xe9 \xff\xfe"),
    "line\u2028paragraph\u2029",
    "x" * 150 + " " + "y" * 150,
    "𝔘nicode 🐱 猫",
]
TEMPLATE = """
{% extends "base.html" %}{% import "macros.html" as part %}
{% block lead %}<p class="lead">Of <b>{{ cards | length | count }}</b> images {{ 0.934 | percent }} are classified correctly,
95% interval 91.2% to 95.3%. The next step is to look at {{ part.select("the mistakes", {"correct": 0}) }}: most are
{{ names[0] | name(30) }}.</p>{% endblock %}
{% block contents %}{{ part.contents([("summary", "In short"), ("classes", "Classes"), ("charts", "Charts"), ("pictures", "Pictures")]) }}{% endblock %}
{% block main %}
<section id="summary"><h2>In short</h2>
{{ part.tiles([("Accuracy", "93.5%", "95% interval 91.2% to 95.3%"), ("Balanced accuracy", "92.8%", ""), ("Chance", "6.3%", "1 of 16 classes"), ("Largest class", names[3], "what always answering it scores")]) }}
<ul class="advice"><li>Label more of <b>{{ names[1] | name(40) }}</b>: its recall is {{ 0.61 | percent }}, the lowest of all.</li><li>Three images in four that are wrong are {{ part.select("unsure", {"status": 1}, "unsure images") }}.</li></ul>
{{ part.facts([("model", names[14]), ("command", "featcache report " + names[4]), ("weights", "sha256 7f31...")]) }}
</section>
<section id="classes"><h2>Classes</h2>
{{ part.table("Precision and recall of each class", ["class", "precision", "recall", "", "images"], rows) }}
<p>{% for name in names %}{{ part.select(name, {"label": loop.index0}, "images of " + name) }} {% endfor %}{{ part.select("worst", "worst", "the most confident mistakes") }}</p></section>
<section id="charts"><h2>Charts</h2><div class="figures">{% for chart in charts %}{{ chart }}{% endfor %}</div></section>
<section id="pictures"><h2>Pictures</h2>{{ part.pictures(cards, data.cards, full=full) }}</section>
{% endblock %}
"""


def make_images(folder: Path, count: int = 40) -> list[Path]:
    """Small pictures; the last is damaged."""
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        coarse = random.integers(0, 256, (4, 3 + number % 5, 3), dtype=np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(coarse).resize((60 + 20 * (number % 5), 80), Image.Resampling.BICUBIC).save(path, quality=80)
        found.append(path)
    found[-1].write_bytes(b"no image")
    return found


def make_cards(paths: list[Path], names: list[str]) -> list[Card]:
    """Right, wrong, unsure and refused ones."""
    random = np.random.default_rng(1)
    small = thumbnails(paths, size=96)
    found = []
    for number, thumbnail in enumerate(small):
        label = names[number % len(names)]
        order = [label, *[name for name in names if name != label]][: min(5, len(names))]
        if number % 4 == 1 and len(order) > 1:
            order[0], order[1] = order[1], order[0]
        shares = np.sort(random.dirichlet(np.full(len(order), 0.4)))[::-1].tolist()
        refused = thumbnail.webp is None
        status = "refused" if refused else "unsure" if number % 7 == 2 else "ok"
        found.append(
            Card(
                path=f"{label}/{paths[number].name}" if number % 3 else f"{number} {label}",
                thumbnail=thumbnail.uri,
                no_thumbnail=thumbnail.reason,
                label=label,
                predicted=None if refused else order[0],
                probabilities=() if refused else tuple(zip(order, shares, strict=True)),
                status=status,
                reason=thumbnail.reason or ("unlike the training images" if status == "unsure" else ""),
                evidence=tuple(Evidence(f"train/{name}.jpg", 0.9, name, small[0].uri) for name in order[:3]),
            )
        )
    return found


def make_charts(names: list[str]) -> list[charts.Chart]:
    """One of each kind."""
    sizes = [10, 20, 50, 100, 200, 500]
    accuracy = [0.62, 0.71, 0.8, 0.861, 0.9, 0.921]
    shares = np.linspace(0.02, 1, 60)
    counts = np.random.default_rng(2).poisson(40, 24) * np.hanning(26)[1:-1]
    bins = charts.Bins([0.35, 0.55, 0.75, 0.95], [0.3, 0.45, 0.6, 0.9], [9, 20, 60, 300])
    better = charts.Bins([0.35, 0.55, 0.75, 0.95], [0.36, 0.52, 0.77, 0.94], [30, 40, 90, 229])
    band = {"low": [y - 0.04 for y in accuracy], "high": [y + 0.03 for y in accuracy]}
    return [
        charts.bars([(name, 0.5 + 0.03 * k) for k, name in enumerate(names)], title="Recall", percent=True, line=(0.74, "all"), marked=names[:1], caption="The class at the top is the one to look at."),
        charts.reliability(bins, better, caption="On the diagonal, probabilities mean what they say."),
        charts.lines([charts.Series("val", sizes, accuracy, **band)], title="Learning curve", x_label="training images", y_label="accuracy", log_x=True, percent_y=True, caption="More images still help."),
        charts.lines([charts.Series(name, range(1, 13), [1 / (k + s) for k in range(1, 13)]) for s, name in ((1, "train"), (1.3, "val"), (1.4, names[0]))], title="Loss", x_label="epoch", y_label="loss (nats)", mark=(7, "best epoch 7")),
        charts.lines([charts.Series("accuracy", shares.tolist(), (1 - 0.08 * shares**2).tolist())], title="Coverage against accuracy", x_label="share answered", y_label="accuracy", percent_x=True, percent_y=True, points=False, caption="What is left when the least sure are not answered."),
        charts.histogram(np.geomspace(1e3, 1e7, 25).tolist(), counts.astype(int).tolist(), title="File sizes", x_label="size", log_x=True, x_text=bytes_text, mark=(1e5, "median")),
    ]  # fmt: skip


def kitchen_sink(folder: Path, *, names: list[str] = HOSTILE, full: bool = False, count: int = 40) -> str:
    """The page, as text."""
    cards = make_cards(make_images(folder, count), names)
    data = {"cards": cards_data(cards, names), "selections": {"worst": [5, 1, 9]}}
    rows = [[name, "91.2%", "88.0%", charts.share_bar(0.88), f"{1200 + k:,}"] for k, name in enumerate(names)]
    context = {"names": names, "rows": rows, "charts": make_charts(names), "cards": cards, "full": full}
    return render_page(environment().from_string(TEMPLATE), title=f"Kitchen sink {names[0]}", data=data, **context)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        chosen = ["ants", "bees", "dragonflies", "cats", "dogs"] + ["class"] * 0 if "--plain" in sys.argv else HOSTILE
        names = [*chosen, *[f"class {k}" for k in range(16 - len(chosen))]]
        publish_page(Path(sys.argv[1]), kitchen_sink(Path(scratch), names=names, full="--full" in sys.argv))
