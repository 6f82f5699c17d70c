"""Print the lower bounds of all dependencies, extras included, as constraints for pip: what the oldest supported versions are."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
requirements = [
    *project["dependencies"],
    *(entry for extra in project["optional-dependencies"].values() for entry in extra),
]
for requirement in sorted({entry for entry in requirements if not entry.startswith("featcache")}):
    found = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(?:>=|==|~=)([\w.]+)", requirement)
    assert found, requirement
    print(f"{found[1]}=={found[2]}")
