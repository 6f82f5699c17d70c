"""How fast is a transformer on this CPU, next to ResNet-50, timm's own forward pass, ONNX Runtime and OpenVINO?

    python benchmarks/transformers_on_cpu.py [--seconds 120] [--rounds 3] [--networks ViT-S/14 ResNet-50 ...]

Random weights, random pixels of 224 x 224, forward pass only. eager: timm's network as timm runs it, batches of 32 on all
cores. featcache: as `extract` runs it, batches of 8, one worker per core. ONNX Runtime and OpenVINO, where installed: the
network exported in float32, batches of 8, one thread per core. All take turns, in slices, so that other programs disturb
all alike; medians over the rounds. CPU ms counts the time of all cores for one image, so it also means something on a
machine that is busy with other things. The last column is that time by ResNet-50's on the same side at the same
precision; of the other engines by featcache's. A table is printed, and one JSON line at the end.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import machine_facts

from featcache.backbones.backbone import Backbone
from featcache.backbones.encoder import build_encoder
from featcache.backbones.load import load_backbone
from featcache.system.device import Runtime, choose_runtime, has_bf16_arithmetic, one_core_each

NETWORKS = {
    "ResNet-50": "timm/resnet50",
    "ViT-S/14": "timm/vit_small_patch14_reg4_dinov2",
    "ViT-B/16": "timm/vit_base_patch16_224",
    "SigLIP-B/16": "timm/vit_base_patch16_siglip_224",
    "ConvNeXt-T": "timm/convnext_tiny",
    "Swin-T": "timm/swin_tiny_patch4_window7_224",
    "MobileNetV2": "timm/mobilenetv2_100",
    "EfficientNet-Lite0": "timm/tf_efficientnet_lite0",
}
DEFAULT, OTHERS = ["ResNet-50", "ViT-S/14", "MobileNetV2", "EfficientNet-Lite0"], "ViT-S/14"
Side = tuple[str, str, str]  # network, precision, engine
Batch = tuple[Callable[[], object], int, int]  # one batch, its images, how many run side by side


def eager(backbone: Backbone, precision: str) -> Batch:
    """timm's network, all cores on one batch."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module, x = backbone.module, torch.rand(32, 3, 224, 224)
    module = load_backbone(backbone.name, "none", size=(224, 224)).module.to(dtype) if precision == "bf16" else module

    @torch.inference_mode()
    def run() -> object:
        return module(x.to(dtype))

    return run, len(x), 1


def ours(backbone: Backbone, precision: str, runtime: Runtime) -> tuple[Batch, str]:
    """What `extract` runs, and what the self-check said."""
    pixels = np.random.default_rng(0).integers(0, 256, (runtime.batch_size, 224, 224, 3), dtype=np.uint8)
    encoder, choice = build_encoder(backbone, runtime, pixels, precision=precision)  # type: ignore[arg-type]
    return (lambda: encoder(pixels), len(pixels), runtime.workers), choice.form


def onnx_file(backbone: Backbone, runtime: Runtime, path: Path) -> Path:
    """The network in float32, for one batch shape."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        x = torch.rand(runtime.batch_size, 3, 224, 224)
        torch.onnx.export(backbone.module, (x,), path, dynamo=True, verbose=False)
    return path


def onnx_runtime(path: Path, runtime: Runtime) -> Batch:
    """One session, called by every worker."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = {session.get_inputs()[0].name: np.random.rand(runtime.batch_size, 3, 224, 224).astype(np.float32)}
    return lambda: session.run(None, x), runtime.batch_size, runtime.workers


def openvino(path: Path, runtime: Runtime) -> Batch:
    """One stream per worker; float32, although it would choose bf16 by itself."""
    import openvino as ov

    config = {"NUM_STREAMS": runtime.workers, "INFERENCE_NUM_THREADS": runtime.workers}
    model = ov.Core().compile_model(ov.Core().read_model(path), "CPU", config | {"INFERENCE_PRECISION_HINT": "f32"})
    x = np.random.rand(runtime.batch_size, 3, 224, 224).astype(np.float32)
    return lambda: model.create_infer_request().infer([x]), runtime.batch_size, runtime.workers


