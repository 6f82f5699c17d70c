"""Damaged models, parts, checkpoints and weights files: an error of featcache, or exactly what was saved.

In: good files. Out: nothing silently wrong, hung or crashed. Weights in .safetensors carry no checksum of their own: there
damage shows as another ``weights_sha256``, or not at all in the shape of the file.
"""

import dataclasses
import functools
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutation
import numpy as np
import pytest
import safetensors.torch
import test_mutated_caches
import torch
from caches import save_head
from conftest import SPEC

from featcache.backbones.backbone import hash_tensors, read_weights
from featcache.errors import FeatcacheError, NewerCacheError
from featcache.extraction.parts import open_parts
from featcache.finetuning import checkpoint
from featcache.heads.head import Head
from featcache.models.model import load_model
from featcache.spec import fingerprint_of
from featcache.system.workdir import work_folder

KINDS = ("model.json", "head.safetensors", "part", "checkpoint", "weights.pth", "old.pth", "weights.safetensors")


def make_head(seed: int) -> Head:
    rng = np.random.default_rng(seed)
    layers = tuple((rng.normal(size=shape), rng.normal(size=shape[0])) for shape in ((4, 3), (2, 4)))
    return Head("mlp", "standardise", rng.normal(size=3), rng.uniform(1, 2, 3), layers)


