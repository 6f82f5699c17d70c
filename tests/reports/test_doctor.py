"""What ``doctor`` says: rates are those of known delays, advice follows from rates, facts survive strange machines."""

import dataclasses
import importlib.metadata
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPEC, make_photos

from featcache.backbones import embed as embedding
from featcache.backbones.backbone import hash_tensors
from featcache.backbones.load import load_backbone
from featcache.errors import SourceError, UsageError
from featcache.finetuning.trainer import Trainer
from featcache.images.decode import decode, read_pixels
from featcache.images.source import list_images
from featcache.reports.doctor import Abilities, advice, doctor, table_lines
from featcache.reports.machine import device_names, machine
from featcache.reports.throughput import Rates, TrainingRate, generated_photos, measure, measure_training
from featcache.spec import PreprocessSpec
from featcache.system.device import Runtime

BATCH = 4
CPU = Runtime(torch.device("cpu"), workers=2, batch_size=BATCH, reason="")
EXTRAS = {"onnx": "onnx", "simplejpeg": "fast", "pillow-heif": "heif"}
SETTING: dict[str, Any] = {"device": "cpu", "workers": 2, "backbone": "resnet50", "precision": "fp32", "edge": 375}
SETTING |= {"bf16": False, "fast_decoder": True}
GPU = {"device": "cuda", "precision": "fp16"}


class Sleeper:
    """An encoder whose forward pass takes a known time."""

    preprocess = SPEC.preprocess

    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def new_buffer(self, batch_size: int) -> np.ndarray:
        return np.zeros((batch_size, *self.preprocess.crop, 3), np.uint8)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.shape == (BATCH, *self.preprocess.crop, 3)
        assert pixels.any(axis=(1, 2, 3)).all()
        self.calls += 1
        time.sleep(self.seconds)
        return np.zeros((len(pixels), 3), np.float32)


@pytest.mark.parametrize(("forward", "limit"), [(0.005, "decode"), (0.3, "forward")])
def test_rates_are_those_of_known_delays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: float, limit: str
) -> None:
    images = list_images(make_photos(tmp_path, each=2))  # fewer than a slice needs: they come again and again

    def slow(data: bytes, spec: PreprocessSpec, **more: Any) -> object:
        time.sleep(0.01)
        return read_pixels(data, spec, **more)

    monkeypatch.setattr(embedding, "read_pixels", slow)
    rates = measure(images, Sleeper(forward), CPU, seconds=0.8)
    assert rates.limit == limit
    for found, delay in ((rates.decode, 0.04), (rates.forward, forward), (rates.end_to_end, 0.04 + forward)):
        assert (
            0.1 < found / (2 * BATCH / delay) < 1.02
        )  # two workers; a busy machine adds to the delays, much to short ones
    assert rates.shared
    assert 0.4 < rates.efficiency < 2.5


def test_a_slow_backbone_is_measured_in_one_round(tmp_path: Path) -> None:
    encoder = Sleeper(0.1)
    one = Runtime(torch.device("cpu"), workers=1, batch_size=BATCH, reason="")
    rates = measure(list_images(make_photos(tmp_path, each=2)), encoder, one, seconds=0.3)
    assert encoder.calls <= 6  # three rounds would take 8 at least
    assert 0.5 < rates.forward / 40 < 1.02


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no image")
    with pytest.raises(SourceError, match="not one image in .* can be decoded"):
        measure(list_images(tmp_path), Sleeper(0), CPU, seconds=0.1)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="must lie between 0 and 3600"):
            measure(list_images(tmp_path), Sleeper(0), CPU, seconds=seconds)


def test_ceiling() -> None:
    shared, apart = Rates(100, 50, 30, shared=True), Rates(100, 50, 30, shared=False)
    assert (shared.ceiling, shared.efficiency, shared.limit) == (pytest.approx(100 / 3), pytest.approx(0.9), "forward")
    assert (apart.ceiling, apart.efficiency, Rates(5, 6, 5, shared=False).limit) == (50, 0.6, "decode")


