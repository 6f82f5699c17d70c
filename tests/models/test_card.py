"""The card of a model: what the Hugging Face hub reads of it, and what a browser shows, whatever classes and folders are called."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import make_classes, save_tuned
from markdown_it import MarkdownIt

from featcache.errors import ModelError
from featcache.models.card import make_card
from featcache.models.fit import fit_head
from featcache.models.model import Model, load_model
from featcache.system.display import middle_out, printable
from featcache.system.safe_load import parse_json

repocard = pytest.importorskip("huggingface_hub.repocard")
ALLOWED = {"h1", "h2", "p", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
HOSTILE = (
    "<script>alert(1)</script>",
    "a | b `x` **y** _z_ \\",
    "![i](http://evil/i.png) www.evil.com x@evil.com",
    "---\nlicense: mit\n---\n# heading",
    "{{ x }} $y$ &lt; @user #1 :smile:",
    "caf\udce9 \u202egnp.exe \x85 \U0001f98b",
)


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text: rows of what their cells say."""
    found: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for opening, token in itertools.pairwise(tokens):
        if opening.type == "table_open":
            found.append([])
        elif opening.type == "tr_open":
            found[-1].append([])
        elif opening.type in ("td_open", "th_open"):
            assert {part.type for part in token.children or ()} <= {"text", "text_special"}, token.content
            found[-1][-1].append("".join(part.content for part in token.children or ()))
    return found


def test_the_hub_reads_the_scores_that_the_model_holds(model: Path) -> None:
    card, metrics = repocard.ModelCard.load(model / "README.md"), load_model(model).manifest["metrics"]
    assert card.data.library_name == "featcache" and card.data.pipeline_tag == "image-classification"
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    expected = {(split, "accuracy"): metrics[f"{split}_accuracy"] for split in ("val", "test")}
    expected |= {(split, "f1"): metrics[f"{split}_macro_f1"] for split in ("val", "test")}
    assert found == expected | {("train", "accuracy"): metrics["cv_accuracy"]}
    (result, *_) = card.data.eval_results
    written = repocard.metadata_eval_result(
        model_pretty_name="m",
        task_pretty_name=result.task_name,
        task_id=result.task_type,
        metrics_pretty_name="Accuracy",
        metrics_id="accuracy",
        metrics_value=metrics["val_accuracy"],
        dataset_pretty_name=result.dataset_name,
        dataset_id=result.dataset_type,
        dataset_split="val",
    )
    assert repocard.ModelCardData(**written).eval_results == [
        dataclasses.replace(result, verified=False)
    ]  # as the hub's own library writes it
    again = repocard.ModelCard(str(card))  # also after it was written anew
    assert again.data.to_dict() == card.data.to_dict()


def test_people_read_counts_scores_spec_and_limits(model: Path) -> None:
    text, manifest = (model / "README.md").read_text(), load_model(model).manifest
    scores, classes, spec = tables(text.split("---\n", 2)[2])
    found = parse_json((model / "metrics.json").read_text())["val"]
    low, high = found["accuracy_interval"]
    assert scores[1][:4] == ["val", "50", f"{found['accuracy']:.2%}", f"{low:.2%} to {high:.2%}"]
    assert [row[:3] for row in classes[1:]] == [["a", "17", "16"], ["b", "17", "17"], ["c", "16", "17"]]
    assert ["preprocess mean", "0.5, 0.5, 0.5"] in spec and ["fingerprint", manifest["fingerprint"]] in spec
    for words in ("featcache predict model", "## Licence", "pickle", "`training.safetensors` holds"):
        assert words in text


def test_hostile_names_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    make_classes(tmp_path / "f.h5", np.arange(300) % 6, 1 + np.arange(300) // 150, classes=HOSTILE)
    folder = 'm"\n---\nlicense: "mit" <b>'
    model = fit_head(tmp_path / "f.h5", tmp_path / folder, C=1.0, folds=0).model
    card = repocard.ModelCard.load(model / "README.md")
    assert card.data.license is None and card.data.model_name == printable(folder)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)
    assert set(re.findall(r"</?(\w+)", html)) <= ALLOWED
    shown = [row[0] for row in tables(card.text)[1][1:]]
    assert shown == [middle_out(printable(name), 80) for name in HOSTILE]
    assert not re.search(r"www\.|\w@\w", card.text)  # which the hub would make a link of


def changed(model: Model, name: str, source: str, **changes: Any) -> Any:
    manifest = {"finetuned": False} | model.manifest | changes
    manifest["spec"] = manifest["spec"] | {"backbone": manifest["spec"]["backbone"] | {"name": name}}
    manifest["weights"] = {"source": source, "reload": None}
    return repocard.ModelCard(make_card("m", manifest, {}, None).decode()).data


