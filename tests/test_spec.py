"""The spec: it survives JSON, its fingerprint is the sha256 of a text anybody can write, differences are named field by field."""

import dataclasses
import hashlib
from typing import Any

import pytest
from conftest import SPEC

from featcache.errors import UsageError
from featcache.spec import Spec, canonical_json, difference

# Written by hand, as any other program would: sorted keys, no spaces.
TEXT = (
    '{"backbone":{"layer":"input of classifier.1","name":"squeezenet1_1","pooling":"the network\'s own","weights_sha256":"'
    + "0" * 64
    + '"},"precision":"reference","preprocess":{"alpha":"composited on white","antialias":true,"crop":[40,32],'
    '"decode":"reduced scale","deep":"16 bit scaled to 8","frame":"first","interpolation":"bilinear",'
    '"mean":[0.5,0.5,0.5],"orientation":"exif applied","profile":"ignored","resize":[41,50],"std":[0.5,0.5,0.5]},'
    '"storage":"float16","views":1}'
)
PREPROCESS = dataclasses.replace(SPEC.preprocess, resize=(41, 50), crop=(40, 32), decode="reduced scale")
OTHER = dataclasses.replace(SPEC, preprocess=PREPROCESS)


def test_json_and_fingerprint() -> None:
    assert canonical_json(OTHER.to_json()) == TEXT
    assert OTHER.fingerprint == hashlib.sha256(TEXT.encode()).hexdigest()
    for spec in (SPEC, OTHER, dataclasses.replace(SPEC, precision="bf16", storage="float32", layer="head.fc")):
        assert Spec.from_json(spec.to_json()) == spec
    assert len({SPEC.fingerprint, OTHER.fingerprint}) == 2


@pytest.mark.parametrize(
    ("resize", "crop", "words"),
    [
        (256, (224, 224), "shorter side 256, middle 224 x 224"),
        ((256, 300), (224, 200), "256 x 300, aspect ratio not kept, middle 224 x 200"),
        ((224, 200), (224, 200), "224 x 200, aspect ratio not kept"),
    ],
)
def test_what_is_seen_of_an_image_is_said(resize: Any, crop: tuple[int, int], words: str) -> None:
    assert dataclasses.replace(PREPROCESS, resize=resize, crop=crop).sizes_in_words() == words


def test_differences_are_named_field_by_field() -> None:
    assert SPEC.difference(SPEC) == ""
    other = dataclasses.replace(OTHER, storage="float32", weights_sha256="a" * 64)
    assert SPEC.difference(other) == (
        "backbone.weights_sha256: 000000000000… -> aaaaaaaaaaaa…; preprocess.crop: [32, 32] -> [40, 32]; "
        "preprocess.decode: full scale -> reduced scale; preprocess.resize: 40 -> [41, 50]; storage: float16 -> float32"
    )
    assert difference({"a": {"b": 1}}, {"a": 2, "c": 3}) == ["a: {'b': 1} -> 2", "c: None -> 3"]


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in SPEC.to_json().items() if key != name}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, "not a JSON object with a backbone"),
        ({}, "not a JSON object with a backbone"),
        (without("storage"), "lacks 'storage'"),
        (SPEC.to_json() | {"views": 2}, "views: 2 -> 1"),
        (SPEC.to_json() | {"zoom": 1}, "zoom: 1 -> None"),
        (SPEC.to_json() | {"precision": "int4"}, "precision is 'int4', expected reference or bf16 or fp16"),
        (SPEC.to_json() | {"preprocess": {"resize": 40}}, "not a preprocessing spec"),
        (SPEC.to_json() | {"preprocess": SPEC.preprocess.to_json() | {"zoom": 2}}, "not a preprocessing spec"),
        (SPEC.to_json() | {"backbone": SPEC.to_json()["backbone"] | {"weights_sha256": "../w"}}, "is no sha256"),
        (
            SPEC.to_json() | {"backbone": SPEC.to_json()["backbone"] | {"pooling": "max"}},
            "pooling is .max., expected the",
        ),
    ],
)
def test_what_this_version_cannot_honour_is_refused(values: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Spec.from_json(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"resize": 20},
        {"resize": 0},
        {"crop": (224, 9000)},
        {"interpolation": "cubic"},
        {"std": (0.1, 0.0, 0.1)},
        {"alpha": "on black"},
    ],
)
def test_impossible_specs_are_refused(changes: dict) -> None:
    with pytest.raises(UsageError):
        dataclasses.replace(SPEC.preprocess, **changes)