def make_model(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A saved model with a small head. ``changes`` go into its manifest, whose checksum is then set right."""
    save_head(path, make_head(seed), ("ant", f"bee{seed}"), seed)
    return change_manifest(path, **changes)


def change_manifest(path: Path, **changes: Any) -> Path:
    """The same model, whose manifest says something else, its checksum right."""
    manifest = json.loads((path / "model.json").read_text()) | changes
    del manifest["sha256"]
    (path / "model.json").write_text(json.dumps(manifest | {"sha256": fingerprint_of(manifest)}))
    return path


def make_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{k}.weight": torch.randn(5, k + 3, generator=generator) for k in range(4)}


def write_good(folder: Path, kind: str, seed: int) -> Path:
    """A good file of one kind; the path of what is damaged."""
    tensors = make_tensors(seed)
    if kind in ("model.json", "head.safetensors"):
        return make_model(folder / f"model{seed}", seed) / kind
    if kind == "part":
        (folder / f"parts{seed}").mkdir()
        test_mutated_caches.write_shape(folder / f"parts{seed}" / "1.h5", 3 + seed)
        return folder / f"parts{seed}" / "1.h5"
    if kind == "checkpoint":
        work_folder(folder / f"run{seed}").mkdir()
        checkpoint.save_state(folder / f"run{seed}", {"lr": 0.1}, {"network": tensors, "history": [seed, 0.5, "x"]})
        return work_folder(folder / f"run{seed}") / "checkpoint.pt"
    path = folder / f"{seed}-{kind}"
    if kind.endswith(".pth"):
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=kind != "old.pth")
    else:
        safetensors.torch.save_file(tensors, path)
    return path


def contents(path: Path, kind: str) -> Any:
    """What featcache makes of the file; an error of its own if it is damaged."""
    if kind in ("model.json", "head.safetensors"):
        model = load_model(path.parent)
        scores = model.head.probabilities(np.arange(12.0).reshape(4, 3))
        return [scores.tobytes(), model.classes, model.spec, {k: v for k, v in model.manifest.items() if k != "sha256"}]
    if kind == "part":
        parts = open_parts(path.parent)
        assert len(parts) == path.is_file(), "a part that is not used must be gone, so that it is made again"
        return test_mutated_caches.contents(path) if parts else "made again"
    if kind == "checkpoint":
        output = path.parent.with_name(path.parent.name.removesuffix(".parts"))
        state = checkpoint.open_work(output, {"lr": 0.1}) or {"network": {}}
        return [hash_tensors(state.pop("network")), state]
    return hash_tensors(read_weights(path, [])[0].tensors)


@functools.cache
def good(folder: Path) -> dict[str, tuple[Path, list[bytes], list[Any], list[int]]]:
    table = {}
    for kind in KINDS:
        paths = [write_good(folder, kind, seed) for seed in (0, 1)]
        files = [path.read_bytes() for path in paths]
        table[kind] = (paths[0], files, [contents(path, kind) for path in paths], aims(files[0], kind))
    return table


def aims(data: bytes, kind: str) -> list[int]:
    """Where structure lies."""
    if kind == "part":
        return list(range(0, min(len(data), 800), 8))
    marks = [
        b"PK\x01\x02",
        b"PK\x05\x06",
        b"PK",
        b"shape",
        b"data_offsets",
        b"dtype",
        b"storage",
        b'"sha256"',
        b'"classes"',
    ]
    return [0, *mutation.places(data, [*marks, b"\x80\x02"])]


def attempt(folder: Path, seed: int) -> tuple[str, str, str]:
    torch.set_num_threads(1)
    table = good(folder)
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    path, files, truths, targets = table[kind]
    how, data = mutation.damage(files[0], rng, others=files[1:], aims=targets)
    path.write_bytes(data)
    return f"{kind} {how}", *judge(path, kind, truths if how == "splice" else truths[:1])


def judge(path: Path, kind: str, accepted: list[Any]) -> tuple[str, str]:
    try:
        found = contents(path, kind)
    except FeatcacheError as error:
        if kind == "part" and not isinstance(error, NewerCacheError):
            return "wrong", f"stops the run instead of making the part again: {error}"
        return "refused", f"{kind} {type(error).__name__}"
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    if found == "made again":
        return "refused", "part, made again"
    if found in accepted:  # of another file that took this one's place, but for padding: all, never a mixture
        return "same", ""
    # Nothing in these formats could tell: what is loaded goes by its own hash, which is part of every spec.
    return ("same", "") if kind in ("old.pth", "weights.safetensors") else ("wrong", "other content")


@pytest.mark.parametrize("count", [210, pytest.param(50_000, marks=pytest.mark.soak)])
def test_what_is_damaged_is_refused_or_read_as_it_was(tmp_path: Path, count: int) -> None:
    mutation.check(__name__, tmp_path, count, megabytes=1024)


def test_every_bit_of_a_checkpoint_counts(tmp_path: Path) -> None:
    """PyTorch alone would resume with another weight."""
    path = write_good(tmp_path, "checkpoint", 0)
    data = bytearray(path.read_bytes())
    position = data.find(make_tensors(0)["layer2.weight"].numpy().tobytes())
    data[position + 6] ^= 1
    assert torch.load(io.BytesIO(data), weights_only=True)["history"] == [0, 0.5, "x"]
    path.write_bytes(data)
    with pytest.raises(
        FeatcacheError, match="checksum mismatch in .*data/2.; discard the interrupted run with --force"
    ):
        checkpoint.open_work(tmp_path / "run0", {"lr": 0.1})


@pytest.mark.parametrize("keep", [shutil.copy, shutil.move])
def test_backbone_weights_of_a_model_are_those_it_was_trained_on(tmp_path: Path, keep: Callable[..., Any]) -> None:
    """One bit in ``backbone.safetensors``, which has no checksum: the hash in the model's spec finds it."""
    from featcache.backbones.backbone import save_weights
    from featcache.backbones.load import load_backbone

    backbone = load_backbone("squeezenet1_1", "none")
    spec = dataclasses.replace(SPEC, weights_sha256=backbone.weights_sha256).to_json()
    model = make_model(tmp_path / "m", spec=spec, fingerprint=fingerprint_of(spec))
    save_weights(backbone, tmp_path / "w.safetensors")
    copy = Path(keep(tmp_path / "w.safetensors", model / "backbone.safetensors"))
    assert load_model(model).backbone.load().weights_sha256 == backbone.weights_sha256
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    with pytest.raises(FeatcacheError, match="was trained on other weights"):
        load_model(model).backbone.load()


def test_a_repacked_archive_still_is_one(tmp_path: Path) -> None:
    """What is refused is damage, not another order or another date."""
    path = write_good(tmp_path, "weights.pth", 0)
    truth = contents(path, "weights.pth")
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in reversed(source.namelist()):
            target.writestr(name, source.read(name))
    path.write_bytes(buffer.getvalue())
    assert contents(path, "weights.pth") == truth