@pytest.mark.parametrize(
    ("backbone", "source", "licence", "base"),
    [
        ("timm/resnet50", "timm a1_in1k", "apache-2.0", "timm/resnet50.a1_in1k"),
        ("timm/tf_efficientnet_lite0", "package p", "apache-2.0", "timm/tf_efficientnet_lite0.in1k"),
        ("timm/vit_small_patch16_dinov3.lvd1689m", "timm x", "other", "timm/vit_small_patch16_dinov3.lvd1689m"),
        ("timm/resnet50", "fine-tuned from fine-tuned from timm a1_in1k", "apache-2.0", "timm/resnet50.a1_in1k"),
        ("timm/resnet50", "fine-tuned from file timm x.pth", None, None),
        ("timm/resnet50", "random, seed 0", None, None),
        ("resnet50", "torchvision IMAGENET1K_V2", "bsd-3-clause", None),
        ("vit_b_16", "torchvision SWAG (its licence is non-commercial, CC-BY-NC 4.0)", "cc-by-nc-4.0", None),
        ("transformers/facebook/dinov2-small", "the hub", None, "facebook/dinov2-small"),
        ("transformers/../x", "the hub", None, None),
        ("nobody knows", "timm x", None, None),
    ],
)
def test_licence_and_origin_are_those_of_the_weights(
    model: Path, backbone: str, source: str, licence: str | None, base: str | None
) -> None:
    data = changed(load_model(model), backbone, source)
    assert (data.license, data.base_model) == (licence, base)
    if licence == "other":
        assert data.license_name == "dinov3-license"


def test_vectors_made_elsewhere_have_a_card_that_says_so(model: Path) -> None:
    spec = {"external": {"stated": "CLIP <b>"}, "storage": "float16", "views": 1}
    manifest = load_model(model).manifest | {
        "finetuned": False,
        "spec": spec,
        "weights": {"source": "x", "reload": None},
    }
    card = repocard.ModelCard(make_card("m", manifest, {}, None).decode())
    assert (card.data.license, card.data.base_model) == (None, None)
    assert "on vectors made elsewhere, stated: CLIP &#60;b&#62;: tells 3 classes" in card.text
    assert "not images" in card.text and "new_photos" not in card.text
    assert dict(row[:2] for row in tables(card.text)[-1])["external stated"] == "CLIP <b>"
    assert "weights" not in dict(row[:2] for row in tables(card.text)[-1])


@pytest.mark.parametrize(("kind", "linear"), [("logreg", True), ("linear", True), ("mlp", False)])
def test_only_a_linear_head_is_tagged_as_a_linear_probe(model: Path, kind: str, linear: bool) -> None:
    """What the hub's readers filter by."""
    data = changed(
        load_model(model), "resnet50", "torchvision x", head=load_model(model).manifest["head"] | {"kind": kind}
    )
    assert ("linear-probe" in data.tags) == linear


def test_a_fine_tuned_model_says_what_its_score_was_chosen_by(tmp_path: Path) -> None:
    save_tuned(tmp_path / "m")
    data = repocard.ModelCard.load(tmp_path / "m" / "README.md").data
    assert "linear-probe" not in data.tags and data.eval_results is None
    scores = {"n": 6, "accuracy": 0.5, "accuracy_interval": [0.2, 0.8], "balanced_accuracy": 0.5, "macro_f1": 0.4}
    scores["per_class"] = {name: {"n": 3, "recall": None, "precision": 0.5} for name in "ab"}
    manifest = load_model(tmp_path / "m").manifest
    text = make_card("m", manifest, {"val": scores}, None).decode()
    assert tables(text)[0][1][-1] == "epoch and mixture were chosen on these"


def test_a_card_that_cannot_be_made_costs_no_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("featcache.models.card.counted", lambda: {}["no\nkey"])
    monkeypatch.setattr("featcache.models.card._PROVIDED", "torchvision")
    model = fit_head(cache, tmp_path / "m", C=1.0, folds=0).model
    assert f"no model card of {model} (KeyError: " in caplog.text
    assert load_model(model).classes == ("a", "b", "c") and not (model / "README.md").exists()
    monkeypatch.undo()
    fit_head(cache, model, C=1.0, folds=0)
    assert (model / "README.md").exists()


def test_the_same_model_has_the_same_card_and_one_changed_by_hand_is_kept(
    cache: Path, model: Path, tmp_path: Path
) -> None:
    card = model / "README.md"
    before = card.read_bytes()
    fit_head(cache, model, C=1.0)  # replaces it
    assert card.read_bytes() == before
    card.write_text("mine")
    assert load_model(model).classes == ("a", "b", "c")  # loading never looks at it
    with pytest.raises(ModelError, match=r"README.md is not as featcache wrote it; choose another -o, or move"):
        fit_head(cache, model, C=1.0)
    assert card.read_text() == "mine"
    card.unlink()
    fit_head(cache, model, C=1.0)
    assert card.read_bytes() == before
