"""Does PyTorch on this CPU compute the convolutions of the networks that featcache takes, and their gradients, rightly?

    python benchmarks/convolutions.py [--networks 'resnet|mobilenet'] [--most 60] [--dilated]

Every convolution of torchvision's networks and of the lightest one of each of timm's families (`--most` million parameters at
most), at the network's own size, without weights: each shape once. Its result and both gradients, channels last, in float32 and in
bfloat16, are compared with PyTorch's own arithmetic (oneDNN off) on the same rounded numbers. `--dilated`: shapes of every group
and dilation instead. They are computed in processes of their own, which may crash, in memory filled with other values and, with
glibc's `libc_malloc_debug`, checked for writes beyond its blocks. What is found wrong is for `featcache/finetuning/onednn.py`,
which has it computed otherwise; the exit code is 1 if anything else is.
"""

import argparse
import ctypes.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from facts import machine_facts
from torch import nn

from featcache.finetuning.onednn import crashes, is_garbage

Shape = tuple[Any, ...]  # in, out, kernel, stride, padding, dilation, groups, (height, width)
NEAR = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # relative to the length: rounding is a tenth of it
LAST = torch.channels_last


# --------------------------------------------------------------------------------------------- which convolutions


def networks(pattern: str, most: float) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, network without weights, and edge of its images."""
    import timm
    import torchvision.models as torchvisions

    for name in torchvisions.list_models(module=torchvisions):
        if re.search(pattern, name):
            where = "cpu" if name.startswith("regnet") else "meta"  # which rounds widths by tensors
            with torch.device(where):
                model = torchvisions.get_model(name)
            if count(model) <= most:
                yield name, model.to("meta"), 299 if name.startswith("inception") else 224
    families: dict[str, tuple[float, str, nn.Module, int]] = {}
    for name in timm.list_models():
        settings = timm.get_pretrained_cfg(name)
        if settings is None or not re.search(pattern, name):
            continue
        try:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=0)
        except Exception as error:  # those that need another package, or memory of their own
            print(f"  left out: timm/{name}: {type(error).__name__}", file=sys.stderr)
            continue
        edge, family = settings.input_size[-1], name.split("_")[0]
        work = count(model) * edge**2
        if count(model) <= most and work < families.get(family, (float("inf"),))[0]:
            families[family] = work, f"timm/{name}", model, edge
    for _, name, model, edge in families.values():
        yield name, model, edge


def count(model: nn.Module) -> float:
    """Million parameters."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def shapes_of(pattern: str, most: float) -> dict[Shape, list[str]]:
    """Every shape of a convolution, and networks that have it."""
    found: dict[Shape, list[str]] = defaultdict(list)
    for name, model, edge in networks(pattern, most):

        def note(conv: nn.Conv2d, inputs: tuple[torch.Tensor], _: object, name: str = name) -> None:
            if conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and inputs[0].ndim == 4:
                geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
                found[conv.in_channels, conv.out_channels, *geometry, tuple(inputs[0].shape[2:])].append(name)

        for conv in model.eval().modules():
            if isinstance(conv, nn.Conv2d):
                conv.register_forward_hook(note)
        try:
            with torch.device("meta"), torch.no_grad():
                model(torch.zeros(1, 3, edge, edge))
        except Exception as error:
            print(f"  not whole: {name}: {type(error).__name__}", file=sys.stderr)
    return found


