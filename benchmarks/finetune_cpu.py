"""How fast does fine-tuning train on a CPU: beside the plain loop, its own convolutions alone, and other processes?

    python benchmarks/finetune_cpu.py HYMENOPTERA [--weights FILE] [--backbones mobilenet_v2,resnet18] [--seconds 20] [--pairs 3]
        [--unfreeze most]

HYMENOPTERA holds train and val with class folders. For every backbone and for the recipes default and ants-bees, in a
process of its own each, in turns, --pairs times:

    plain       the tutorial's loop: ImageFolder, PIL transforms, a DataLoader with two workers, NCHW, eager float32, as PyTorch
                comes, all weights trained; batches of 32 (default: AdamW, gradient clipped, batch norms' statistics still) or of 4
                (ants-bees: SGD)
    featcache   ``finetune`` from a head that was fit before, its defaults, or so much of the network as --unfreeze says. Where other
                weights train in later epochs, each rate is measured, and images/s are those of all epochs
    ceiling     forward and backward passes of the network's convolutions and products with weights alone, in the precision and
                the parts that featcache takes, on as many cores, on tensors that are there already, gradients of what the recipe
                trains alone; featcache may pass it where 3 x 3 convolutions in float32 take fewer multiplications than PyTorch's
    load        featcache again, beside one process per core that computes without end (with --load)

Images per second are of training alone, from the end of the first step on, evaluation left out. "start" is from the start of the
process to the end of the first step. --weights is a file for the first backbone; others are random. Backbones are torchvision's, or
timm's: timm/NAME. The last line is JSON.

A CPU with AVX2 alone is imitated by ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 in the
environment, and --precision fp32.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from facts import machine_facts

_BEGUN = time.time()
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPES = {"default": 32, "ants-bees": 4}  # images per step


class _EnoughSeen(Exception):  # noqa: N818 - no error
    pass


def make_model(name: str, **options: Any) -> Any:
    """torchvision's, or timm's at 224 pixels; random weights."""
    if name.startswith("timm/"):
        import timm

        fixed = {"img_size": 224} if "vit" in name else {}
        return timm.create_model(name.removeprefix("timm/"), pretrained=False, **fixed, **options)
    from torchvision import models

    return models.get_model(name, weights=None, **options)


def plain(job: dict[str, Any]) -> dict[str, Any]:
    """The tutorial's loop."""
    import torch
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)])
    images = datasets.ImageFolder(str(Path(job["images"]) / "train"), transform)
    loader = torch.utils.data.DataLoader(images, RECIPES[job["recipe"]], shuffle=True, num_workers=2)
    model = make_model(job["backbone"], num_classes=2).train()
    still = job["recipe"] == "default"
    for module in model.modules():
        if still and isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    if still:
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-5)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    seen, begun, start = 0, 0.0, 0.0
    while True:
        for x, y in loader:
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            if still:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            now = time.perf_counter()
            if not begun:
                begun, start = now, time.time() - _BEGUN
                continue
            seen += len(y)
            if now - begun > job["seconds"]:
                return {"rate": seen / (now - begun), "start": start}


def featcache(job: dict[str, Any]) -> dict[str, Any]:
    """``finetune``, watched from its progress."""
    from featcache import finetune

    seen, trained, start = 0, 0.0, 0.0
    last: tuple[int, int, float] = (0, 0, 0.0)

    def watch(status: Any) -> None:
        nonlocal seen, trained, start, last
        now = time.perf_counter()
        start = start or time.time() - _BEGUN
        if status.epoch == last[0]:
            seen, trained = seen + status.done - last[1], trained + now - last[2]
        last = status.epoch, status.done, now
        if trained > job["seconds"]:
            raise _EnoughSeen

    with tempfile.TemporaryDirectory() as folder:
        try:
            changes = {"epochs": 1000, "patience": 0, "unfreeze": job["unfreeze"]}
            output = Path(folder) / "model"
            options = {"init": job["init"], "recipe": job["recipe"], "precision": job["precision"]}
            finetune(job["images"], output, **options, changes=changes, progress=watch)
        except _EnoughSeen:
            pass
    return {"rate": seen / trained, "start": start}


