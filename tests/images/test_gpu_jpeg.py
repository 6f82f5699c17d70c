"""Which files a GPU decodes is a matter of their content, and what becomes of the pixels one of PyTorch's own float resize.

nvJPEG's part is played by libjpeg with its fast transform, whose pixels differ as well; on a GPU, by nvJPEG: ``pytest -m gpu``.
"""

import dataclasses
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import COLOURS, TINY, write_photo
from corpus import exif_of, saved
from PIL import Image

from featcache.backbones.embed import embed, sample_pixels
from featcache.backbones.encoder import build_encoder
from featcache.backbones.self_check import cosine
from featcache.cache.cache import FeatureCache
from featcache.errors import FeatcacheError, MissingDependencyError, RefusedImage, SpecMismatchError, UsageError
from featcache.extraction import job
from featcache.extraction.extract import extract
from featcache.extraction.request import ExtractRequest, load_requested
from featcache.finetuning.pixels import network_input
from featcache.images import fill, gpu_jpeg
from featcache.images.decode import decode_pixels, read_pixels
from featcache.images.gpu_jpeg import GpuJpegs, Undecoded, gpu_jpegs, is_for_gpu, read_for_gpu
from featcache.images.jpeg_header import read_jpeg_header
from featcache.images.preprocess import to_pixels
from featcache.images.read import ReadImage
from featcache.images.source import list_images
from featcache.models.fit import fit_head
from featcache.models.predict import predict
from featcache.spec import PreprocessSpec
from featcache.system.device import choose_runtime

CPU = torch.device("cpu")
SPEC = PreprocessSpec(
    resize=40, crop=(32, 24), interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), decode="gpu"
)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def jpeg(mode: str = "RGB", size: tuple[int, int] = (60, 50), seed: int = 0, **options: object) -> bytes:
    return saved(noise(*size, seed), "JPEG", mode, **options)


def undecoded(*files: bytes) -> list[Undecoded]:
    headers = [read_jpeg_header(data) for data in files]
    return [
        Undecoded(data, header.width * header.height) for data, header in zip(files, headers, strict=True) if header
    ]


def stand_in(files: list[torch.Tensor]) -> list[torch.Tensor]:
    """What torchcodec promises of its decoder: RGB uint8 (3, h, w) of each file."""
    decoded = [simplejpeg.decode_jpeg(file.numpy().tobytes(), fastdct=True, fastupsample=True) for file in files]
    return [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in decoded]


def exact(files: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.from_numpy(decode_pixels(file.numpy().tobytes())).permute(2, 0, 1) for file in files]


