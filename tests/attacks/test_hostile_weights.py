"""Weights files, downloads and checkpoints made by somebody who means harm: no code in them runs, none is unpacked.

In: every container that PyTorch has used, with a call inside. Out: refused in one line that says what was expected.
"""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Bomb, watched
from test_mutated_files import make_tensors

from featcache.backbones.backbone import load_state, read_weights
from featcache.backbones.load import load_backbone
from featcache.errors import BackboneError, ModelError
from featcache.finetuning import checkpoint
from featcache.system.safe_load import DamagedFile, load_tensors
from featcache.system.workdir import work_folder


def tar(path: Path, bomb: Bomb) -> None:
    """As PyTorch wrote until 0.1.10."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(bomb, 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def torchscript(path: Path, bomb: Bomb) -> None:
    """An archive that names itself a program."""
    torch.save({"conv1.weight": bomb}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(bomb, 2))
        archive.writestr("archive/code/__torch__.py", "import os")


def whole_module(path: Path, bomb: Bomb) -> None:
    module = torch.nn.Linear(1, 1)
    module.bomb = bomb  # type: ignore[assignment]
    torch.save(module, path)


def pickle_in_the_metadata(path: Path, bomb: Bomb) -> None:
    state = torch.nn.Linear(1, 1).state_dict()
    state._metadata["x"] = bomb  # type: ignore[attr-defined]
    torch.save(state, path)


CONTAINERS: dict[str, Callable[[Path, Bomb], object]] = {
    "reduced": lambda path, bomb: torch.save({"conv1.weight": bomb}, path),
    "old": lambda path, bomb: torch.save({"conv1.weight": bomb}, path, _use_new_zipfile_serialization=False),
    "bare pickle": lambda path, bomb: path.write_bytes(pickle.dumps(bomb, 2)),
    "tar": tar,
    "torchscript": torchscript,
    "whole module": whole_module,
    "metadata": pickle_in_the_metadata,
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", ".tar", ""])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_code_in_a_weights_file_is_not_run(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    CONTAINERS[kind](path, Bomb(tmp_path / "exploded"))
    with watched() as seen, pytest.raises(BackboneError, match="cannot be read as weights: expected tensors only") as e:
        read_weights(path, [])
    assert "\n" not in str(e.value)
    assert not (tmp_path / "exploded").exists()
    assert not [entry for entry in seen if entry.startswith(("subprocess", "os.system"))]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, kind: str) -> None:
    work_folder(tmp_path / "m").mkdir()
    CONTAINERS[kind](work_folder(tmp_path / "m") / "checkpoint.pt", Bomb(tmp_path / "exploded"))
    with pytest.raises(ModelError, match=r"checkpoint.pt is damaged .*; discard the interrupted run with --force"):
        checkpoint.open_work(tmp_path / "m", {})
    assert not (tmp_path / "exploded").exists()


def test_code_among_downloaded_weights_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own reader of downloads unpickles anything, and looks at no checksum once a file is there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    for kind in ("reduced", "old", "bare pickle"):
        CONTAINERS[kind](path, Bomb(tmp_path / "exploded"))
        with pytest.raises(BackboneError, match=r"squeezenet1_1-b8a52dc0.pth is damaged: its sha256 begins with"):
            load_backbone("squeezenet1_1")
        with monkeypatch.context() as patched, pytest.raises(BackboneError, match="could not be downloaded"):
            # as if the hash were right
            patched.setattr("featcache.backbones.from_torchvision._check_downloaded", lambda path: None)
            load_backbone("squeezenet1_1")
    assert not (tmp_path / "exploded").exists()


def rezip(path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], **options: Any) -> None:
    """Write the archive anew, entry by entry."""
    with zipfile.ZipFile(path) as source:
        entries = [(name, source.read(name)) for name in source.namelist()]
    with zipfile.ZipFile(path, "w", **options) as target:
        for entry in entries:
            if (changed := change(*entry)) is not None:
                target.writestr(*changed)


def test_an_entry_that_calls_itself_a_folder_is_refused(tmp_path: Path) -> None:
    """PyTorch 2.15 takes its size, reads nothing, and returns whatever lay in memory there."""
    torch.save(make_tensors(0), tmp_path / "w.pth")
    data = bytearray((tmp_path / "w.pth").read_bytes())
    last = data.rfind(b"data/2")
    data[data.rfind(b"PK\x01\x02", 0, last) + 38] = 0x10  # the entry's attributes
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(DamagedFile, match="holds a folder"):
        load_tensors(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["bomb", "traversal", "twice", "missing", "short"])
def test_archives_that_deceive_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.pth"
    torch.save(make_tensors(0), path)
    with zipfile.ZipFile(path) as archive:
        prefix = archive.namelist()[0].split("/")[0]
    if kind == "bomb":  # a thousand times its size once unpacked
        rezip(path, lambda n, d: (n, bytes(10**7) if "data/0" in n else d), compression=zipfile.ZIP_DEFLATED)
    elif kind == "traversal":
        rezip(path, lambda n, d: (f"{prefix}/../../escaped" if "data/0" in n else n, d))
    elif kind == "twice":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{prefix}/data/0", bytes(60))
    else:
        rezip(path, lambda n, d: (n, d[:7] if kind == "short" else d) if kind == "short" or "data/0" not in n else None)
    with pytest.raises(DamagedFile):
        load_tensors(path)
    with pytest.raises(BackboneError, match="cannot be read as weights"):
        load_backbone("squeezenet1_1", path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.pth"]


STATES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "whole numbers": (lambda w: w.long(), "int64, expected"),
    "complex": (lambda w: w.to(torch.complex64), "complex64, expected"),
    "sparse": (lambda w: w.to_sparse(), "sparse_coo, expected"),
    "terabytes without memory": (lambda w: torch.zeros(1).expand(2**40), "is .1099511627776,., expected"),
    "no numbers": (lambda w: torch.empty(0), "is .0,., expected"),
}


@pytest.mark.parametrize("kind", STATES)
def test_tensors_of_other_kinds_are_refused(kind: str) -> None:
    change, words = STATES[kind]
    model = torch.nn.Linear(3, 2)
    state = dict(model.state_dict()) | {"weight": change(model.weight.detach())}
    with pytest.raises(BackboneError, match=words):
        load_state(model, state, ignore=(), source="file w.pth")
    assert torch.isfinite(model.weight).all()


def test_half_precision_weights_are_welcome() -> None:
    model = torch.nn.Linear(3, 2)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    load_state(model, state, ignore=(), source="file w.pth")


@pytest.mark.parametrize("metadata", ["text", {"": "text"}, {"": {"version": "text"}}, {1: {}}, None])
def test_versions_that_make_no_sense_are_no_traceback(tmp_path: Path, metadata: Any) -> None:
    state = torch.nn.Linear(3, 2).state_dict()
    state._metadata = metadata  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "w.pth")
    read = read_weights(tmp_path / "w.pth", [])[0].tensors
    assert sorted(read) == ["bias", "weight"]
    load_state(torch.nn.Linear(3, 2), read, ignore=(), source="file w.pth")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc"])
def test_devices_are_no_weights(path: str) -> None:
    with pytest.raises(BackboneError, match="no such file|cannot be read as weights"):
        read_weights(Path(path), [])
