"""In a notebook long work shows a bar, which is gone when it ends; nobody who gave a ``progress`` of their own sees one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from featcache.extraction.extract import extract
from featcache.finetuning.finetune import finetune
from featcache.images.source import list_images
from featcache.models.evaluate import evaluate
from featcache.models.predict import predict
from featcache.sklearn import FeatureExtractor
from featcache.system.display import bar_in_notebook

WORK: list[tuple[str, Callable[[Path, Path], object]]] = [
    ("embedding 0/24", lambda trained, to: extract(trained / "photos", to / "f.h5", TINY)),
    ("predicting 0/24", lambda trained, _: list(predict(trained / "m", trained / "photos"))),
    ("predicting 0/24", lambda trained, _: evaluate(trained / "m", trained / "photos")),
    ("embedding 0/24", lambda trained, _: transform(trained)),
    ("embedding 0/24", lambda trained, to: transform(trained, cache=to)),
    ("epoch 1/1, image ", lambda trained, to: tune(trained, to / "ft")),
]


def tune(trained: Path, output: Path) -> object:
    return finetune(trained / "photos", output, init=trained / "m", changes={"epochs": 1}, precision="fp32")


def transform(trained: Path, **options: Any) -> object:
    images = list_images(trained / "photos")
    extractor = FeatureExtractor("squeezenet1_1", weights="none", crop=32, precision="fp32", **options)
    return extractor.fit_transform([images.root / path for path in images.paths])


@pytest.mark.parametrize(("text", "work"), WORK)
def test_a_bar_shows_what_is_done(
    text: str,
    work: Callable[[Path, Path], object],
    trained: Path,
    tmp_path: Path,
    kernel: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(bar_in_notebook.__wrapped__.__kwdefaults__, "delay", 0.0)  # type: ignore[attr-defined]
    work(trained, tmp_path)
    assert any(text in content["text/plain"] for content in kernel)
    assert not kernel[-1]["text/html"]


def test_whoever_has_a_progress_of_their_own_sees_no_bar(trained: Path, kernel: list[dict[str, str]]) -> None:
    reports: list[tuple[int, int, str]] = []
    assert len(list(predict(trained / "m", trained / "photos", progress=lambda *report: reports.append(report)))) == 24
    assert kernel == [] and reports[-1][:2] == (24, 24)
