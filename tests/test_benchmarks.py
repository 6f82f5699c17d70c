"""Of the tutorials: both sides get the same images, each in one split. Of training on a CPU: what its ceiling is made of."""

from pathlib import Path

import pytest
import torch
from conftest import write_photo
from torchvision.models import VisionTransformer

from featcache.finetuning.recipes import choose_recipe

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "tutorials.py"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two data sets with splits and classes as the script expects them, the same file names in all of them."""
    for root, classes, splits in (
        ("insects", ("ants", "bees"), ("train", "val")),
        ("pets", ("cat", "dog"), ("train", "test")),
    ):
        for split in splits:
            for number, name in enumerate(classes):
                for seed in range(6):
                    colour = (200 * number, 80, 200 - 200 * number)
                    write_photo(tmp_path / root / split / name / f"{seed}.jpg", colour, seed)
    (tmp_path / "insects" / "train" / "ants" / "not_found.gif").write_bytes(b"GIF89a")
    return tmp_path / "insects", tmp_path / "pets"


PETS, INSECTS = {"cat", "dog"}, {"ants", "bees"}
WORKFLOWS = {
    "T1": ({"train": 12, "val": 12}, INSECTS),
    "T2": ({"train": 12, "test": 12}, PETS),
    "T3": ({"train": 44, "val": 4}, INSECTS | PETS),
    "T4": ({"train": 24, "valid": 12, "test": 12}, INSECTS | PETS),
    "T5": ({"train": 12, "val": 12}, PETS),
}


TUTORIALS = {
    ("T1", "frozen"): "ants-bees-frozen",
    ("T1", "finetune"): "ants-bees",
    ("T2", "frozen"): "cats-dogs",
    ("T3", "frozen"): "flowers-frozen",
    ("T3", "finetune"): "flowers",
    ("T4", "frozen"): "caltech101",
    ("T5", "frozen"): "ants-bees-frozen",
    ("T5", "finetune"): "ants-bees",
}


def test_loops_and_recipes_repeat_the_same_tutorials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import tutorials

    assert tutorials.LOOPS.keys() == TUTORIALS.keys()
    for stage, name in TUTORIALS.items():
        loop, recipe = tutorials.LOOPS[stage], choose_recipe(name, 10_000)
        same = {"hidden", "dropout", "lr", "optimizer", "epochs", "patience"}
        assert {field: getattr(loop, field) for field in same} == {field: getattr(recipe, field) for field in same}
        assert (loop.batch, loop.every, loop.whole) == (
            recipe.batch_size,
            recipe.accumulation,
            recipe.unfreeze == "all",
        )
        assert loop.step_lr == (recipe.schedule == "step")


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_splits(workflow: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, classes = WORKFLOWS[workflow]
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import tutorials

    layouts = []
    for name in ("one", "two"):
        assert tutorials.copy_images(workflow, *folders, None, tmp_path / name) == counts
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        assert len(files) == sum(counts.values())  # nothing overwritten
        layouts.append([path.relative_to(tmp_path / name) for path in files])
    assert layouts[0] == layouts[1]
    assert not [path for path in layouts[0] if path.suffix == ".gif"]
    assert {path.parts[1] for path in layouts[0]} == classes
    if workflow in ("T3", "T4"):
        assert len({path.parts[1:] for path in layouts[0]}) == len(layouts[0])  # no image in two splits


def test_the_ceiling_of_training_counts_every_product_with_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's own, which no linear layer is asked for, and those of a layer that pads by itself."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from finetune_cpu import products
    from timm.layers import Conv2dSame

    sizes = {"image_size": 32, "patch_size": 16, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12}
    vit = VisionTransformer(num_layers=2, num_classes=5, **sizes).eval()
    block = [(24, 8), (8, 8), (12, 8), (8, 12)]  # queries, keys and values; output; both layers of the MLP
    pads = torch.nn.Sequential(Conv2dSame(3, 4, 3, stride=2), torch.nn.Conv2d(4, 6, 1, bias=False))
    for model, shapes in ((vit, [(8, 3, 16, 16), *block, *block, (5, 8)]), (pads, [(4, 3, 3, 3), (6, 4, 1, 1)])):
        found = products(model, torch.rand(2, 3, 32, 32), torch.float32)
        assert [tuple(weight.shape) for _, weight, _, _ in found] == shapes
        for layer, _, x, g in found:
            assert layer(x).shape == g.shape
        asked = [(weight.requires_grad, x.requires_grad) for _, weight, x, _ in found]
        assert asked == [(True, False), *[(True, True)] * (len(found) - 1)]
    pads[0].requires_grad_(False)  # type: ignore[operator] # what stays as it is, and what lies below, needs no gradient
    found = products(pads, torch.rand(2, 3, 32, 32), torch.float32)
    assert [(weight.requires_grad, x.requires_grad) for _, weight, x, _ in found] == [(False, False), (True, False)]
