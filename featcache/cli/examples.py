"""``examples``: the command that prints files to copy. In: a name. Out: a file of ``featcache/examples``."""

from importlib.resources import files
from typing import Annotated

import typer

from featcache.cli import options
from featcache.cli.console import show_result
from featcache.errors import UsageError


def examples(
    name: Annotated[str | None, typer.Argument(help="One of them. Default: a list of all.")] = None,
    as_json: options.Json = False,
) -> None:
    """Print a file to start from: web service, Docker, Slurm, Kubernetes, Snakemake, DVC.

    They are copied and changed: featcache itself needs none of them.
    """
    folder = files("featcache") / "examples"
    texts = {
        file.name: file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.is_file() and not file.name.startswith("__")
    }
    if name is None:
        width = max(map(len, texts)) + 2
        about = {each: _about(text) for each, text in texts.items()}
        show_result([f"{each:{width}}{line}" for each, line in about.items()], {"examples": about}, as_json=as_json)
        return
    if name not in texts:
        raise UsageError(f"no example is called {name}; there are {', '.join(texts)}")
    show_result(texts[name].splitlines(), {"name": name, "text": texts[name]}, as_json=as_json)


def _about(text: str) -> str:
    """The first sentence that a file says of itself."""
    first = next(line for line in text.splitlines() if not line.startswith("#!"))
    return first.strip('"# ').partition(". ")[0].rstrip(".")


COMMANDS: options.Commands = {
    examples: "featcache examples  ·  featcache examples service.py > service.py",
}