def products(model: Any, pixels: Any, dtype: Any) -> list[tuple[Any, Any, Any, Any]]:
    """Every product with weights that ``model`` computes of ``pixels``, also those of attention and of layers that pad by themselves.

    Returns:
        In their order: what computes it as featcache does, its weights, an input and a gradient of its result, both in ``dtype``.
        What asks for gradients are weights that do in ``model``, and inputs that depend on such.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from featcache.finetuning.fused import _Convolution

    trains = {parameter.data_ptr(): parameter.requires_grad for parameter in model.parameters()}
    found: list[tuple[Any, Any, Any, Any]] = []

    def note(layer: Any, weight: Any, x: Any, result: Any, **layout: Any) -> None:
        x, g = (torch.rand_like(t).to(dtype).contiguous(**layout) for t in (x, result))
        found.append((layer, weight, x.requires_grad_(any(weight.requires_grad for _, weight, *_ in found)), g))

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result, ops = function(*args, **(kwargs or {})), torch.ops.aten
            if function is ops.convolution.default:
                x, weight, _, stride, padding, dilation, *_, groups = args
                sizes = x.shape[1], len(weight), weight.shape[2:]
                conv = torch.nn.Conv2d(*sizes, stride, padding, dilation, groups, bias=False)
                layer = _Convolution(conv.requires_grad_(trains.get(weight.data_ptr(), True)), (), ("none", [], ""))
                list(layer.refresh(dtype, {}))
                note(layer, layer._weight, x, result, memory_format=torch.channels_last)
            elif function in (ops.addmm.default, ops.mm.default) and args[-1].data_ptr() in trains:
                weight = args[-1].t().to(dtype, copy=True).requires_grad_(trains[args[-1].data_ptr()])
                note(functools.partial(torch.nn.functional.linear, weight=weight), weight, args[-2], result)
            return result

    with Noted():  # gradients on: without them attention would take another way
        model(pixels)
    return found


def ceiling(job: dict[str, Any]) -> dict[str, Any]:
    """Convolutions and products with weights alone."""
    import torch

    from featcache.backbones.load import load_backbone
    from featcache.finetuning.micro_batches import images_at_once
    from featcache.finetuning.network import unfreeze, with_new_head
    from featcache.finetuning.recipes import choose_recipe
    from featcache.finetuning.trainer import choose_training_precision
    from featcache.system.device import choose_runtime, one_core_each

    runtime = choose_runtime("cpu")
    whole = job["recipe"] != "default"
    precision = choose_training_precision(job["precision"], runtime.device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    recipe = choose_recipe(job["recipe"], n_train(job), unfreeze=job["unfreeze"])
    backbone = load_backbone(job["backbone"], "none")
    network = with_new_head(backbone, recipe, 2, seed=0)
    unfreeze(network, recipe, epoch=0)
    model = network.backbone.eval()
    images = RECIPES["ants-bees"] if whole else images_at_once(runtime, model)
    layers = products(model, torch.rand(images, 3, *backbone.preprocess.crop), dtype)

    def step(_: int) -> None:
        results = [layer(x) for layer, _, x, _ in layers]
        for (_, weight, x, g), y in reversed(list(zip(layers, results, strict=True))):
            if wanted := [t for t in (x, weight) if t.requires_grad]:
                torch.autograd.grad(y, wanted, g)

    workers = 1 if whole else runtime.workers
    if whole:
        torch.set_num_threads(runtime.workers)
    with one_core_each(workers, "ceiling") as pool:
        run = map if whole else pool.map  # as featcache: a batch that is one part in this thread
        list(run(step, range(workers)))
        begun, seen = time.perf_counter(), 0
        while time.perf_counter() - begun < job["seconds"]:
            list(run(step, range(2 * workers)))
            seen += 2 * images * workers
        return {"rate": seen / (time.perf_counter() - begun), "precision": precision}


SIDES = {"plain": plain, "featcache": featcache, "ceiling": ceiling}


def prepare(images: str, backbone: str, weights: str, folder: Path) -> str:
    """A model to start from: the path."""
    code = f"""if True:
        from featcache import extract, fit_head
        extract({images!r}, {str(folder / "features.h5")!r}, backbone={backbone!r}, weights={weights!r})
        fit_head({str(folder / "features.h5")!r}, {str(folder / "head")!r}, C=1.0, folds=0)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    return str(folder / "head")


