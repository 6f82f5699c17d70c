"""What to type instead where a path is of no use: one place for every command.

In: a path as somebody typed it, and the command. Out: an error that says what is there (``path_kinds.py``), what was expected and
the command that was probably meant.
"""

import contextlib
import difflib
import itertools
import os
import re
import shlex
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

from featcache.errors import CacheError, FeatcacheError, ModelError, SourceError, StorageError
from featcache.system import addresses
from featcache.system.addresses import AnyPath
from featcache.system.path_kinds import (
    CACHE_SUFFIXES,
    ENOUGH,
    FOLDERS,
    SOURCES,
    Kind,
    as_path,
    is_model,
    kind_by_name,
    kind_of,
)

_INPUTS = (*SOURCES, Kind.CACHE, Kind.IMAGE, Kind.FILE)
_WANTED: dict[str, tuple[type[FeatcacheError], str, tuple[Kind, ...]]] = {
    "model": (ModelError, "the folder of a model", (Kind.MODEL,)),
    "cache": (CacheError, "a cache", (Kind.CACHE,)),
    "images": (SourceError, "a folder, an archive or a table of images", (*SOURCES, Kind.FILE)),
    "images or cache": (
        SourceError,
        "a folder, an archive or a table of images, or a cache",
        (*SOURCES, Kind.FILE, Kind.CACHE),
    ),
    "inputs": (SourceError, "images, a folder, archive or table of them, or a cache", _INPUTS),
    "vectors": (SourceError, "a table of vectors, Parquet or .npz", (Kind.PARQUET, Kind.ARRAYS)),
    "cache or model": (CacheError, "a cache or the folder of a model", (Kind.CACHE, Kind.MODEL)),
}
HERE = ...  # the place of a path among the words of a command
Words = Sequence[object]
_EXPORTED = "it is for other programs to run"
# Of -o, by command and what it reads; of the other commands their name.
_EXAMPLES = {
    ("extract", "images"): "features.h5",
    ("fit-head", "cache"): "model",
    ("finetune", "images"): "model-ft",
    ("export", "model"): "model.onnx",
    ("export", "cache"): "features.parquet",
    ("import", "vectors"): "features.h5",
}


def check_path(path: AnyPath, wanted: str, words: Words) -> None:
    """Raise unless ``path`` holds what a command takes in its place. What is missing is left to whoever opens it.

    Args:
        path: as typed. wanted: a key of ``_WANTED``.
        words: the command as typed, ``HERE`` in the place of ``path``; of options only those that are paths.

    Raises:
        SourceError, ModelError, CacheError: it holds something else. StorageError: it is what ``-o`` names.
    """
    if str(path) == "-":  # what is piped in
        return
    path, kind = as_path(path), kind_of(path)
    error, expected, accepted = _WANTED[wanted]
    if kind in accepted or (wanted == "model" and os.path.lexists(path / "model.json")):
        if words[1:2] == (HERE,) and (output := _output(words)) is not None and _same(path, output):
            example = _apart(_EXAMPLES.get((str(words[0]), wanted), str(words[0])), path)
            raise StorageError(
                f"cannot write {typed(path)}: it is what is read; choose another -o, such as {typed(example)}"
            )
        return
    if wanted == "model" and kind is not Kind.MISSING and is_model(path.parent):
        raise error(f"{typed(path)} lies in a model; did you mean {_again(words, path.parent)}?")
    if swapped := _swapped(path, kind, accepted, words):
        raise error(swapped)
    if kind is Kind.MISSING and " or " in wanted and (near := missing(path, "", wanted=wanted)).endswith("?"):
        raise error(near)  # here, as what opens it knows of one of the two kinds alone
    if kind is not Kind.MISSING:
        raise error(f"{typed(path)} is {kind.value}, expected {expected}; {_advice(path, kind, wanted, words)}")


def is_wanted(kind: Kind, wanted: str) -> bool:
    """Whether a command takes a ``kind`` where it wants what ``_WANTED`` calls ``wanted``."""
    return kind in _WANTED[wanted][2]


