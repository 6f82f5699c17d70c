"""What somebody types who has a folder of photos and a notebook, run in a real kernel; what the notebook then shows."""

from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import featcache

CELLS = """
from pathlib import Path
import numpy as np
import pandas as pd
from PIL import Image
random = np.random.default_rng(0)
for split in ("train", "val"):
    for name, colour in {"blue & co": (30, 40, 200), "red": (210, 40, 30)}.items():
        folder = Path("photos", split, name)
        folder.mkdir(parents=True)
        for number in range(5):
            pixels = np.clip(random.normal(colour, 25, (47, 61, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
# %% extract
import featcache
tiny = dict(backbone="squeezenet1_1", weights="none", resize=40, crop=32, precision="fp32")
featcache.extract("photos", "features.h5", **tiny)
# %% cache
cache = featcache.FeatureCache.open("features.h5")
cache
# %% split
X, y, paths = cache.split("train", paths=True)
X.shape, y.tolist(), paths[0]
# %% preview
featcache.preview("photos", **tiny, recipe="default", n=2, views=1)
# %% sklearn
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
cross_val_score(LogisticRegression(), cache.X, cache.y).tolist()
# %% fit
featcache.fit_head("features.h5", "model")
# %% model
model = featcache.load_model("model")
model
# %% predict
path = "photos/val/red/0.png"
predictions = model.predict([path, Image.open(path), np.array(Image.open(path))])
predictions
# %% same
len({prediction.probability for prediction in predictions}), predictions[1].label, len(predictions[2].top(3))
# %% pandas
frame = pd.DataFrame({"path": sorted(map(str, Path("photos", "val").rglob("*.png")))}).sample(frac=1, random_state=0)
found = model.predict(frame["path"]).to_pandas(probs=True)
bool((frame["path"].map(lambda path: Path(path).parent.name) == found["label"]).all()), found.columns.tolist()
# %% table
model.predict(frame["path"])
# %% gallery
featcache.gallery("model", "photos/val")
# %% report
featcache.report("model", "features.h5")
# %% stats
featcache.stats("photos")
# %% again
featcache.list_images("photos")
# %% warning
import shutil
shutil.copy("photos/train/red/0.png", "photos/val/red/copy.png")
featcache.extract("photos", "features.h5", **tiny).embedded
# %% error
try:
    featcache.extract("photos", "features.h5", backbon="resnet18")
except featcache.FeatcacheError as error:
    print(error)
# %% logging
import logging
logging.basicConfig(level="INFO", format="%(message)s")
print(featcache.extract("photos", "features.h5", **tiny))
# %% bar
from featcache.system.display import bar_in_notebook, describe_images
with bar_in_notebook(None, describe_images("embedding"), delay=0) as progress:
    progress(0, 20, "decode")
"""


@pytest.fixture(autouse=True)
def _no_network() -> None:
    """A kernel and its notebook talk by sockets of this machine."""


def run_notebook(folder: Path) -> dict[str, list[nbformat.NotebookNode]]:
    """Title of a cell -> its outputs."""
    titles, sources = zip(*(cell.split("\n", 1) for cell in CELLS.split("# %% ")), strict=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    assert nbformat.writes(notebook).encode()
    return {title: cell.outputs for title, cell in zip(titles, notebook.cells, strict=True)}


def framed_pages(html: str) -> list[str]:
    """The pages in the frames of an output, which is nothing else, and which they cannot reach out of."""
    found: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag == "iframe" and dict(attrs)["sandbox"] == "allow-scripts allow-downloads"
            found.append(dict(attrs)["srcdoc"] or "")

        def handle_data(self, data: str) -> None:
            assert not data.strip()

    Parser().feed(html)
    return found


@pytest.mark.filterwarnings("ignore")  # of the notebook's client; featcache runs in the kernel
def test_a_notebook_shows_what_a_stranger_expects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(featcache.__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no settings of whoever runs this
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    outputs = run_notebook(tmp_path)
    assert all(len(shown) == 1 for title, shown in outputs.items() if title not in ("", "warning", "logging"))
    text = {title: shown[-1].data["text/plain"] for title, shown in outputs.items() if shown and "data" in shown[-1]}
    html = {title: shown[-1].data.get("text/html", "") for title, shown in outputs.items() if title in text}
    assert text["extract"].startswith("ExtractReport(cache='features.h5', images=20, embedded=20, reused=0, refused=0,")
    assert text["cache"] == "FeatureCache('features.h5': 20 rows of 512 float16 by squeezenet1_1, 2 classes)"
    assert "<th>class</th><th>train</th><th>val</th>" in html["cache"]
    assert "<tr><td>blue &amp; co</td><td>5</td><td>5</td></tr>" in html["cache"]
    assert html["again"].split("</caption>")[1] == html["cache"].split("</caption>")[1]
    assert text["split"] == "((10, 512), [0, 0, 0, 0, 0, 1, 1, 1, 1, 1], 'train/blue & co/0.png')"
    assert text["preview"].startswith("Preview(2 images of 10 as squeezenet1_1 sees them, 1 view by default")
    assert set(outputs["preview"][0].data) == {"text/plain", "image/png"}  # a picture, nothing that would hide it
    assert text["sklearn"] == "[1.0, 1.0, 1.0, 1.0, 1.0]"
    assert "val_accuracy=1" in text["fit"] and "<td>val accuracy</td><td>100.00%</td>" in html["fit"]
    assert text["model"] == "Model('model': logreg on squeezenet1_1, 2 classes: 'blue & co', 'red')"
    assert text["predict"].count("'red'") == 3 and "<td>inputs[1]</td><td>red</td>" in html["predict"]
    assert text["same"] == "(1, 'red', 2)"
    assert text["pandas"].startswith("(True,\n ['path',\n  'label',\n  'probability',")
    assert text["table"] == "Predictions(10 images: 'blue & co' 5, 'red' 5)"
    pages = {title: html.pop(title) for title in ("gallery", "report", "stats")}
    for title, shown in pages.items():
        found = framed_pages(shown)
        assert len(found) == 1 and found[0].startswith("<!doctype html>") and "blue &amp; co" in found[0], title
    assert framed_pages(pages["report"])[0] == (tmp_path / "model.report.html").read_text()
    assert text["gallery"].startswith("Page('10 images, labelled by model', ") and "\n" not in text["gallery"]
    assert text["report"].startswith("Report(report='model.report.html', images=10,") and "\n" not in text["report"]
    assert all("& co" not in shown and "<table>" in shown for title, shown in html.items() if shown)
    stderr, result = outputs["warning"]  # warnings are seen, notes are not
    assert stderr.name == "stderr" and stderr.text.startswith(
        "1 image of val or test is a copy of what an earlier split"
    )
    assert (stderr.text.count("\n"), result.data["text/plain"]) == (1, "0")
    assert outputs["error"][0].text == "extract has no option 'backbon'; did you mean backbone?\n"
    *notes, report = outputs["logging"]
    assert "".join(note.text for note in notes).startswith("photos: 21 images, 2 classes\n  class ")
    assert {note.name for note in notes} == {"stderr"} and report.text.startswith(
        "features.h5: 21 embeddings of 512 dimensions\n  2 classes: blue & co, red; "
    )
    assert outputs["bar"][0].data == {"text/plain": "", "text/html": ""}  # it was there, and is gone