def adobe(transform: int) -> bytes:
    return jpeg()[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + jpeg()[2:]


def renamed(names: bytes) -> bytes:
    """Its components called otherwise: R, G and B make decoders take them for that."""
    data = jpeg(subsampling=0)
    for old, new in zip(b"\1\2\3", names, strict=True):
        data = data.replace(bytes((old, 0x11, old > 1)), bytes((new, 0x11, old > 1)), 1)
    return data


BY_GPU = {
    **{f"subsampling {way}": jpeg(subsampling=way) for way in range(3)},
    "grey": jpeg("L"),
    "restarts": jpeg(restart_marker_rows=1),
    "upright": jpeg(exif=exif_of(1)),
    "Adobe's YCbCr": adobe(1),
    "long": jpeg(size=(700, 41)),
}
BY_CPU = {
    "progressive": jpeg(progressive=True),
    "CMYK": jpeg("CMYK"),
    "turned": jpeg(exif=exif_of(6)),
    "Adobe's RGB": adobe(0),
    "named RGB": renamed(b"RGB"),
    "4:1:1": jpeg().replace(b"\x01\x22\x00\x02\x11\x01", b"\x01\x41\x00\x02\x11\x01"),
    "extended": jpeg().replace(b"\xff\xc0", b"\xff\xc1"),
    "filled": jpeg()[:2] + b"\xff" + jpeg()[2:],
    "very long": jpeg(size=(65000, 3)),
    "much too large": jpeg(size=(40 * 33, 40 * 33)),
    "PNG": saved(noise(60, 50), "PNG"),
}


@pytest.mark.parametrize("name", BY_GPU)
def test_usual_jpegs_are_left_to_the_gpu(name: str) -> None:
    header = read_jpeg_header(BY_GPU[name])
    assert header is not None
    assert read_for_gpu(BY_GPU[name], SPEC) == (BY_GPU[name], header.width * header.height)


@pytest.mark.parametrize("name", BY_CPU)
def test_all_else_is_what_it_is_at_full_scale(name: str) -> None:
    data, full = BY_CPU[name], dataclasses.replace(SPEC, decode="full scale")
    header = read_jpeg_header(data)
    assert header is None or not is_for_gpu(header, SPEC)
    try:
        expected = read_pixels(data, full)
    except RefusedImage as reason:  # libjpeg knows no such file
        with pytest.raises(RefusedImage) as found:
            read_for_gpu(data, SPEC)
        assert str(found.value) == str(reason)
        return
    np.testing.assert_array_equal(read_for_gpu(data, SPEC), expected)


def refusal(data: bytes, spec: PreprocessSpec) -> str:
    try:
        read_for_gpu(data, spec) if spec.decode == "gpu" else read_pixels(data, spec)
    except RefusedImage as reason:
        return str(reason)
    return ""


def test_a_damaged_file_is_refused_for_the_same_reason_before_a_gpu_sees_it() -> None:
    """Cut off, ended too early, bytes changed, left out and put in: as at full scale."""
    full, chance, found = dataclasses.replace(SPEC, decode="full scale"), random.Random(0), Counter[bool]()
    for number in range(200):
        whole = jpeg(
            ("RGB", "L")[number % 5 == 0], (90, 70), number % 7, quality=60, restart_marker_rows=number % 3 == 0
        )
        at, size = chance.randrange(whole.index(b"\xff\xda") + 14, len(whole) - 2), chance.choice((1, 1, 2, 30, 3000))
        data = {
            0: whole[:at],
            1: whole[:at] + b"\xff\xd9",
            2: whole[:at] + chance.randbytes(1) + whole[at + 1 :],
            3: whole[:at] + whole[at + size :],
            4: whole[:at] + chance.randbytes(size) + whole[at:],
            5: whole[:at] + whole,
            6: whole,
        }[number % 7]
        assert refusal(data, SPEC) == refusal(data, full), number
        found[refusal(data, SPEC) != ""] += read_jpeg_header(data) is not None
    assert min(found.values()) > 50, "both kinds, with usual headers"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", [40, (33, 50)])
def test_pixels_are_those_of_a_resize_in_float(interpolation: str, resize: int | tuple[int, int]) -> None:
    """Pillow's, of one channel of floats at a time."""
    spec = dataclasses.replace(SPEC, resize=resize, interpolation=interpolation)
    files = [
        jpeg(size=size, seed=seed) for seed, size in enumerate([(90, 70), (50, 40), (60, 120), (90, 70), (29, 31)])
    ]
    found = GpuJpegs(spec, CPU, exact).decode_batch(undecoded(*files))
    assert found.shape == (5, 32, 24, 3) and found.dtype == torch.uint8
    for data, pixels in zip(files, found.numpy(), strict=True):
        expected = resized_by_pillow(decode_pixels(data), spec)
        assert np.abs(pixels - expected).max() < 1  # half a level, and what rounded weights and sums in between add
        apart = GpuJpegs(spec, CPU, exact).decode_batch(undecoded(data))[0]
        np.testing.assert_array_equal(pixels, apart, err_msg="depends on its neighbours")
        by_cpu = to_pixels(decode_pixels(data), dataclasses.replace(spec, decode="full scale"))
        assert np.abs(pixels.astype(int) - by_cpu).max() <= 5  # bicubic, whose first pass is clipped there


def resized_by_pillow(image: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """float (H, W, 3)."""
    height, width = spec.resized(*image.shape[:2])
    method = Image.Resampling[spec.interpolation.upper()]
    planes = [
        Image.fromarray(plane).resize((width, height), method) for plane in image.astype(np.float32).transpose(2, 0, 1)
    ]
    top, left = round((height - spec.crop[0]) / 2), round((width - spec.crop[1]) / 2)
    whole = np.stack([np.asarray(plane) for plane in planes], 2)
    return whole[top : top + spec.crop[0], left : left + spec.crop[1]].clip(0, 255)


def test_few_pixels_are_decoded_at_once() -> None:
    calls = []
    gpu = GpuJpegs(SPEC, CPU, lambda files: calls.append(len(files)) or exact(files), at_once=2 * 60 * 50)
    files = [jpeg(seed=seed) for seed in range(5)]
    together = gpu.decode_batch(undecoded(*files)).numpy()
    assert calls == [2, 2, 1]
    for data, pixels in zip(files, together, strict=True):
        np.testing.assert_array_equal(pixels, gpu.read(data))


@pytest.mark.parametrize(("gigabytes", "millions"), [(8, 33), (24, 33), (40, 67), (80, 67)])
def test_a_whole_batch_is_decoded_at_once_where_there_is_room(
    gigabytes: int, millions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 photographs of 500 x 375 are 48 million pixels; whichever way, the same files are for the GPU."""
    memory = SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(gpu_jpeg, "nvjpeg", lambda device: exact)
    gpu = gpu_jpeg.gpu_jpegs(SPEC, torch.device("cuda"))
    assert gpu is not None
    assert gpu.at_once // 10**6 == millions


def reads(*given: object) -> list[ReadImage]:
    values = [undecoded(value)[0] if isinstance(value, bytes) else value for value in given]
    return [
        ReadImage(10 + k, value, "" if value is not None else "gone", bytes([k]), k, k)
        for k, value in enumerate(values)
    ]


def failing(message: str, *, at: bytes) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    def decode(files: list[torch.Tensor]) -> list[torch.Tensor]:
        if any(file.numpy().tobytes() == at for file in files):
            raise RuntimeError(message)
        return exact(files)

    return decode


def test_an_image_that_the_gpu_refuses_costs_no_other() -> None:
    a, bad, b = (jpeg(seed=seed) for seed in range(3))
    on_cpu = read_for_gpu(BY_CPU["PNG"], SPEC)
    gpu = GpuJpegs(SPEC, CPU, failing("Failed to decode batch: 4\nmore", at=bad))
    found = gpu.finish(reads(a, None, bad, on_cpu, b))
    assert [(read.position, read.digest, read.size) for read in found] == [(10 + k, bytes([k]), k) for k in range(5)]
    assert [read.value is not None for read in found] == [True, False, False, True, True]
    assert found[1].reason == "gone" and found[2].reason == (
        "not decoded by the GPU (Failed to decode batch: 4); --decode full decodes it on the CPU"
    )
    np.testing.assert_array_equal(found[0].value, gpu.read(a))
    np.testing.assert_array_equal(found[3].value, on_cpu)
    np.testing.assert_array_equal(found[4].value, gpu.read(b))
    with pytest.raises(RefusedImage, match="not decoded by the GPU"):
        gpu.read(bad)


def test_a_gpu_that_fails_is_no_property_of_an_image() -> None:
    data = jpeg()
    with pytest.raises(RuntimeError, match="batch: 8"):
        GpuJpegs(SPEC, CPU, failing("Failed to decode batch: 8", at=data)).finish(reads(data))

    def exhausted(_: object) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4")

    with pytest.raises(UsageError, match="decoding 1 images does not fit into cpu's memory; halve --batch-size"):
        GpuJpegs(SPEC, CPU, exhausted).finish(reads(data))
    assert GpuJpegs(SPEC, CPU, exhausted).finish(reads(None))[0].reason == "gone"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, (name, colour) in itertools.product(range(6), COLOURS.items()):
        write_photo(tmp_path / "photos" / name / f"{number}.jpg", colour, number, size=(80, 60 + 7 * number))
    for name in ("progressive", "PNG", "turned", "grey"):
        (tmp_path / "photos" / "red" / f"{name}.jpg").write_bytes((BY_CPU | BY_GPU)[name])
    whole = (tmp_path / "photos" / "red" / "0.jpg").read_bytes()
    (tmp_path / "photos" / "blue" / "half.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    return tmp_path / "photos"


def test_a_spec_of_its_own_from_cache_to_prediction(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    extract(photos, tmp_path / "full.h5", TINY)
    asked = dataclasses.replace(TINY, decode="gpu")
    with monkeypatch.context() as patch:
        patch.setattr(gpu_jpeg, "nvjpeg", lambda device: stand_in)
        with pytest.raises(SpecMismatchError, match="preprocess.decode: full scale -> gpu"):
            extract(photos, tmp_path / "full.h5", asked)
        with caplog.at_level("INFO", "featcache"):
            report = extract(photos, tmp_path / "gpu.h5", asked, workers=3)
        assert "usual JPEGs are decoded by the GPU: to full scale cosine mean 0.9" in caplog.text
        assert (report.embedded, report.refused) == (22, 1)
        full, gpu = (FeatureCache.open(tmp_path / f"{name}.h5") for name in ("full", "gpu"))
        assert gpu.spec.preprocess.decode == "gpu" and gpu.refused == full.refused
        assert 0.9 < cosine(np.asarray(full.X, float), np.asarray(gpu.X, float))[1] < 1
        same = {path for path, a, b in zip(full.paths, full.X, gpu.X, strict=True) if np.array_equal(a, b)}
        assert same == {"red/progressive.jpg", "red/PNG.jpg", "red/turned.jpg"}, "as their content decides"
        # Each row is its own image, by nobody's loop but this one.
        preprocess = load_requested(asked, None).preprocess
        embedder = GpuJpegs(preprocess, CPU, stand_in)
        assert extract(photos, tmp_path / "gpu.h5", ExtractRequest()).reused == 22
        fit_head(tmp_path / "gpu.h5", tmp_path / "model", C=1.0, folds=0)
        cached, images = (list(predict(tmp_path / "model", [source])) for source in (tmp_path / "gpu.h5", photos))
        for one in (row for row in cached if row.status == "ok"):
            other = next(row for row in images if row.path.endswith(one.path))
            np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-4)
        data = (photos / "red" / "1.jpg").read_bytes()
        np.testing.assert_array_equal(network_input(preprocess, CPU)(data), embedder.decode_batch(undecoded(data))[0])
    for work in (
        lambda: list(predict(tmp_path / "model", [photos])),
        lambda: extract(photos, tmp_path / "new.h5", asked),
    ):
        with pytest.raises(UsageError, match="only a CUDA GPU gives, and this would run on cpu: .*--decode full"):
            work()
    assert not (tmp_path / "new.h5").exists()


@pytest.mark.parametrize("faulty", [False, True])
def test_a_ring_of_batches_is_completed_by_the_gpu(photos: Path, monkeypatch: pytest.MonkeyPatch, faulty: bool) -> None:
    """As workers of their own do it; an image that the GPU refuses is one less."""
    bad = (photos / "red" / "1.jpg").read_bytes()
    decoder = failing("Failed to decode batch: 4", at=bad) if faulty else stand_in
    monkeypatch.setattr(gpu_jpeg, "nvjpeg", lambda device: decoder)
    images, backbone = list_images(photos), load_requested(dataclasses.replace(TINY, decode="gpu"), None)
    runtime = dataclasses.replace(choose_runtime("cpu", workers=3), batch_size=8)
    sample = sample_pixels(images, backbone.preprocess, 8)
    encoder, _ = build_encoder(backbone, runtime, sample, precision="fp32")
    ways = [list(embed(images, encoder, runtime, lane=lane)) for lane in (None, encoder.new_lane(8))]
    for one, other in zip(*ways, strict=True):
        np.testing.assert_array_equal(one.indices, other.indices)
        assert one.refused == other.refused
        np.testing.assert_allclose(one.features, other.features, rtol=1e-5, atol=1e-5)
    assert sum(len(batch.indices) for batch in ways[0]) == 22 - faulty


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_processes_hand_files_to_the_gpu_where_they_lie(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the rows of the batch, which are not pixels then: also what overflows is decoded anew."""
    monkeypatch.setattr(gpu_jpeg, "nvjpeg", lambda device: stand_in)
    monkeypatch.setattr(fill, "_FEWEST_IMAGES", 1)
    monkeypatch.setattr(fill, "_FEWEST_CORES", 1)
    images, backbone = list_images(photos), load_requested(dataclasses.replace(TINY, decode="gpu"), None)
    runtime = dataclasses.replace(choose_runtime("cpu", workers=3), batch_size=8)
    processes = fill.start_decoding(3, len(images))
    assert processes is not None
    processes.wait()
    encoder, _ = build_encoder(backbone, runtime, sample_pixels(images, backbone.preprocess, 8), precision="fp32")
    expected = list(embed(images, encoder, runtime))
    lane = encoder.new_lane(8)
    for found, exact in ((lane, None), (Overflowing(lane), encoder)):
        encoder.exact = exact
        batches = list(embed(images, encoder, runtime, lane=found))
        for one, other in zip(expected, batches, strict=True):
            np.testing.assert_array_equal(one.indices, other.indices)
            assert one.refused == other.refused
            np.testing.assert_allclose(one.features, other.features, rtol=1e-5, atol=1e-5)


class Overflowing:
    """A lane that gives infinity for every other image."""

    def __init__(self, lane: Any) -> None:
        self._lane = lane

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lane, name)

    def download(self, computed: Any) -> Callable[[], np.ndarray]:
        wait = self._lane.download(computed)

        def infinite() -> np.ndarray:
            features: np.ndarray = wait().copy()
            features[::2] = np.inf
            return features

        return infinite


def test_what_cannot_be_is_refused_before_work() -> None:
    with pytest.raises(UsageError, match="a GPU resizes bilinear or bicubic, not lanczos"):
        dataclasses.replace(SPEC, interpolation="lanczos")
    with pytest.raises(UsageError, match="unknown decode 'cuda'; choose auto, full, reduced, gpu"):
        dataclasses.replace(TINY, decode="cuda")
    with pytest.raises(UsageError, match="this would run on cpu"):
        network_input(SPEC)
    with pytest.raises(ValueError, match="made by a GPU"):
        read_pixels(jpeg(), SPEC)


def test_a_machine_without_a_gpu_is_told_before_a_backbone_is_loaded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_requested", None)
    with pytest.raises(UsageError, match="this would run on cpu"):
        extract(photos, tmp_path / "f.h5", dataclasses.replace(TINY, decode="gpu"), device="cpu")


def test_a_missing_torchcodec_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'featcache\[gpu\]'") as error:
        gpu_jpegs(SPEC, torch.device("cuda"))
    assert isinstance(error.value, FeatcacheError)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_nvjpeg_gives_nearly_the_same_pixels() -> None:
    pytest.importorskip("torchcodec")
    gpu = gpu_jpegs(SPEC, torch.device("cuda"))
    assert gpu
    files = []
    for k in range(70):
        smooth = Image.fromarray(noise(9, 7, k)).resize((300 + k % 3, 200 + k % 5), Image.Resampling.BICUBIC)
        grey = k % 7 == 0
        options = {"quality": 90} | ({} if grey else {"subsampling": k % 3})
        files.append(saved(np.asarray(smooth), "JPEG", ("RGB", "L")[grey], **options))
    assert [read_for_gpu(data, SPEC) for data in files] == undecoded(*files)
    found = gpu.decode_batch(undecoded(*files)).cpu().numpy()
    np.testing.assert_array_equal(found, gpu.decode_batch(undecoded(*files)).cpu().numpy(), err_msg="not repeatable")
    for data, pixels in zip(files, found, strict=True):
        by_cpu = read_pixels(data, dataclasses.replace(SPEC, decode="full scale")).astype(int)
        assert np.abs(pixels - by_cpu).mean() < 1.5
        np.testing.assert_array_equal(pixels, gpu.read(data), err_msg="depends on its neighbours")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_cache_made_on_a_gpu(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchcodec")
    for name, decode in (("full", "full"), ("gpu", "gpu"), ("again", "gpu")):
        request = dataclasses.replace(TINY, decode=decode)
        assert extract(photos, tmp_path / f"{name}.h5", request, device="cuda", workers=4).embedded == 22
    full, gpu, again = (FeatureCache.open(tmp_path / f"{name}.h5") for name in ("full", "gpu", "again"))
    assert full.refused == gpu.refused
    assert cosine(np.asarray(full.X, float), np.asarray(gpu.X, float))[1] > 0.99
    np.testing.assert_array_equal(gpu.X, again.X)
