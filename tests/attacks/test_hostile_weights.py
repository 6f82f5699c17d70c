"""Weights files and checkpoints made by somebody who means harm: nothing in them runs, nothing grows beyond the file.

In: what ``torch.save`` writes, or could be thought to. Out: one named error; whoever loads the same with plain pickle sees
the trace of the code in it, which proves that the trap works.
"""

import io
import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Bomb, watched
from test_mutated_files import make_head

from featcache import checkpoint
from featcache.backbones import load_backbone
from featcache.errors import BackboneError, ModelError
from featcache.tensorfiles import DamagedFile, load_tensors

NAME = "squeezenet1_1"


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def archive(entries: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a name that occurs twice
        for name, data in entries.items():
            target.writestr(name, data)
    return stream.getvalue()


def entries_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        return {name: source.read(name) for name in source.namelist()}


def with_code(trace: Path) -> dict[str, bytes]:
    """Files that run code in whoever trusts them."""
    bomb, weights = Bomb(trace), {"a": torch.zeros(3)}
    good = entries_of(saved(weights))
    pickled = next(name for name in good if name.endswith("data.pkl"))
    script = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still to be met
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as target:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = len(pickle.dumps(bomb))
            target.addfile(info, io.BytesIO(pickle.dumps(bomb)))
    return {
        "pickle": pickle.dumps(bomb),
        "pickle of protocol 0": pickle.dumps(bomb, 0),
        "torch.save": saved({"a": torch.zeros(3), "b": bomb}),
        "torch.save, legacy": saved({"b": bomb}, _use_new_zipfile_serialization=False),
        "as a key": saved(OrderedDict([(("x", bomb), torch.zeros(1))])),
        "whole module": saved(torch.nn.Sequential(torch.nn.Linear(2, 2))),
        "in the archive": archive(good | {pickled: pickle.dumps({"a": bomb})}),
        "TorchScript": script.getvalue(),
        "tar": tar.getvalue(),
        "behind the weights": saved(weights, _use_new_zipfile_serialization=False)[:-40] + pickle.dumps(bomb),
    }


KINDS = tuple(with_code(Path("never")))


def test_the_trap_works(tmp_path: Path) -> None:
    trace = tmp_path / "exploded"
    pickle.loads(with_code(trace)["pickle"])
    assert trace.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.safetensors"])
def test_code_in_weights_is_never_run(tmp_path: Path, kind: str, name: str) -> None:
    trace = tmp_path / "exploded"
    (tmp_path / name).write_bytes(with_code(trace)[kind])
    with pytest.raises(BackboneError, match="cannot be read as weights|do not fit") as refused:
        load_backbone(NAME, tmp_path / name)
    assert not trace.exists()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, kind: str) -> None:
    output, trace = tmp_path / "ft", tmp_path / "exploded"
    folder = checkpoint.work_folder(output)
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "checkpoint.pt").write_bytes(with_code(trace)[kind])
    with pytest.raises(ModelError, match="is damaged|another version"):
        checkpoint.open_work(output, {"seed": 0})
    assert not trace.exists()


def _bomb_of_zeros(good: dict[str, bytes]) -> bytes:
    name = next(name for name in good if name.endswith("data/0"))
    return archive(good | {name: bytes(2**28)}, zipfile.ZIP_DEFLATED)


def _claimed_size(good: dict[str, bytes]) -> bytes:
    """The table at the archive's end says that an entry has four gigabytes."""
    data = bytearray(archive(good))
    at = data.index(b"PK\x01\x02")
    data[at + 20 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little") * 2
    return bytes(data)


def _flipped(good: dict[str, bytes]) -> bytes:
    name = next(name for name in good if name.endswith("data/0"))
    data = archive(good)
    return data.replace(good[name], bytes([good[name][0] ^ 1]) + good[name][1:], 1)


ARCHIVES: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "bomb": (_bomb_of_zeros, "compressed"),
    "claims to be huge": (_claimed_size, "claims to hold more|broken|BadZipFile"),
    "one bit": (_flipped, "checksum mismatch"),
    "climbs out": (lambda good: archive(good | {"../../evil": b"x", "/tmp/evil": b"x"}), ""),
    "no pickle": (lambda good: archive({"a/readme": b"x"}), ""),
    "empty": (lambda good: archive({}), ""),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_that_deceive(tmp_path: Path, kind: str) -> None:
    change, words = ARCHIVES[kind]
    path = tmp_path / "in" / "w.pth"
    path.parent.mkdir()
    path.write_bytes(change(entries_of(saved({"a": torch.arange(1.0, 200.0)}))))
    with watched() as seen:
        try:
            found = load_tensors(path)
        except DamagedFile as error:
            assert not words or any(word in str(error) for word in words.split("|")), error
        else:
            assert kind == "climbs out" and torch.equal(found["a"], torch.arange(1.0, 200.0))
    assert not [line for line in seen if "evil" in line]
    assert [entry.name for entry in tmp_path.rglob("*") if entry.is_file()] == ["w.pth"]


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1},
        {"a": "text"},
        ["tensor", torch.zeros(2)],
        {"a": torch.zeros(2, 2).to_sparse()},
        {"features.0.weight": torch.zeros(64, 3, 3, 3, dtype=torch.complex64)},
        {"features.0.weight": torch.zeros(1).expand(2**40)},
        {"state_dict": {"a": {}}},
    ],
    ids=["number", "text", "list", "sparse", "complex", "terabytes", "nested"],
)
def test_values_that_are_no_weights(tmp_path: Path, value: Any) -> None:
    (tmp_path / "w.pth").write_bytes(saved(value))
    with pytest.raises(BackboneError, match="weights|no table of tensors"):
        load_backbone(NAME, tmp_path / "w.pth")


def test_good_weights_are_taken(tmp_path: Path) -> None:
    """The good neighbour of all the above."""
    backbone = load_backbone(NAME, "none")
    (tmp_path / "w.pth").write_bytes(saved(backbone.module.state_dict()))
    assert load_backbone(NAME, tmp_path / "w.pth").weights_sha256 == backbone.weights_sha256
    assert make_head(0).kind == "mlp"