def prepare(names: list[str], runtime: Runtime) -> tuple[dict[Side, Batch], dict[Side, str], list[str]]:
    """Everything to be measured, in which form ours runs, and what is left out."""
    sides, forms, notes = dict[Side, Batch](), dict[Side, str](), list[str]()
    precisions = ["fp32", "bf16"] if has_bf16_arithmetic() else ["fp32"]
    if len(precisions) == 1:
        notes.append("bf16: this CPU has no arithmetic for it")
    for name in names:
        backbone = load_backbone(NETWORKS[name], "none", size=(224, 224))
        for precision in precisions:
            sides[name, precision, "eager"] = eager(backbone, precision)
            sides[name, precision, "featcache"], forms[name, precision, "featcache"] = ours(
                backbone, precision, runtime
            )
        if name == OTHERS:
            with tempfile.TemporaryDirectory() as folder:
                for engine, make in (("ONNX Runtime", onnx_runtime), ("OpenVINO", openvino)):
                    try:
                        path = Path(folder) / "model.onnx"
                        path = path if path.exists() else onnx_file(backbone, runtime, path)
                        sides[name, "fp32", engine] = make(path, runtime)
                    except ImportError as error:
                        notes.append(f"{engine}: {error}")
    return sides, forms, notes


def slice_of(batch: Batch, seconds: float) -> tuple[float, float]:
    """Images per second, and CPU milliseconds per image, of as many batches as fit into ``seconds``; one at least."""
    run, images, workers = batch
    if workers == 1:
        return timed(lambda: repeat(run, seconds), images)
    with one_core_each(workers, "benchmark") as pool:
        return timed(lambda: sum(pool.map(lambda _: repeat(run, seconds), range(workers))), images)


def repeat(run: Callable[[], object], seconds: float) -> int:
    """How many times ``run`` was called."""
    end, count = time.perf_counter() + seconds, 0
    while not count or time.perf_counter() < end:
        run()
        count += 1
    return count


def timed(work: Callable[[], int], images: int) -> tuple[float, float]:
    """Images per second and CPU milliseconds per image of ``work``, which returns its number of batches."""
    started, cpu = time.perf_counter(), time.process_time()
    count = work() * images
    return count / (time.perf_counter() - started), 1000 * (time.process_time() - cpu) / count


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=DEFAULT)
    parser.add_argument("--seconds", type=float, default=120.0, help="for all slices together")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    facts, runtime = machine_facts(), choose_runtime("cpu")
    sides, forms, notes = prepare(arguments.networks, runtime)
    for batch in sides.values():
        batch[0]()  # first calls allocate and build kernels
    each = arguments.seconds / arguments.rounds / len(sides)
    rounds = [{side: slice_of(batch, each) for side, batch in sides.items()} for _ in range(arguments.rounds)]

    def median(side: Side, what: int) -> float:
        return statistics.median(found[side][what] for found in rounds)

    def ratio(side: Side) -> float | None:
        _, precision, engine = side
        base = ("ResNet-50", precision, engine if engine == "eager" else "featcache")
        return statistics.median(found[side][1] / found[base][1] for found in rounds) if base in sides else None

    result: list[dict[str, Any]] = []
    print(f"{'network':20}{'precision':10}{'engine':22}{'images/s':>9}{'CPU ms':>9}{'of ResNet-50':>14}")
    for side in sides:
        name, precision, engine = side
        words = f"{engine} ({forms[side]})" if side in forms else engine
        times = ratio(side)
        print(f"{name:20}{precision:10}{words:22}{median(side, 0):9.1f}{median(side, 1):9.1f}{times or 0:14.2f}")
        row = {"network": name, "precision": precision, "engine": engine, "form": forms.get(side)}
        result.append(row | {"images_per_second": median(side, 0), "cpu_ms": median(side, 1), "of_resnet50": times})
    for note in notes:
        print(f"left out: {note}")
    print(json.dumps({"rows": result, "workers": runtime.workers, "left_out": notes} | facts))


if __name__ == "__main__":
    main()