def missing(path: AnyPath, otherwise: str, *, wanted: str | Callable[[Path], bool] = os.path.lexists) -> str:
    """What to say of a path that is not there: its unfinished work, or the nearest name beside it; without one ``otherwise``.

    wanted: a key of ``_WANTED``, or whether a path is of use: no other name is proposed.
    """
    from featcache.system.workdir import LISTING, is_work_folder, work_folder  # which take a tenth of a second

    path = as_path(path)
    name = shlex.quote(str(path))
    if os.path.lexists(path):
        return f"{name} is a link that leads nowhere, or cannot be read; {otherwise}"
    try:
        path.lstat()
    except PermissionError as error:
        return f"{name} cannot be read: {error.strerror}; {otherwise}"
    except (OSError, ValueError):
        pass
    if path.name and is_work_folder(str(parts := work_folder(path))):
        packs = f"; `featcache merge {typed(path)}` packs what several made" if (parts / LISTING).exists() else ""
        again = "the command that began it, such as extract, goes on with it when it is run again"
        return f"{name} is not finished, and its parts lie in {typed(parts)}; {again}{packs}"
    first = next((place for place in reversed(path.parents) if not os.path.lexists(place)), path)
    with contextlib.suppress(OSError, ValueError), os.scandir(first.parent) as entries:
        names = {entry.name.lower(): entry.name for entry in itertools.islice(entries, ENOUGH)}
        for near in difflib.get_close_matches(first.name.lower(), names, n=3):
            guess = first.parent / names[near] / path.relative_to(first)
            if is_wanted(kind_of(guess), wanted) if isinstance(wanted, str) else wanted(guess):
                return f"{name} does not exist; did you mean {typed(guess)}?"
    return f"{name} does not exist; {otherwise}"


def place_for(path: Path) -> str:
    """Where a hint has somebody write what was looked for on ``path``: there, unless that is among images. As typed in a shell."""
    among = str(path.parent) != "." and kind_of(path.parent) is Kind.FOLDER
    return typed(path.name if among else path)


def typed(path: object) -> str:
    """A path, or another word, as it is typed in a shell."""
    text = addresses.shown(str(path))
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _again(words: Words, word: object) -> str:
    """The command, ``word`` in the place that is in question."""
    options = ("-o", "--init", "--repair", "--images", "--backbone", "--reuse")
    shown = [str(each) if each in options else typed(word if each is HERE else each) for each in words]
    return f"`featcache {' '.join(shown)}`"


def _output(words: Words) -> Path | None:
    return as_path(str(words[words.index("-o") + 1])) if "-o" in words else None


def _same(path: Path, output: Path) -> bool:
    try:
        return path.samefile(output)
    except OSError:
        return False


def _swapped(path: Path, kind: Kind, accepted: tuple[Kind, ...], words: Words) -> str:
    """Whether another path of the command is what is wanted here: what to say then."""
    fit = (*SOURCES, Kind.IMAGE, Kind.CACHE, Kind.MODEL)
    for place, other in enumerate(words):
        if not isinstance(other, os.PathLike) or not (kind in fit or kind is Kind.MISSING):
            continue
        written = words[place - 1] == "-o"
        if (kind is Kind.MISSING) == written and kind not in accepted and (found := kind_of(other)) in accepted:
            exchanged = [other if each is HERE else path if at == place else each for at, each in enumerate(words)]
            what = "does not exist" if kind is Kind.MISSING else f"is {kind.value}"
            return f"{typed(path)} {what} and {typed(other)} is {found.value}; did you mean {_again(exchanged, other)}?"
    return ""


def _apart(name: str, *sources: object) -> str:
    """``name`` in the working folder; outside of ``sources`` if that is one of them or lies in one: no place for anything else."""
    with contextlib.suppress(OSError):  # the working folder is gone
        here = Path.cwd()
        for folder in (Path(str(source)).resolve() for source in sources):
            if folder.is_dir() and (folder == here or folder in here.parents):
                return os.path.relpath(folder.parent / name)
    return name


# ------------------------------------------------------------------------------------------------------------- advice