@pytest.mark.parametrize(
    ("rates", "changes", "there", "not_there"),
    [
        (Rates(400, 100, 80, True), {}, ["The backbone limits: it takes 80% of", "of 2 workers, decoding 20%"], []),
        (Rates(400, 100, 80, True), {}, ["a GPU", "bf16 arithmetic", "mobilenet_v3_large"], ["--workers", "But"]),
        (Rates(400, 100, 80, True), {"backbone": "mobilenet_v2", "bf16": True}, ["--precision auto"], ["smaller"]),
        (Rates(400, 100, 80, True), {"workers": 1}, ["--workers", "1 worker,"], ["more CPU cores"]),
        (Rates(100, 400, 80, True), {}, ["Decoding limits", "(shorter edge 232 pixels instead of 375"], ["GPU"]),
        (Rates(100, 400, 80, True), {"edge": 256}, ["more CPU cores"], ["smaller copies", "featcache[fast]"]),
        (Rates(100, 400, 80, True), {"fast_decoder": False}, ["featcache[fast]"], []),
        (Rates(1900, 9000, 1800, False), GPU, ["2 workers decode 1,900 images/s, while the GPU could embed 9,000"], []),
        (Rates(9000, 1900, 1800, False), GPU, ["the GPU embeds 1,900", "mobilenet_v3_large"], ["a GPU", "But"]),
        (Rates(400, 100, 60, True), {}, ["60 images/s, 75% of the 80 that", "another process"], []),
        (Rates(400, 100, 90, True), {}, ["not quiet"], []),
        (Rates(400, 4, 2, True), {}, ["--seconds 72"], ["But"]),
        (Rates(400, 9, 8, True), {"precision": "bf16"}, ["this CPU only emulates bf16"], ["--seconds", "arithmetic"]),
    ],
)
def test_advice_follows_from_rates(rates: Rates, changes: dict, there: list[str], not_there: list[str]) -> None:
    s = SETTING | changes
    here = Abilities(2, s["bf16"], s["fast_decoder"])
    backbone = SimpleNamespace(name=s["backbone"], preprocess=SimpleNamespace(resize=232))
    runtime, choice = Runtime(torch.device(s["device"]), s["workers"], 8, ""), SimpleNamespace(precision=s["precision"])
    embedder: Any = SimpleNamespace(backbone=backbone, runtime=runtime, choice=choice)
    text = " ".join(advice(rates, embedder, here, seconds=20.0, edge=s["edge"]))
    assert [words for words in there if words not in text] == [], text
    assert [words for words in not_there if words in text] == [], text


def test_generated_photos_are_always_the_same(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    first, second = (generated_photos(folder, count=4) for folder in folders)
    assert len(first) == 4
    assert all(25_000 <= size <= 60_000 for size in first.sizes)
    contents = [(folders[0] / path).read_bytes() for path in first.paths]
    assert contents == [(folders[1] / path).read_bytes() for path in second.paths]
    assert len(set(contents)) == 4
    for content in contents:
        picture = decode(content)
        assert picture.size == (500, 375)
        assert np.asarray(picture).std() > 10


def test_facts_survive_a_strange_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("no such file, no such instruction")

    def version(name: str) -> str:
        if name in EXTRAS:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", fail)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(Path, "read_text", fail)
    facts = machine(CPU)
    assert not {"cpu", "memory_gb"} & set(facts)
    assert facts["cores"]["usable"] >= 1
    assert facts["not_installed"] == {name: f"pip install 'featcache[{extra}]'" for name, extra in EXTRAS.items()}
    assert facts["packages"]["torch"] == "1.2.3"
    assert facts["decoders"]["simplejpeg"] is facts["decoders"]["pillow-heif"] is None


# ---------------------------------------------------------------------------------------------------- training


def test_training_is_measured_on_whole_steps_and_leaves_the_backbone_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = list[int]()
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, *given: parts.append(self.micro_batch) or step(self, *given))
    images = list_images(make_photos(tmp_path, each=1))  # fewer than a batch: they come again
    backbone = load_backbone("squeezenet1_1", "none")
    backbone = dataclasses.replace(
        backbone, preprocess=dataclasses.replace(backbone.preprocess, resize=32, crop=(32, 32))
    )
    before = hash_tensors(backbone.module.state_dict())
    rate = measure_training(backbone, images, CPU, seconds=1e-9)
    assert rate.step > 0 and rate.images_per_second == 32 / rate.step and rate.batch_size == 32
    assert hash_tensors(backbone.module.state_dict()) == before
    assert set(parts) == {4}, "as finetune cuts a batch of such a network"
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_text("no image")
    with pytest.raises(SourceError, match="not one image in .* can be decoded"):
        measure_training(backbone, list_images(tmp_path / "bad"), CPU, seconds=1.0)


