"""The loops that featcache is measured against, by ``extract_vs_loop.py`` and ``gpu.py``. Nothing of featcache is in them.

``plain`` is what tutorials write. ``careful`` is what somebody writes who has read PyTorch's tuning guide: channels_last,
mixed precision, large batches, workers that stay, cuDNN's search, results fetched at the end.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def network(name: str) -> tuple[Any, Callable[[Any], Any]]:
    """A network without its classifier, random weights, of torchvision or ``timm/NAME`` at 224; and the preset's transform."""
    import torch
    from torchvision import models
    from torchvision.transforms._presets import ImageClassification

    if name.startswith("timm/"):
        import timm

        sized = {"img_size": 224} if "vit" in name else {}
        return timm.create_model(name[5:], num_classes=0, **sized).eval(), ImageClassification(crop_size=224)
    model = models.get_model(name, weights=None)
    for head in ("fc", "classifier", "head", "heads"):
        if hasattr(model, head):
            setattr(model, head, torch.nn.Identity())
    return model.eval(), models.get_model_weights(name)["IMAGENET1K_V1"].transforms()


def batches(
    folder: Path, transform: Callable[[Any], Any], *, size: int, careful: bool, pin: bool, shuffle: bool = False
) -> tuple[Iterator[Any], int]:
    """Batches of the images in ``folder``, over and over; and how many are ready before the workers have found their pace."""
    from torch.utils.data import ConcatDataset, DataLoader
    from torchvision import datasets

    workers = min(16, usable_cores())
    images = datasets.ImageFolder(folder, transform)
    many = ConcatDataset([images] * max(1, 400_000 // len(images)))
    loader = DataLoader(
        many, batch_size=size, num_workers=workers, pin_memory=pin, persistent_workers=careful, shuffle=shuffle
    )
    return iter(loader), 2 * workers


def batch_size(device: str, careful: bool) -> int:
    """64, or 256 where workers can hand so large ones over: two of each are in shared memory."""
    if device == "cpu":
        return 4
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free if shared.is_dir() else 2**40
    return 256 if careful and room > 2 * 16 * 2 * 256 * 3 * 224 * 224 * 4 else 64


def embed(folder: Path, name: str, device: str, until: float, *, careful: bool) -> dict[str, Any]:
    """Images/s of embedding once the pace is found, until the clock says ``until`` (time.time)."""
    import torch

    model, transform = network(name)
    size = batch_size(device, careful)
    stream, ready = batches(folder, transform, size=size, careful=careful, pin=device != "cpu")
    model = model.to(device, memory_format=torch.channels_last) if careful else model.to(device)
    torch.backends.cudnn.benchmark = careful
    lower = torch.float16 if device != "cpu" else torch.bfloat16
    clock, features = [time.perf_counter()], []
    with torch.inference_mode(), torch.autocast(torch.device(device).type, lower, enabled=careful):
        for images, _ in stream:
            images = images.to(device, non_blocking=True)
            found = model(images.contiguous(memory_format=torch.channels_last) if careful else images)
            features.append(found if careful else found.cpu())
            clock.append(time.perf_counter())
            if time.time() > until:
                break
        features[-1] = features[-1].float().cpu()  # waits for all
    clock[-1] = time.perf_counter()
    return {"rate": pace(clock, size, ready), "batch_size": size, "images": size * (len(clock) - 1)}


def train(folder: Path, name: str, device: str, until: float) -> dict[str, Any]:
    """Images/s of fine-tuning all weights with the careful loop: crop and flip, autocast, fused AdamW; by the same clock."""
    import torch
    from torch import nn
    from torchvision.transforms import v2

    size = 64 if device != "cpu" else 4
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    stream, ready = batches(folder, transform, size=size, careful=True, pin=device != "cpu", shuffle=True)
    from torchvision import models

    model = models.get_model(name, weights=None, num_classes=2).train().to(device, memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device != "cpu")
    kind = torch.device(device).type
    scaler = torch.amp.GradScaler(kind, enabled=kind == "cuda")
    clock, loss = [time.perf_counter()], torch.zeros(())
    for images, labels in stream:
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(kind, torch.float16 if kind == "cuda" else torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # asks the GPU once whether a gradient is infinite
        scaler.update()
        clock.append(time.perf_counter())
        if time.time() > until:
            break
    final = loss.item()  # waits for all
    clock[-1] = time.perf_counter()
    return {"rate": pace(clock, size, ready), "batch_size": size, "steps": len(clock) - 1, "loss": final}


def pace(clock: list[float], size: int, ready: int) -> float:
    """Images/s between the moments of ``clock``, those left out that batches made before the start have sped up."""
    first = min(ready, (len(clock) - 1) // 2)
    return size * (len(clock) - 1 - first) / (clock[-1] - clock[first])
