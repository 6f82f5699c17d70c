"""Shared by all tests: small image folders, a small backbone, and no network."""

import ctypes
import functools
import logging
import os
import socket
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

# Several test processes share the cores: threads that spin waiting for each other would take minutes. Before NumPy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.extend(str(folder) for folder in Path(__file__).parent.iterdir() if folder.is_dir())

import numpy as np
import pytest
import typer.main
from faults import Program, program
from PIL import Image

from featcache.cli import app as cli
from featcache.extraction.extract import extract
from featcache.extraction.request import ExtractRequest
from featcache.models.fit import fit_head
from featcache.spec import PreprocessSpec, Spec

# Random weights, but a real network; small inputs keep it fast. Its random embeddings are of a sane size, too: those of
# random MobileNets are about 1e-10.
# In float32 on every machine: what --precision auto takes depends on the CPU, see ``bf16_arithmetic``.
TINY = ExtractRequest(backbone="squeezenet1_1", weights="none", resize=40, crop=32, precision="fp32")
TINY_FLAGS = ["--backbone", "squeezenet1_1", "--weights", "none", "--resize", "40", "--crop", "32"]
TINY_FLAGS += ["--precision", "fp32"]
SPEC = Spec(  # of caches that tests write by hand
    backbone="squeezenet1_1",
    weights_sha256="0" * 64,
    layer="classifier.1",
    preprocess=PreprocessSpec(
        resize=40, crop=(32, 32), interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    ),
    precision="reference",
    storage="float16",
)
COLOURS = {"blue": (30, 40, 200), "green": (40, 190, 60), "red": (210, 40, 30)}


@pytest.fixture(scope="session", autouse=True)
def _temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests, libraries and their processes leave in the system's temporary folder goes with the tests' own folders."""
    folder = str(tmp_path_factory.mktemp("tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="module", autouse=True)
def _freed_memory() -> Iterator[None]:
    """Goes back to the system, which featcache does not let it do: a test process would grow to gigabytes."""
    yield
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` need a CUDA device. Asked here, of each one that is run: asking takes time."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the tests run without a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """The command line sets the log's level for good, which the next test must not inherit."""
    log = logging.getLogger("featcache")
    level, handlers = log.level, log.handlers[:]
    yield
    log.setLevel(level)
    log.handlers[:] = handlers


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Of featcache alone: libraries log too, when they like; Ray from a thread that outlives the test that started it."""
    ours = logging.Filter("featcache")
    caplog.handler.addFilter(ours)
    yield caplog
    caplog.handler.removeFilter(ours)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, loading a backbone fails: what works does so without one."""
    monkeypatch.setattr("featcache.backbones.load.load_backbone", None)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Pretend that this is a notebook's kernel; what it is shown. The real one: ``tests/notebooks``."""
    shown: list[dict[str, str]] = []

    def display(content: dict[str, str], **_: Any) -> SimpleNamespace:
        shown.append(content)
        return SimpleNamespace(update=lambda content, **_: shown.append(content))

    modules = {"IPython": ModuleType("IPython"), "IPython.display": ModuleType("IPython.display")}
    vars(modules["IPython"])["get_ipython"] = lambda: SimpleNamespace(kernel="there")
    vars(modules["IPython.display"])["display"] = display
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return shown


@pytest.fixture(params=[False, True], ids=["without bf16", "with bf16"])
def bf16_arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs a test as on both kinds of CPU. Whichever this one is not is pretended; PyTorch then computes bf16 slowly."""
    for module in ("system.device", "backbones.encoder", "finetuning.trainer"):
        monkeypatch.setattr(f"featcache.{module}.has_bf16_arithmetic", lambda: request.param)
    return bool(request.param)


@pytest.fixture
def small_vits(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's ViTs have four narrow blocks: to draw the 88 million weights of vit_b_32 takes seconds."""
    from torchvision.models import vision_transformer

    build, narrow = vision_transformer._vision_transformer, {"num_layers": 4, "num_heads": 3, "hidden_dim": 96}

    def build_small(**options: Any) -> Any:
        return build(**options | narrow | {"mlp_dim": 384})

    monkeypatch.setattr(vision_transformer, "_vision_transformer", build_small)


@pytest.fixture(scope="session")
def warm() -> Iterator[Program]:
    """The program, to be run and broken in forks of one process that all tests share, as it takes seconds to start."""
    with program() as started:
        yield started


def write_photo(path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (61, 47)) -> Path:
    """A noisy picture of one colour; JPEG or PNG by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(path)
    return path


def make_photos(root: Path, *, each: int = 6, splits: tuple[str, ...] = (), settled: bool = False) -> Path:
    """``each`` photos of every class, below every split if any are given; ``settled``: their times can be trusted at once."""
    seed = 0
    for split in splits or ("",):
        for name, colour in COLOURS.items():
            for number in range(each):
                seed += 1
                path = write_photo(root / split / name / f"{number:02d}.jpg", colour, seed)
                if settled:
                    settle(path)
    return root


def settle(path: Path) -> None:
    """Give a file a time that tells its content: long ago, and of no other file."""
    os.utime(path, ns=(0, 10**18 + zlib.crc32(os.fsencode(path))))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """150 rows of three classes, a third of them in each split."""
    from caches import make_classes  # which takes SPEC from here

    make_classes(tmp_path / "f.h5", np.arange(150) % 3, 1 + np.arange(150) // 50)
    return tmp_path / "f.h5"


@pytest.fixture
def model(cache: Path, tmp_path: Path) -> Path:
    """A head trained on ``cache``."""
    fit_head(cache, tmp_path / "m", C=1.0)
    return tmp_path / "m"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, f.h5 and a model m/."""
    folder = tmp_path_factory.mktemp("trained")
    extract(make_photos(folder / "photos", each=8), folder / "f.h5", TINY)
    fit_head(folder / "f.h5", folder / "m")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, for the tests of pages. Of one module, as its event loop is in the way of those that start their own."""
    from browser import running_browser

    with running_browser() as found:
        yield found


_get_command = functools.cache(typer.main.get_command)  # a tenth of a second each time


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["featcache", *map(str, arguments)])
        monkeypatch.setattr(typer.main, "get_command", _get_command)
        monkeypatch.setattr(cli, "_log_to_stderr", lambda: None)
        monkeypatch.setattr(cli, "_collect_less", lambda: None)
        monkeypatch.setattr(cli, "interrupt_on_signals", lambda: None)  # signals are pytest's here
        monkeypatch.setenv("FEATCACHE_SUPERVISE", "0")  # this process has threads, and must not be forked
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return call
