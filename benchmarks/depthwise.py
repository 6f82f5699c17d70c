"""How much faster is the gradient of wide depthwise weights on a CPU, three columns at a time, and training with it?

    python benchmarks/depthwise.py [--networks efficientnet_b0,convnext_tiny,...] [--rounds 9] [--part 4]

One thread, its CPU time, the best of the rounds, both sides in turns, float32. Layers: the gradient of the weights alone, of --part
images. Networks: a part of --part images forward and back as `finetune` does it, batch norms frozen; random weights and pixels, at
224. A line each is printed, and one JSON line at the end.
"""

import json
from typing import Any

import torch
from facts import machine_facts
from torch import nn
from winograd import milliseconds, settings

from featcache.backbones.load import load_backbone
from featcache.finetuning import convolutions
from featcache.finetuning.fused import make_form

_LAST = torch.channels_last
LAYERS = (  # edge, channels, kernel, stride: of EfficientNet-B0, then of ConvNeXt-T
    (56, 144, 5, 2),
    (28, 240, 5, 1),
    (14, 480, 5, 1),
    (14, 672, 5, 1),
    (14, 672, 5, 2),
    (7, 1152, 5, 1),
    (56, 96, 7, 1),
    (28, 192, 7, 1),
    (14, 384, 7, 1),
    (7, 768, 7, 1),
)
NETWORKS = "efficientnet_b0,mobilenet_v3_large,mnasnet1_0,convnext_tiny,timm/tf_efficientnet_lite0"


def layer(images: int, edge: int, channels: int, kernel: int, stride: int, rounds: int) -> dict[str, Any]:
    """Milliseconds at once and by columns, and how far they are apart."""
    torch.manual_seed(0)
    out = (edge - 1) // stride + 1
    x, g = (torch.randn(images, channels, side, side).contiguous(memory_format=_LAST) for side in (edge, out))
    weight = torch.randn(channels, 1, kernel, kernel).contiguous(memory_format=_LAST)
    padding, strides = [kernel // 2] * 2, [stride] * 2

    def at_once() -> torch.Tensor:
        settings = None, strides, padding, [1, 1], False, [0, 0], channels, [False, True, False]
        found: torch.Tensor = torch.ops.aten.convolution_backward(g, x, weight, *settings)[1]
        return found

    def by_columns() -> torch.Tensor:
        return convolutions._of_wide_weights(g, x, weight, padding, strides)

    error = float((at_once() - by_columns()).norm() / at_once().norm())
    return {"ms": milliseconds([at_once, by_columns], rounds), "error": error}


def network(name: str, part: int, rounds: int) -> list[float]:
    """Milliseconds at once and by columns."""
    x = torch.randn(part, 3, 224, 224).contiguous(memory_format=_LAST)
    module = load_backbone(name, "none").module.to(memory_format=_LAST).eval().requires_grad_(True)
    form = make_form(module, nn.Linear(1, 1), x[:2], torch.float32)
    form.refresh(torch.float32)
    may_be_cut = convolutions._may_be_cut

    def step(by_columns: bool) -> None:
        convolutions._may_be_cut = may_be_cut if by_columns else lambda *_: False
        y = form.embed(x)
        torch.autograd.grad((y * torch.linspace(-1, 1, y.shape[1])).mean(), form.leaves, allow_unused=True)

    try:
        return milliseconds([lambda: step(False), lambda: step(True)], rounds)
    finally:
        convolutions._may_be_cut = may_be_cut


def main() -> None:
    """See above."""
    options = settings(__doc__, NETWORKS)
    results: dict[str, Any] = {}
    for edge, channels, kernel, stride in LAYERS:
        label = f"{channels} channels, {edge} x {edge}, {kernel} x {kernel}, stride {stride}"
        found = results[label] = layer(options.part, edge, channels, kernel, stride, options.rounds)
        (a, b), error = found["ms"], found["error"]
        print(f"{label}: {a:.2f}, {b:.2f} ms ({a / b:.2f} times), apart by {error:.0e} of a length", flush=True)
    for name in filter(None, options.networks.split(",")):
        a, b = results[name] = network(name, options.part, options.rounds)
        print(f"{name}: {a:.0f}, {b:.0f} ms ({a / b:.2f} times)", flush=True)
    print(json.dumps({"benchmark": "depthwise", "results": results} | machine_facts()))


if __name__ == "__main__":
    main()