def test_devices_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's rates by a stand-in: what is looked at is who is measured, and where the figures stand."""
    asked: list[str] = []

    def runtime_of(name: str, **_: object) -> Runtime:
        return Runtime(torch.device("cuda" if name == "auto" else name), 2, BATCH, "")

    def measured(backbone: object, *, runtime: Runtime, **_: object) -> dict[str, Any]:
        asked.append(str(runtime.device))
        gpu = runtime.device.type == "cuda"
        rates = {"decode": 900.0, "forward": 8000.0 if gpu else 50.0, "end_to_end": 850.0 if gpu else 47.0}
        return rates | {"precision": "fp16" if gpu else "fp32", "advice": []}

    def trained(backbone: object, images: object, runtime: Runtime, **_: object) -> TrainingRate:
        asked.append(f"{runtime.device} trains")
        return TrainingRate(0.04, 32, "bf16") if runtime.device.type == "cuda" else TrainingRate(4.0, 32, "fp32")

    stand_ins = {"choose_runtime": runtime_of, "_measure": measured, "measure_training": trained}
    stand_ins |= {"device_names": lambda: ["cpu", "cuda:0"], "device_name": lambda device: f"a {device.type}"}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(f"featcache.reports.doctor.{name}", stand_in)
    facts = doctor(make_photos(tmp_path, each=1), backbone="squeezenet1_1", seconds=1, train=True)
    assert asked == ["cpu", "cuda:0", "cpu trains", "cuda:0 trains"]
    assert facts["measured"]["forward"] == 8000  # of the device that extract would take
    cpu, gpu = facts["devices"]
    assert cpu == {
        "device": "cpu", "name": "a cpu", "decode": 900, "forward": 50, "end_to_end": 47, "precision": "fp32", "train": 8,
        "train_step": 4, "train_batch_size": 32, "train_precision": "fp32",
    }  # fmt: skip
    assert (gpu["device"], gpu["train"], gpu["train_step"]) == ("cuda:0", 800, 0.04)
    assert table_lines(facts["devices"]) == [
        "images/s                     decode  backbone  extract  train    step",
        "cpu, fp32, training fp32        900        50       47      8     4 s",
        "cuda:0, fp16, training bf16     900     8,000      850    800  0.04 s",
        "cpu: a cpu",
        "cuda:0: a cuda",
        "step: augmentation, forward, backward and update on 32 images, recipe default",
    ]
    asked.clear()
    doctor(tmp_path, backbone="squeezenet1_1", seconds=1, train=True, device="cpu")
    assert asked == ["cpu", "cpu trains"]
    with pytest.raises(UsageError, match="--train measures, and --seconds 0 does not"):
        doctor(tmp_path, seconds=0, train=True)


def test_every_gpu_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device_names() == ["cpu", "cuda:0", "cuda:1"]


@pytest.mark.gpu
def test_a_gpu_trains_beside_the_cpu(tmp_path: Path) -> None:
    facts = doctor(make_photos(tmp_path, each=2), backbone="squeezenet1_1", seconds=1, train=True)
    assert [row["device"] for row in facts["devices"]] == device_names()
    assert all(row["train"] > 0 for row in facts["devices"])
