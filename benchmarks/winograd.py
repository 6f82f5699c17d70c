"""How much faster are 3 x 3 convolutions in float32 by fewer multiplications, layer by layer, and networks with them?

    python benchmarks/winograd.py [--networks resnet18,resnet50,vgg16,...] [--rounds 9]

One thread, its CPU time, the best of the rounds, both sides in turns. Layers: 8 images forward by oneDNN with weights laid out before,
back by PyTorch, with a bias; errors by a length, of maps, of gradients of inputs and of weights. Networks: a batch of 8 embedded as
`extract` does it, a part of --part images forward and back as `finetune` does it, batch norms frozen; random weights and pixels, at 224.
A table is printed, and one JSON line at the end.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from facts import machine_facts
from torch import nn

from featcache.backbones import winograd
from featcache.backbones.folding import fold_batchnorm, fuse_convolutions
from featcache.backbones.load import load_backbone
from featcache.finetuning.fused import make_form
from featcache.finetuning.onednn import without_faults
from featcache.system.memory import keep_freed_memory

_LAST = torch.channels_last
LAYERS = (
    (8, 64, 56),
    (8, 128, 28),
    (8, 256, 14),
    (8, 512, 7),
    (4, 512, 7),
    (1, 64, 224),
    (2, 256, 56),
)  # images, channels, edge
NETWORKS = (
    "resnet18,resnet34,resnet50,vgg16,densenet121,efficientnet_v2_s,googlenet,inception_v3,regnet_x_400mf,timm/resnetv2_50,"
    "timm/repvgg_a0,timm/dla34,timm/hrnet_w18_small"
)


def milliseconds(sides: list[Callable[[], object]], rounds: int) -> list[float]:
    """CPU time of this thread for each, the least of some rounds; after one that does not count."""
    found: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for side, times in zip(sides, found, strict=True):
            begun = time.thread_time()
            side()
            if number:
                times.append(1000 * (time.thread_time() - begun))
    return [min(times) for times in found]


def settings(description: str | None, networks: str) -> argparse.Namespace:
    """Those of the command line; and one thread that keeps its memory."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=networks)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--part", type=int, default=4)
    keep_freed_memory()
    torch.set_num_threads(1)
    return parser.parse_args()


def layer(channels: int, edge: int, images: int, rounds: int) -> dict[str, Any]:
    """One convolution, forward and back."""
    x, gradient = (torch.randn(images, channels, edge, edge).contiguous(memory_format=_LAST) for _ in range(2))
    weight = (torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5).contiguous(memory_format=_LAST)
    bias, ones = torch.randn(channels), [1, 1]
    pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed = pack(weight.to_mkldnn(), ones, ones, ones, 1, list(x.shape))
    of_weights, kept = winograd.of_weights(weight), list[torch.Tensor]()

    def plain() -> torch.Tensor:
        run: Any = torch.ops.mkldnn._convolution_pointwise
        return run(x, packed, bias, ones, ones, ones, 1, "none", [], "")  # type: ignore[no-any-return]

    def plain_back() -> list[torch.Tensor]:
        mask = [True, True, False]
        run: Any = torch.ops.aten.convolution_backward
        found = run(gradient, x, weight, None, ones, ones, ones, False, [0, 0], 1, mask)
        return [*found[:2], gradient.sum((0, 2, 3))]

    def tiles() -> torch.Tensor:
        return winograd.convolve(x, of_weights, bias, (1, 1))

    def tiles_back() -> list[torch.Tensor | None]:
        gx, gw, gb = winograd.back(gradient, x, of_weights, (1, 1), kept, (True, True, True))
        return [gx, None if gw is None else winograd.of_weights_back(gw), gb]

    winograd.convolve(x, of_weights, bias, (1, 1), kept)
    pairs = zip([plain(), *plain_back()[:2]], [tiles(), *tiles_back()[:2]], strict=True)
    errors = [float((a - b).norm() / a.norm()) for a, b in pairs if b is not None]
    times = milliseconds([plain, tiles, plain_back, tiles_back], rounds)
    return {"forward": times[:2], "back": times[2:], "both": (times[0] + times[2]) / (times[1] + times[3])} | {
        "errors": errors
    }


def network(name: str, part: int, rounds: int) -> dict[str, Any]:
    """Embedding and training with no layer by tiles, and with those for which it pays."""
    backbone, shares = load_backbone(name, "none"), (0.0, winograd._WORTH)
    x = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=_LAST)
    fast, steps, embeddings, tiled = [], [], [], 0
    for share in shares:  # of the convolution's own time, below which tiles are taken
        winograd._WORTH = share
        with torch.inference_mode():
            folded = fold_batchnorm(backbone.module, (224, 224)).to(memory_format=_LAST)
            fused = fuse_convolutions(folded, x, batch_size=len(x))
            embeddings.append(fused(x))
        tiled = sum(type(module).__name__ == "_TiledConvolution" for module in fused.modules())
        fast.append(torch.inference_mode()(lambda fused=fused: fused(x)))
        module = without_faults(load_backbone(name, "none").module.to(memory_format=_LAST)).requires_grad_(True)
        form = make_form(module, nn.Linear(1, 1), x[:2], torch.float32)
        form.refresh(torch.float32)

        def step(form: Any = form) -> object:
            y = form.embed(x[:part])
            return torch.autograd.grad((y * torch.linspace(-1, 1, y.shape[1])).mean(), form.leaves, allow_unused=True)

        steps.append(step)
    winograd._WORTH = shares[1]
    embed, train = milliseconds(fast, rounds), milliseconds(steps, max(1, rounds // 3))
    error = float((embeddings[0] - embeddings[1]).norm() / embeddings[0].norm())
    found: dict[str, Any] = {"layers": tiled, "embed": embed, "train": train, "error": error}
    return found | {"times": [embed[0] / embed[1], train[0] / train[1]]}


def main() -> None:
    """See above."""
    options = settings(__doc__, NETWORKS)
    results: dict[str, Any] = {}
    for images, channels, edge in LAYERS:
        found = results[f"{images} x {channels}, {edge} x {edge}"] = layer(channels, edge, images, options.rounds)
        (a, b), (c, d), errors = found["forward"], found["back"], " ".join(f"{e:.0e}" for e in found["errors"])
        words = f"forward {a:.1f}, {b:.1f} ms ({a / b:.2f} times), back {c:.1f}, {d:.1f} ({c / d:.2f}), both {found['both']:.2f}"
        print(f"{images} images, {channels} channels, {edge} x {edge}: {words}; errors {errors}", flush=True)
    for name in filter(None, options.networks.split(",")):
        found = results[name] = network(name, options.part, options.rounds)
        (a, b), (c, d), (embed, train) = found["embed"], found["train"], found["times"]
        words = f"embed {a:.0f}, {b:.0f} ms ({embed:.2f} times), train {c:.0f}, {d:.0f} ms ({train:.2f})"
        print(f"{name}, {found['layers']} layers: {words}; embeddings differ by {found['error']:.0e}", flush=True)
    print(json.dumps({"benchmark": "winograd", "results": results} | machine_facts()))


if __name__ == "__main__":
    main()
