"""The plan of the code, held: who may import what, and where output may come from."""

import ast
from pathlib import Path

import pytest

import featcache

PACKAGE = Path(featcache.__file__).parent
MODULES = sorted(PACKAGE.glob("*.py"))
ONLY_IN = {
    "h5py": {"cache", "inspection"},  # inspection: its version number
    "typer": {"cli", "cli_inspect", "options"},
    "rich": {"display"},
    "sklearn": {"logreg", "torchheads", "demo"},
    "joblib": {"logreg", "model"},
    "timm": {"backbones"},
    "torchvision": {"backbones", "augmentation"},
    "filelock": {"parts"},
    "simplejpeg": {"decoders"},
    "matplotlib": {"plots"},
    "onnx": {"exporting"},
    "onnxruntime": {"exporting"},
    "onnxscript": {"exporting"},
}
LAYERS = [
    {
        "errors",
        "self_check",
        "crashes",
        "sparsefile",
        "untrusted",
        "tensorfiles",
        "signals",
        "fusion",
        "multinomial",
        "jpegs",
    },
    {"publish", "completeness", "preprocess", "runtime", "metrics", "recipes", "reading", "checksums"},
    {"spec", "plots", "augmentation", "processes"},
    {"backbones", "cache", "heads", "checkpoint"},
    {"images", "model", "network", "comparison"},
    {"decoders"},
    {"encoder", "logreg", "torchheads", "recognition", "request", "pixels"},
    {"embedding", "planning", "trainer"},
    {"parts", "preparing"},
    {"extraction", "finetuned", "restoring"},
    {"repairing"},
    {"training", "prediction", "inspection", "measuring", "demo", "exporting"},
    {"starting"},
    {"finetuning"},
    {"tables", "display", "options"},
    {"cli_inspect"},
    {"cli"},
    {"__init__", "__main__"},
]


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules that a file imports; type-checking blocks do not count."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module(path: Path) -> None:
    used = imports(path)
    for library, homes in ONLY_IN.items():
        if path.stem not in homes:
            assert library not in {name.split(".")[0] for name in used}, f"{library} belongs to {homes}"
    assert not any(name.startswith("torch.distributed") for name in used) or path.stem == "processes"
    assert len(path.read_text().splitlines()) <= 500
    tree = ast.parse(path.read_text())
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if path.stem != "tensorfiles":  # unpickling, safe or not, happens in one place
        assert not [
            call for call in calls if ast.unparse(call) in ("torch.load", "pickle.load", "joblib.load", "np.load")
        ]
    if path.stem not in ("cli", "cli_inspect", "display"):
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
        assert not [call for call in calls if isinstance(call, ast.Attribute) and ast.unparse(call) == "sys.exit"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_data_flows_one_way(path: Path) -> None:
    level = next((number for number, names in enumerate(LAYERS) if path.stem in names), None)
    assert level is not None, f"{path.stem} has no layer"
    for name in imports(path):
        module = name.removeprefix("featcache.").split(".")[0]
        if name.startswith("featcache.") and (PACKAGE / f"{module}.py").exists():
            other = next(number for number, names in enumerate(LAYERS) if module in names)
            assert other < level, f"{path.stem} imports {module}, which is not below it"


LIGHT = (
    "spec",
    "images",
    "cache",
    "recognition",
    "planning",
    "request",
    "extraction",
    "parts",
    "preparing",
    "restoring",
    "repairing",
    "model",
    "training",
    "prediction",
)


@pytest.mark.parametrize("name", LIGHT)
def test_torch_is_imported_late(name: str) -> None:
    """What works on caches and folders starts without torch, which takes seconds to import."""
    todo, seen = [name], set()
    while todo:
        module = todo.pop()
        seen.add(module)
        used = imports(PACKAGE / f"{module}.py", top_level=True)
        assert not {"torch", "torchvision", "timm"} & {entry.split(".")[0] for entry in used}, module
        below = {entry.split(".")[1] for entry in used if entry.startswith("featcache.")}
        todo += [entry for entry in below - seen if (PACKAGE / f"{entry}.py").exists()]
