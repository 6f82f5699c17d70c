"""Count every backbone of the installed timm and torchvision into featcache/backbones/catalog.csv: an hour on one core.

Lines that the present file has are kept where licence and input are the same; ``--anew`` counts all of them again.
"""

import csv
import dataclasses
import importlib.metadata
import sys

import timm

from featcache.backbones import catalog
from featcache.backbones.load import backbone_names, published
from featcache.errors import BackboneError

path = catalog.Path(catalog.__file__).with_suffix(".csv")
old = {} if "--anew" in sys.argv or not path.is_file() else dict(catalog.counted())
tags: dict[str, list[str]] = {}
for tagged in timm.list_models(pretrained=True):
    tags.setdefault(tagged.split(".")[0], []).append(tagged)
lines: list[catalog.Counted] = []
for name in backbone_names():
    arch = name.removeprefix("timm/")
    names = [name]
    if name.startswith("timm/") and (tag := timm.get_pretrained_cfg(arch).tag):
        first = f"{arch}.{tag}"
        names = [f"timm/{each}" for each in [first, *(other for other in tags.get(arch, []) if other != first)]]
    done: dict[tuple[int, int], catalog.Counted] = {}
    for each in names:
        try:
            _, licence, size = published(each)
            same = done.get(size) or old.get(each)
            if same is None or (same.height, same.width) != size:
                same = catalog.count_live(each)
        except BackboneError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        done[size] = same
        lines.append(dataclasses.replace(same, name=each, licence=licence))
versions = " ".join(f"{library} {importlib.metadata.version(library)}" for library in ("timm", "torchvision"))
with path.open("w", newline="", encoding="utf-8") as file:
    file.write(f"# {versions}\n")
    csv.writer(file, lineterminator="\n").writerows(dataclasses.astuple(line) for line in lines)
