"""What the README says can be done is done: its tutorials' commands run, its files exist, it stays short enough to be read."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import COLOURS, write_photo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# The folders of the five tutorials, as their readers have them: which splits lie in which.
FOLDERS = {
    "hymenoptera_data": ("train", "val"),
    "Cat_Dog_data": ("train", "test"),
    "flower_photos": ("",),
    "caltech101": ("train", "valid", "test"),
    "my_photos": ("train", "val"),
}
# 550 and 100 MB of random weights, hashed and written again and again, would prove no more; nor would large inputs.
SMALLER = {"vgg16": "mobilenet_v2", "resnet50": "resnet18"}


def tutorials() -> dict[str, list[list[str]]]:
    """Folder -> the commands of its row, in order."""
    section = README.split("\n## Coming from a tutorial\n")[1].split("\n## ")[0]
    rows = [re.findall(r"`featcache ([^`]+)`", line) for line in section.splitlines() if line.startswith("| ")]
    return {shlex.split(row[0])[1]: [shlex.split(command) for command in row] for row in rows if row}


def test_every_tutorial_has_its_commands() -> None:
    found = tutorials()
    assert list(found) == list(FOLDERS)
    for commands in found.values():
        assert [words[0] for words in commands] == ["extract", "fit-head", "finetune"]
        assert "--recipe" in commands[-1]
    assert found["my_photos"] == [
        [w.replace("hymenoptera_data", "my_photos") for w in c] for c in found["hymenoptera_data"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "my_photos"])  # the first one's commands
def test_the_commands_of_a_tutorial(
    folder: str, tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, split in enumerate(FOLDERS[folder]):
        for name in ("blue", "red"):
            for seed in range(4):
                write_photo(tmp_path / folder / split / name / f"{seed}.jpg", COLOURS[name], 9 * number + seed)
    for command in tutorials()[folder]:
        words = [SMALLER.get(word, word) for word in command]
        random = [] if words[0] == "fit-head" else ["--weights", "none", "--precision", "fp32"]
        if words[0] != "fit-head" and "--crop" not in words:  # smaller inputs, but where the size is the tutorial's
            random += ["--crop", "64"]
        short = ["--epochs", 1] if words[0] == "finetune" else []
        code, out, err = run(*words, *random, *short)
        assert code == 0, (words, err)
        assert words[words.index("-o") + 1] in out


def test_it_is_short_and_its_links_lead_somewhere() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    assert max(map(len, (line for line in lines if not line.startswith("|")))) <= 160
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_terms_are_explained_before_they_are_used() -> None:
    for term, explained in (("LP-FT", "linear probing, then fine-tuning"), ("WiSE-FT", "mixes"), ("spec", "*spec* is")):
        first = re.search(rf"(?<![\w-]){term}(?![\w-])", README)
        assert first, term
        assert README.find(explained) in range(first.start() + 10), term
