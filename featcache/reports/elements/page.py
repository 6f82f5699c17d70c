"""The one way to make a page. In: a template of ``pages/`` and values. Out: one HTML file that asks for nothing from anywhere.

Whatever comes from names, labels and paths is text: Jinja2 escapes it, and control characters and bytes that are no UTF-8 are
written out, as on a terminal. A Content-Security-Policy lets a browser obey nothing but the style sheet and the script of
this package, by their hashes: no inline style or event handler works in a template; widths come from SVG or classes.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from featcache.errors import StorageError, UsageError
from featcache.reports.elements.cards import card_filters, card_sorts
from featcache.reports.elements.charts import share_bar
from featcache.reports.elements.numbers import bytes_text, count_text, number_text, percent_text
from featcache.system.display import middle_out, printable
from featcache.system.files import check_output, publish_file

_FOLDER = Path(__file__).parents[1] / "pages"
_MARK = b'<meta name="generator" content="featcache">'
_LOOKED_AT = 1024  # bytes, for the mark


def render_page(
    template: str | jinja2.Template, *, title: str, data: Mapping[str, Any] | None = None, **context: Any
) -> str:
    """A whole page as text.

    Args:
        template: a file of ``pages/`` that extends ``base.html``, or a template of ``environment()``.
        title: of the page, and its heading.
        data: for the script, as JSON, and for the template: ``cards``, what ``cards.cards_data`` gives; ``selections``, name ->
            row numbers, for ``part.select``. NaN and infinities become null.
        context: what else the template uses; one that it uses and that is missing raises jinja2.UndefinedError.
    """
    style, script = _asset("style.css"), _asset("script.js")
    if data and "map" in data:  # half as long again: only where there is a map
        script += _asset("map.js")
    assets = {"style": Markup(style), "script": Markup(script), "policy": _policy(style, script)}
    json_text = json_in_html(data or {})
    return (
        environment().get_template(template).render(title=title, data=data or {}, json=json_text, **assets, **context)
    )


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page that several parts make up, each from its own template: ``render_sections``.

    Attributes:
        anchor: its id, for links. title: its heading. template: a file of ``pages/``, which holds what follows the heading.
        context: what the template uses. word: for the table of contents; its title when empty.
    """

    anchor: str
    title: str
    template: str
    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    word: str = ""


def render_sections(
    sections: Sequence[Section], *, title: str, lead: Any = "", data: Mapping[str, Any] | None = None
) -> str:
    """A page of sections, in order, with a table of contents. ``lead``: stands below the title."""
    bodies = [
        (section, Markup(environment().get_template(section.template).render(data=data or {}, **section.context)))
        for section in sections
    ]
    return render_page("sections.html", title=title, data=data, lead=lead, sections=bodies)


def check_page_path(path: Path) -> None:
    """Refuse, before any work, a place that no page should be written to.

    Raises:
        UsageError: the name does not end in .html. StorageError: the folder is missing or not writable, or ``path`` is a folder
        or a file that is no page of featcache's.
    """
    if path.suffix.lower() != ".html":
        raise UsageError(f"a page is written to a file whose name ends in .html, found {str(path)!r}")
    check_output(path)
    if os.path.lexists(path) and not _is_page(path):
        raise StorageError(f"{path} exists and is no page that featcache wrote; move it away or choose another name")


def publish_page(path: Path, html: str) -> None:
    """Write a page, in one step; an earlier page is replaced. Raises as ``check_page_path`` and ``publish_file`` do."""
    check_page_path(path)
    content = html.encode("utf-8", "backslashreplace")
    with publish_file(path, needed=len(content)) as file:
        file.write(content)


def title_of(html: str) -> str:
    """The title of a page that ``render_page`` made."""
    return unescape(html.partition("<title>")[2].partition("</title>")[0])


def json_in_html(value: Any) -> Markup:
    """``value`` as JSON within a script element: no character that would end it, in ASCII.

    Surrogates (bytes of names that are no UTF-8) stay what they are, so that the script can give the bytes back.
    """
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _finite(value: Any) -> Any:
    """What JSON can hold: arrays as lists, NaN and infinities as None."""
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return _finite(value.tolist()) if hasattr(value, "tolist") else value


def _is_page(path: Path) -> bool:
    if not path.is_file():  # a pipe would wait for somebody to write
        return False
    with path.open("rb") as file:
        return _MARK in file.read(_LOOKED_AT)


@functools.cache
def _asset(name: str) -> str:
    """With line ends as a browser counts them, whatever the checkout made of them."""
    return (_FOLDER / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {source(style)}; script-src {source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


@functools.cache
def environment() -> jinja2.Environment:
    """Where templates live: everything escaped, names made visible, a missing value an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "name": _name,
        "short": lambda text, most: middle_out(printable(str(text)), most),
        "percent": percent_text,
        "count": count_text,
        "number": number_text,
        "bytes": bytes_text,
        "share_bar": share_bar,
        "contents_entry": lambda section: (section.anchor, section.word or section.title),
    }
    made.globals |= {"card_filters": card_filters, "card_sorts": card_sorts}
    return made


def _shown(value: Any) -> Any:
    """What stands in the page for a value of a template: text that no reader is misled by."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _name(text: Any, most: int = 0) -> Any:
    """A name by itself in its own direction of writing; of one longer than ``most`` the ends, the whole on hovering."""
    if hasattr(text, "__html__"):
        return text
    whole = printable(str(text))
    short = middle_out(whole, most) if most else whole
    hint = Markup(' title="{}"').format(whole) if short != whole else Markup()
    return Markup("<bdi{}>{}</bdi>").format(hint, escape(short))
