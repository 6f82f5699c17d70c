"""Charts as files, for papers and slides. In: charts of a page. Out: SVG files in a folder, each with its style inside."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from featcache.backbones.saved import MANIFEST
from featcache.errors import StorageError
from featcache.reports.elements.charts import Chart
from featcache.reports.elements.page import Section
from featcache.system.files import check_output, publish_file

_MARK = "<!-- drawn by featcache -->"  # near the start of each of ours
_STYLE = Path(__file__).parent / "pages" / "style.css"


def check_figures(folder: Path) -> None:
    """Raise StorageError, before any work, if figures cannot be written to ``folder``, which may be there and hold other things."""
    check_output(folder, folder_allowed=True)
    if os.path.lexists(folder) and not folder.is_dir():
        raise StorageError(f"cannot write {folder}: it is a file, and figures are several; give the name of a folder")
    if (folder / MANIFEST).exists():
        raise StorageError(
            f"cannot write to {folder}: it is a model, which keeps no other files; choose another folder"
        )


def write_figures(charts: Iterable[Chart], folder: Path) -> list[Path]:
    """Write each chart as ``its-title.svg``. Figures of an earlier run are replaced.

    Raises:
        StorageError: a file of this name is no figure of ours, or it cannot be written.
    """
    folder.mkdir(exist_ok=True)
    paths: dict[Path, Chart] = {}
    for chart in charts:
        paths[folder / f"{_name(chart.title, [path.stem for path in paths])}.svg"] = chart
    for path in paths:  # all, before one is written
        if os.path.lexists(path) and not _is_ours(path):
            raise StorageError(
                f"{path} exists and is no figure that featcache wrote; move it away or choose another folder"
            )
    for path, chart in paths.items():
        with publish_file(path) as file:
            file.write(figure_file(chart).encode("utf-8", "backslashreplace"))
    return list(paths)


def charts_in(sections: Iterable[Section]) -> list[Chart]:
    """All charts that sections show, in order: values of their contexts, alone or in lists."""
    found: list[Chart] = []
    for section in sections:
        for value in section.context.values():
            found += [
                each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, Chart)
            ]
    return found


def figure_file(chart: Chart) -> str:
    """A chart as a file of its own, for a paper: the same picture, light, with its style inside."""
    opening, rest = str(chart.svg).split(">", 1)
    size = opening.split('viewBox="0 0 ')[1].split('"')[0].split()
    opening = opening.replace(
        "<svg", f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}"', 1
    )
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{_MARK}\n{opening}><style>{_file_style()}</style>{rest}\n'


def _file_style() -> str:
    """The part of the style sheet that charts need, its variables replaced: programs that draw figures know none."""
    sheet = _STYLE.read_text(encoding="utf-8")
    rules = sheet.split("/* charts */")[1].split("/* end of charts */")[0].replace("var(--sans)", "Arial, sans-serif")
    values = dict(re.findall(r"(--[\w-]+): ([^;]+);", sheet.split("}")[0])) | {"--page": "#fff"}
    return re.sub(r"var\((--[\w-]+)\)", lambda found: values[found[1]], rules)


def _name(title: str, taken: Iterable[str]) -> str:
    """For a file, of what every file system takes; a number behind it where it is taken."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "figure"
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(each for each in names if each not in taken)


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK.encode() in file.read(512)