def dilated_shapes() -> dict[Shape, list[str]]:
    """Of every number of groups, dilation, kernel, stride and size that matters."""
    kinds = itertools.product(
        ((8, 1), (64, 1), (16, 4), (128, 32), (16, 16)), (1, 2, 3), (3, 5, 7), (1, 2), (28, 40, 56, 112)
    )
    return {
        (width, width, (k, k), (s, s), (d * (k // 2),) * 2, (d, d), groups, (edge, edge)): ["made"]
        for (width, groups), d, k, s, edge in kinds
    }


# ------------------------------------------------------------------------------------------- whether they are right


def wrong_in(shape: Shape) -> dict[str, dict[str, float]]:
    """Relative errors by precision and kind, of those precisions in which one of them is too large."""
    inside, outside, kernel, stride, padding, dilation, groups, size = shape
    geometry = stride, padding, dilation
    torch.manual_seed(0)
    x = torch.randn(2, inside, *size).bfloat16().float()
    weight = torch.randn(outside, inside // groups, *kernel) / (kernel[0] * kernel[1] * inside // groups) ** 0.5
    weight = weight.bfloat16().float()

    def back(g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, False, [0, 0], groups, mask)

    with torch.backends.mkldnn.flags(enabled=False), warnings.catch_warnings():
        y = torch.conv2d(x, weight, None, *geometry, groups)
        g = torch.randn(y.shape).bfloat16().float()
        of_input, of_weight, _ = back(g, x, weight, [True, True, False])
    found = {}
    for precision, near in NEAR.items():
        tensors = [t.to(precision).contiguous(memory_format=LAST) for t in (x, weight, g)]
        errors: dict[str, float] = defaultdict(float)
        for _ in range(2):
            results = {
                "result": (torch.conv2d(*tensors[:2], None, *geometry, groups), y),
                "gradient of the input": (back(tensors[2], *tensors[:2], [True, False, False])[0], of_input),
                "gradient of the weights": (back(tensors[2], *tensors[:2], [False, True, False])[1], of_weight),
            }
            for kind, (result, right) in results.items():
                error = float((result.float() - right).norm() / right.norm())
                errors[kind] = max(errors[kind], error if error == error else float("inf"))
        if max(errors.values()) > near:
            found[str(precision)] = dict(errors)
    return found


def examine(file: Path) -> None:
    """Print which of the shapes in ``file`` is next, and what is wrong with it, as JSON lines."""
    torch.set_num_threads(1)
    for shape in json.loads(file.read_text()):
        print(json.dumps({"next": shape}), flush=True)
        if wrong := wrong_in(shape):
            print(json.dumps({"wrong": wrong}), flush=True)
    print(json.dumps({"done": True}), flush=True)


def examine_all(shapes: list[Shape]) -> list[tuple[Shape, str]]:
    """Each shape that is wrong, and how, by a process per core."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        shares = pool.map(lambda core: list(examine_share(shapes[core::cores])), range(cores))
        return [found for share in shares for found in share]


def examine_share(shapes: list[Shape]) -> Iterator[tuple[Shape, str]]:
    """The same by one process, which is followed by another one if it crashes."""
    environment = os.environ | {"MALLOC_PERTURB_": "128", "OMP_NUM_THREADS": "1"}
    if checker := ctypes.util.find_library("c_malloc_debug"):
        environment |= {"LD_PRELOAD": checker, "MALLOC_CHECK_": "3"}
    rest = shapes
    with tempfile.TemporaryDirectory() as folder:
        while rest:
            file, current = Path(folder) / "shapes.json", -1
            file.write_text(json.dumps(rest))
            command = [sys.executable, __file__, "--examine", str(file)]
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as child:
                line: dict[str, Any] = {}
                for line in map(json.loads, child.stdout or ()):
                    current += "next" in line
                    for precision, errors in line.get("wrong", {}).items():
                        kinds = ", ".join(f"{kind} {error:.2g}" for kind, error in errors.items() if error > 2e-2)
                        yield rest[current], f"{precision.removeprefix('torch.')}: {kinds}"
            if line.get("done"):
                return
            yield rest[current], f"the process ended with {child.returncode}"
            rest = rest[current + 1 :]


def main() -> None:
    """Collect the shapes, examine them, print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="", metavar="REGEX")
    parser.add_argument("--most", type=float, default=60, metavar="MILLIONS")
    parser.add_argument("--dilated", action="store_true")
    parser.add_argument("--examine", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.examine:
        examine(arguments.examine)
        return
    shapes = dilated_shapes() if arguments.dilated else shapes_of(arguments.networks, arguments.most)
    print(f"{len(shapes):,} shapes", file=sys.stderr)
    rows = []
    for shape, how in examine_all(list(shapes)):
        inside, _, kernel, stride, _, dilation, groups, _ = shape
        weight = torch.empty(1, inside // groups, *kernel, device="meta")
        known = crashes(weight, stride, groups) or is_garbage(dilation, groups)
        rows.append({"shape": shape, "how": how, "known": known, "of": sorted(set(shapes[shape]))[:3]})
        print(f"{'known' if known else 'NEW':5}  {shape}  {how}  {', '.join(rows[-1]['of'])}", flush=True)
    print(json.dumps(machine_facts() | {"shapes": len(shapes), "wrong": rows}))
    if not all(row["known"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