def _advice(path: Path, kind: Kind, wanted: str, words: Words) -> str:
    """What to do about a path of the wrong kind."""
    if kind in (Kind.ADDRESS, Kind.PLACE) or (addresses.parse(path) and wanted == "model"):
        return _download(path, words)
    if kind is Kind.PACKED or (kind is Kind.ARCHIVE and not wanted.startswith(("cache", "images", "inputs"))):
        line, into = _unpack(path)
        return f"unpack it: `{line}`" + ("" if wanted.startswith("cache") else f", then {_again(words, into)}")
    if kind is Kind.WORK:
        return "the command that began it goes on with it when it is run again"
    to = {"model": _to_model, "cache": _to_cache, "cache or model": _to_cache, "vectors": _to_vectors}.get(
        wanted, _to_images
    )
    return to(path, kind, words)


def _to_images(path: Path, kind: Kind, words: Words) -> str:
    given, source = typed(path), _again(words, "SOURCE").rstrip("`")
    option = {"extract": "--backbone", "finetune": "--init"}
    match str(words[0]), kind:
        case "extract", Kind.CACHE:
            return f"did you mean `featcache fit-head {given} -o {typed(_apart('model'))}`?"
        case "finetune", Kind.CACHE:
            return f"fine-tuning takes the images themselves; did you mean `featcache fit-head {given} -o {typed(_output(words))}`?"
        case "extract" | "finetune" as command, Kind.MODEL:
            return f"did you mean {source} {option[command]} {given}`?"
        case "extract" | "finetune", Kind.WEIGHTS:
            return f"did you mean {source} --backbone NAME --weights {given}`?"
        case "evaluate", Kind.IMAGE:
            return f"did you mean `featcache predict {typed(words[1])} {given}`?"
        case _, Kind.CACHE:
            return "give the images that it was made from"
        case _, Kind.MODEL | Kind.WEIGHTS:
            return f"did you mean {source}`?"
        case _, Kind.IMAGE:
            return f"single images are for predict: `featcache predict MODEL {given}`"
        case _, Kind.SHEET:
            return f"save it as CSV, then {_again(words, path.with_suffix('.csv'))}"
        case _, Kind.VIDEO:
            frames = f"`mkdir frames && ffmpeg -i {given} -r 1 frames/%06d.jpg`"
            return f"take frames out of it: {frames}, then {_again(words, 'frames')}"
        case _, Kind.DOCUMENT:
            return "save its pages or pictures as PNG or JPEG files"
        case _, Kind.EXPORT:
            return _EXPORTED
    return "give the name of a folder or file"


def _to_model(path: Path, kind: Kind, words: Words) -> str:
    given, model, again = typed(path), typed(_apart("model", path)), _again(words, _apart("model", path))
    if kind in FOLDERS and (inside := sorted(filter(is_model, path.glob("*/")))):
        return f"there is one in it: {_again(words, inside[0])}"
    if kind is Kind.CACHE:
        return f"train one on it: `featcache fit-head {given} -o {model}`, then {again}"
    if kind in (Kind.FOLDER, Kind.TABLE, Kind.PARQUET):
        cache = typed(_apart("features.h5", path))
        return (
            f"make one: `featcache extract {given} -o {cache}`, `featcache fit-head {cache} -o {model}`, then {again}"
        )
    if kind is Kind.EXPORT:
        return f"{_EXPORTED}; give the folder that it was exported from"
    if kind is Kind.WEIGHTS:
        return (
            f"make one: `featcache extract SOURCE -o features.h5 --backbone NAME --weights {given}`, "
            f"`featcache fit-head features.h5 -o {model}`, then {again}"
        )
    return f"`featcache fit-head features.h5 -o {model}` makes one"