def mean_rate(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """``measure``, of each phase of the recipe: images per second over all epochs; other facts are those of the first phase."""
    if side == "plain":
        return measure(side, job)
    from featcache.finetuning.recipes import choose_recipe

    recipe = choose_recipe(job["recipe"], n_train(job), unfreeze=job["unfreeze"])
    epochs = recipe.phases(recipe.epochs)
    found = {depth: measure(side, job | {"unfreeze": depth}) for depth in epochs}
    rate = recipe.epochs / sum(n / found[depth]["rate"] for depth, n in epochs.items())
    phases = {depth: facts["rate"] for depth, facts in found.items()}
    return next(iter(found.values())) | {"rate": rate, "phases": phases}


def n_train(job: dict[str, Any]) -> int:
    """Training images."""
    return len(list((Path(job["images"]) / "train").glob("*/*")))


def measure(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """One side, in a process of its own; ``load``: beside one busy process per core."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range((os.cpu_count() or 1) * (side == "load"))
    ]
    try:
        command = [
            sys.executable,
            __file__,
            "--job",
            json.dumps(job | {"side": "featcache" if side == "load" else side}),
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return json.loads(done.stdout.splitlines()[-1]) | {"machine_load": os.getloadavg()[0]}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--backbones", default="mobilenet_v2,resnet18")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precision", default="auto", help="of featcache and the ceiling")
    parser.add_argument("--unfreeze", help="of featcache and the ceiling; else the recipe's own")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        print(json.dumps(SIDES[job["side"]](job)))
        return
    sides = [*SIDES, *(["load"] if options.load else [])]
    results, rows = {}, []
    backbones = options.backbones.split(",")
    for backbone, recipe in itertools.product(backbones, options.recipes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            weights = options.weights if backbone == backbones[0] else "none"
            init = prepare(options.images, backbone, weights, Path(folder))
            job = {
                "images": options.images,
                "backbone": backbone,
                "recipe": recipe,
                "precision": options.precision,
                "seconds": options.seconds,
                "unfreeze": options.unfreeze,
                "init": init,
            }
            rounds = [{side: mean_rate(side, job) for side in sides} for _ in range(options.pairs)]
        rates = {side: statistics.median(one[side]["rate"] for one in rounds) for side in sides}
        ratios = {
            side: statistics.median(one["featcache"]["rate"] / one[side]["rate"] for one in rounds)
            for side in ("plain", "ceiling")
        }
        if options.load:
            ratios["load"] = statistics.median(one["load"]["rate"] / one["featcache"]["rate"] for one in rounds)
        starts = {side: statistics.median(one[side]["start"] for one in rounds) for side in ("plain", "featcache")}
        results[f"{backbone}, {recipe}"] = {"rates": rates, "ratios": ratios, "starts": starts, "rounds": rounds}
        cells = [f"{side} {rate:.1f}" for side, rate in rates.items()]
        rows.append(f"{backbone}, {recipe}: images/s {', '.join(cells)}; featcache / plain {ratios['plain']:.2f}, ")
        rows[-1] += f"featcache / ceiling {ratios['ceiling']:.2f}, start {starts['featcache']:.1f} s"
        rows[-1] += f", under load {ratios['load']:.0%} of idle" if options.load else ""
        print(rows[-1], flush=True)
    print(json.dumps({"benchmark": "finetune_cpu", "results": results} | machine_facts()))


if __name__ == "__main__":
    main()
