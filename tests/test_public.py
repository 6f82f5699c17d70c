"""What the package promises: the names in README, each of them there, and nothing else."""

import re
from pathlib import Path

import featcache

README = Path(__file__).parents[1] / "README.md"


def test_readme_lists_every_public_name() -> None:
    section = README.read_text().split("\n## Python\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table)))
    assert named == set(featcache.__all__)


def test_every_public_name_is_there_and_documented() -> None:
    assert dir(featcache) == sorted([*featcache.__all__, "__version__"])
    for name in featcache.__all__:
        assert getattr(featcache, name).__doc__, name
