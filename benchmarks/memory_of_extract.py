"""Does the memory of `extract` grow with the number of images?

    python benchmarks/memory_of_extract.py [--images 1000 100000] [--backbone squeezenet1_1] [--folder FOLDER]

For every number of images, a folder of small JPEGs is made in a temporary folder below FOLDER (100 pictures, linked again
and again under different names: `extract` compares content only with what is cached already) and embedded by a process of
its own, with random weights. Measured is that process's peak of resident memory. The growth from the first number to
the last is printed, and in bytes per image.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from facts import machine_facts
from out_of_core import peak
from unchanged_folder import make_images

PICTURES = 100
CLASSES = 20


def link_images(root: Path, pictures: list[Path], count: int) -> None:
    """``count`` names in class folders; a copy where the file system has enough links of a picture."""
    for number in range(CLASSES):
        (root / f"class-{number:03d}").mkdir(parents=True)
    for number in range(count):
        path = root / f"class-{number % CLASSES:03d}" / f"{number:07d}.jpg"
        source = pictures[number % len(pictures)]
        try:
            path.hardlink_to(source)
        except OSError:
            path.write_bytes(source.read_bytes())


def child(root: Path, cache: Path, backbone: str) -> dict[str, Any]:
    """Run in a process of its own: embed, and measure."""
    from featcache import ExtractRequest, extract

    report = extract(root, cache, ExtractRequest(backbone=backbone, weights="none", resize=32, crop=32), device="cpu")
    assert report.embedded == report.images
    return {"images": report.images, "peak_mb": peak(), "seconds": report.seconds}


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--backbone", default="squeezenet1_1")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child, arguments.backbone)))
        return

    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        make_images(Path(folder) / "pictures", PICTURES, 1)
        pictures = sorted((Path(folder) / "pictures").rglob("*.jpg"))
        print(f"{'images':>9}{'peak MB':>9}{'seconds':>9}")
        for count in arguments.images:
            root = Path(folder) / f"{count}-images"
            link_images(root, pictures, count)
            command = [sys.executable, __file__, "--backbone", arguments.backbone, "--child", root, f"{root}.h5"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            results.append(json.loads(done.stdout))
            print(f"{count:9,}{results[-1]['peak_mb']:9.1f}{results[-1]['seconds']:9.1f}", flush=True)
    first, last = results[0], results[-1]
    more = last["peak_mb"] - first["peak_mb"]
    each = more * 1e6 / max(last["images"] - first["images"], 1)
    print(f"growth {more / first['peak_mb']:.1%}, {each:.0f} bytes per image")
    facts = {"backbone": arguments.backbone, "growth": more / first["peak_mb"], "bytes_per_image": each}
    print(json.dumps(facts | {"runs": results} | machine_facts()))


if __name__ == "__main__":
    main()
