"""Count every backbone of the installed timm and torchvision into featcache/backbones/catalog.csv: 1,500 networks, half a second each.

Lines of the present file are kept where the input is the same; ``--anew`` counts them again, too.
"""

import csv
import dataclasses
import importlib.metadata
import sys
from pathlib import Path

from featcache.backbones import catalog
from featcache.backbones.load import backbone_names, published, tagged_names
from featcache.errors import BackboneError

old = {} if "--anew" in sys.argv else catalog.counted()
tagged: dict[str, list[str]] = {}  # timm/ARCH -> timm/ARCH.TAG
for name in tagged_names():
    tagged.setdefault(name.split(".")[0], []).append(name)

lines: dict[str, catalog.Counted] = {}
for arch in backbone_names():
    sizes: dict[tuple[int, int] | None, catalog.Counted] = {}
    for name in [arch, *tagged.get(arch, [])]:  # the default weights come first, by the name without a tag
        try:
            full, licence, size = published(name)
            line = sizes.get(size) or old.get(name)
            if line is None or (line.height, line.width) != size:
                line = catalog.count_live(name)
        except BackboneError as error:
            print(f"cannot be taken: {error}", file=sys.stderr, flush=True)
            lines.setdefault(name, catalog.Counted(name, 0, 0, 0, 0, 0, None))
            continue
        sizes[size] = line
        lines.setdefault(full, dataclasses.replace(line, name=full, licence=licence))

versions = " ".join(f"{library} {importlib.metadata.version(library)}" for library in ("timm", "torchvision"))
with Path(catalog.__file__).with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
    file.write(f"# {versions}\n")
    csv.writer(file, lineterminator="\n").writerows(dataclasses.astuple(line) for line in lines.values())
