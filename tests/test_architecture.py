"""The plan of the code, held: who may import what, and where output may come from."""

import ast
from pathlib import Path

import pytest

import featcache

PACKAGE = Path(featcache.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent == PACKAGE)
ONLY_IN = {
    "h5py": {"cache.cache", "reports.info"},  # inspection: its version number
    "typer": {"cli.app", "cli.inspect", "cli.options"},
    "rich": {"cli.console"},
    "sklearn": {"heads.logreg", "heads.minibatch", "cli.demo"},
    "joblib": {"heads.logreg", "models.model"},
    "timm": {"backbones.load"},
    "torchvision": {"backbones.load", "finetuning.augment"},
    "filelock": {"extraction.parts"},
    "simplejpeg": {"images.decode"},
    "matplotlib": {"reports.curves"},
    "onnx": {"models.export"},
    "onnxruntime": {"models.export"},
    "onnxscript": {"models.export"},
}
LAYERS = [
    {
        "errors",
        "backbones.self_check",
        "system.supervisor",
        "cache.sparse_file",
        "cache.hdf5_reader",
        "system.safe_load",
        "system.signals",
        "backbones.folding",
        "heads.logreg_path",
        "images.jpeg",
    },
    {
        "system.files",
        "images.integrity",
        "images.preprocess",
        "system.device",
        "heads.metrics",
        "finetuning.recipes",
        "cache.features",
        "cache.checksums",
    },
    {"spec", "reports.curves", "finetuning.augment", "system.distributed"},
    {"backbones.load", "cache.cache", "heads.head", "finetuning.checkpoint"},
    {"images.source", "models.model", "finetuning.network", "finetuning.compare"},
    {"images.decode"},
    {
        "backbones.encoder",
        "heads.logreg",
        "heads.minibatch",
        "extraction.match",
        "extraction.request",
        "finetuning.pixels",
    },
    {"backbones.embed", "extraction.plan", "finetuning.trainer"},
    {"extraction.parts", "backbones.embedder"},
    {"extraction.extract", "finetuning.save", "extraction.restore"},
    {"extraction.repair"},
    {"models.fit", "models.predict", "reports.info", "reports.doctor", "cli.demo", "models.export"},
    {"finetuning.start"},
    {"finetuning.finetune"},
    {"reports.predictions_table", "cli.console", "cli.options"},
    {"cli.inspect"},
    {"cli.app"},
    {"__init__", "__main__"},
]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name.replace('.', '/')}.py").exists()


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


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module(path: Path) -> None:
    used = imports(path)
    for library, homes in ONLY_IN.items():
        if name_of(path) not in homes:
            assert library not in {name.split(".")[0] for name in used}, f"{library} belongs to {homes}"
    assert not any(name.startswith("torch.distributed") for name in used) or name_of(path) == "system.distributed"
    assert len(path.read_text().splitlines()) <= 500
    tree = ast.parse(path.read_text())
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if name_of(path) != "system.safe_load":  # unpickling, safe or not, happens in one place
        assert not [
            call for call in calls if ast.unparse(call) in ("torch.load", "pickle.load", "joblib.load", "np.load")
        ]
    if name_of(path) not in ("cli.app", "cli.inspect", "cli.console"):
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
        assert not [call for call in calls if isinstance(call, ast.Attribute) and ast.unparse(call) == "sys.exit"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_data_flows_one_way(path: Path) -> None:
    level = next((number for number, names in enumerate(LAYERS) if name_of(path) in names), None)
    assert level is not None, f"{name_of(path)} has no layer"
    for name in imports(path):
        if name.startswith("featcache.") and is_module(module := name.removeprefix("featcache.")):
            other = next(number for number, names in enumerate(LAYERS) if module in names)
            assert other < level, f"{name_of(path)} imports {module}, which is not below it"


LIGHT = (
    "spec",
    "images.source",
    "cache.cache",
    "extraction.match",
    "extraction.plan",
    "extraction.request",
    "extraction.extract",
    "extraction.parts",
    "backbones.embedder",
    "extraction.restore",
    "extraction.repair",
    "models.model",
    "models.fit",
    "models.predict",
)


@pytest.mark.parametrize("name", LIGHT)
def test_torch_is_imported_late(name: str) -> None:
    """What works on caches and folders starts without torch, which takes seconds to import."""
    todo, seen = [name], set()
    while todo:
        module = todo.pop()
        seen.add(module)
        used = imports(PACKAGE / f"{module.replace('.', '/')}.py", top_level=True)
        assert not {"torch", "torchvision", "timm"} & {entry.split(".")[0] for entry in used}, module
        below = {entry.removeprefix("featcache.") for entry in used if entry.startswith("featcache.")}
        todo += [entry for entry in below - seen if is_module(entry)]