def _to_cache(path: Path, kind: Kind, words: Words) -> str:
    given, command, output = typed(path), str(words[0]), _output(words)
    if kind is Kind.MODEL and command == "fit-head":
        return f"it is trained already; did you mean `featcache finetune SOURCE -o {typed(output)} --init {given}`?"
    if kind is Kind.MODEL:
        return f"did you mean `featcache info {given}`?"
    if kind is Kind.EXPORT:
        return _EXPORTED
    if kind is Kind.WEIGHTS:
        return f"`featcache extract SOURCE -o features.h5 --backbone NAME --weights {given}` makes one with it"
    if kind in FOLDERS and (inside := sorted(found for found in path.glob("*.h5") if kind_of(found) is Kind.CACHE)):
        return f"there is one in it: {_again(words, inside[0])}"
    if kind is Kind.ARRAYS:
        return f"of vectors in it one is made by `featcache import {given} -o {typed(_apart('features.h5', path))}`"
    if kind is Kind.PARQUET and command not in ("fit-head", "finetune"):
        made = typed(_apart("features.h5", path))
        return f"of images in it `featcache extract {given} -o {made}` makes one, of vectors `featcache import {given} -o {made}`"
    if kind not in (Kind.FOLDER, Kind.TABLE, Kind.ARCHIVE, Kind.PARQUET):
        return "`featcache extract SOURCE -o features.h5` makes one"
    if command == "fit-head" and output is not None and output.suffix.lower() in CACHE_SUFFIXES:
        return f"did you mean `featcache extract {given} -o {typed(output)}`?"
    cache = _apart("features.h5", path)
    then = f", then {_again(words, cache)}" if command == "fit-head" else ""
    return f"make one: `featcache extract {given} -o {typed(cache)}`{then}"


def _to_vectors(path: Path, kind: Kind, words: Words) -> str:
    if kind in (Kind.FOLDER, Kind.TABLE):
        return f"of images one is made by `featcache extract {typed(path)} -o {typed(_output(words))}`"
    return "it is one already" if kind is Kind.CACHE else "numpy.savez('vectors.npz', vector=X, path=names) makes one"


def _unpack(path: Path) -> tuple[str, str]:
    """Of an archive, by its name: the line that unpacks it, and what it is then."""
    name, given, into = path.name.lower(), typed(path), _apart(re.sub(r"(\.tar)?\.\w+$", "", path.name))
    into += "-unpacked" if os.path.lexists(into) else ""
    tools = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
    if path.suffix.lower() in tools and ".tar." not in name:
        return f"{tools[path.suffix.lower()]} -k {given}", str(path.with_suffix(""))
    if name.endswith(".7z"):
        return f"7z x {given} -o{typed(into)}", into
    if name.endswith(".rar"):
        return f"unrar x {given} {typed(into)}/", into
    if ".tar" in name or name.endswith((".tgz", ".tbz", ".txz")):
        return f"mkdir {typed(into)} && tar -xf {given} -C {typed(into)}", into
    return f"unzip {given} -d {typed(into)}", into


def _download(path: Path, words: Words) -> str:
    """For an address, by its scheme."""
    scheme, rest = addresses.parse(path).groups()  # type: ignore[union-attr]
    if scheme.lower() == "file":
        return f"did you mean {_again(words, urllib.parse.unquote('/' + rest))}?"
    line, target = fetch_line(path)
    if not line:
        return "save what is there as files first, and give their folder"
    if kind_by_name(target) is not Kind.PACKED:
        return f"download it: `{line}`, then {_again(words, target)}"
    unpack, into = _unpack(Path(target))
    return f"download it: `{line}`, unpack it: `{unpack}`, then {_again(words, into)}"


def fetch_line(path: Path) -> tuple[str, str]:
    """Of an address, by its scheme: the line that fetches what is there, empty if none would, and what it is called then."""
    scheme, rest = addresses.parse(path).groups()  # type: ignore[union-attr]
    address, name = typed(path), urllib.parse.unquote(Path(rest.split("?")[0]).name)
    repository = rest.removeprefix("datasets/").split("/")[:2]
    is_file, target = kind_by_name(name) is not Kind.FILE, _apart(name)
    line = {
        "s3": f"aws s3 {'cp' if is_file else 'sync'} {address} {typed(target)}",
        "hf": f"hf download {typed('/'.join(repository))} --repo-type dataset --local-dir {typed(target)}",
        **dict.fromkeys(("gs", "gcs"), f"gcloud storage {'cp' if is_file else 'rsync -r'} {address} {typed(target)}"),
    }.get(scheme.lower(), f"curl -L -o {typed(target)} {address}" if is_file else "")
    return line, target
