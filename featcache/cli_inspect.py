"""The commands that look and report: info, verify, backbones, doctor; and demo. Added to the others by ``cli``."""

from pathlib import Path
from typing import Annotated

import typer

from featcache import options
from featcache.display import print_facts, print_json, say


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``, in the order in which its help shows them."""
    examples = (
        (info, "featcache info features.h5  ·  featcache info model/"),
        (verify, "featcache verify features.h5"),
        (backbones, "featcache backbones convnext"),
        (doctor, "featcache doctor  ·  featcache doctor --images photos/ --backbone mobilenet_v3_large"),
        (demo, "featcache demo"),
    )
    for command, example in examples:
        app.command(epilog=options.EXAMPLES + example)(command)


def info(
    path: Annotated[Path, typer.Argument(readable=False, help="A cache file or a model folder.")],
    as_json: options.Json = False,
) -> None:
    """Show what a cache or a model holds and where it came from."""
    from featcache.inspection import describe

    print_facts(describe(path), as_json)


def verify(
    cache: Annotated[Path, typer.Argument(readable=False, help="A cache file.")],
    as_json: options.Json = False,
) -> None:
    """Read every byte of a cache and compare it with the checksums."""
    from featcache.cache import FeatureCache
    from featcache.errors import CacheError

    opened = FeatureCache.open(cache)
    damaged = opened.verify()
    print_json({"cache": cache, "rows": len(opened), "damaged": damaged}, as_json)
    if damaged:
        rows = ", ".join(f"{start}-{stop - 1}" for start, stop in damaged[:20])
        raise CacheError(
            f"{cache} is damaged: checksum mismatch in rows {rows}; `featcache extract --force` makes it anew"
        )
    say(f"{cache}: {len(opened)} rows, all intact")


def backbones(
    pattern: Annotated[str, typer.Argument(help="Only names that contain this.")] = "",
    as_json: options.Json = False,
) -> None:
    """List the backbones that extract knows."""
    from featcache.backbones import backbone_names

    names = backbone_names(pattern)
    if as_json:
        print_json({"backbones": names}, as_json)
    else:
        print("\n".join(names))
    say(f"{len(names)} backbones" + (f" with {pattern!r} in their name" if pattern else ""))


def doctor(
    images: Annotated[
        Path | None, typer.Option(readable=False, help="Folder or CSV to measure with; generated photos if not given.")
    ] = None,
    backbone: options.Backbone = "resnet50",
    weights: Annotated[
        str | None, typer.Option(help="As for extract; if not given random ones, which are as fast, and no download.")
    ] = None,
    precision: options.Precision = "auto",
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    batch_size: options.BatchSize = "auto",
    seconds: Annotated[
        float, typer.Option(min=0.0, max=3600.0, help="How long to measure; 0 only shows the facts.")
    ] = 20.0,
    as_json: options.Json = False,
) -> None:
    """Show what this machine can do, measure how fast it embeds, and say what limits."""
    from featcache.images import list_images
    from featcache.inspection import machine
    from featcache.runtime import choose_runtime

    threads, batch = options.count(workers, "workers"), options.count(batch_size, "batch size")
    listed = list_images(images, labelled=False) if images else None
    runtime = choose_runtime(device, workers=threads, batch_size=batch)
    facts = machine(runtime)
    if not seconds:
        print_facts(facts, as_json)
        return
    from featcache.measuring import check_up

    measured = check_up(listed, runtime, backbone=backbone, weights=weights, precision=precision, seconds=seconds)
    print_json(facts | {"measured": measured}, as_json)
    if not as_json:
        sentences = measured.pop("advice")
        print_facts(facts | {"measured": measured}, as_json)
        print("\n".join(sentences))


def demo(
    folder: Annotated[Path, typer.Option(help="Where to work; made if missing.")] = Path("featcache-demo"),
    as_json: options.Json = False,
) -> None:
    """Do the whole job on handwritten digits, without any download."""
    from featcache.demo import run_demo

    facts = run_demo(folder, lambda line: print(line, flush=True))
    print_json(facts, as_json)
