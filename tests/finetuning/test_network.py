"""Backbone and head as one network: the same logits as the cached head, the right parts frozen, for every family."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from featcache.backbones.backbone import Backbone, save_weights
from featcache.backbones.encoder import Encoder
from featcache.backbones.load import load_backbone
from featcache.errors import ModelError
from featcache.finetuning import network as networks
from featcache.finetuning.logits import compute_logits
from featcache.finetuning.pixels import Pixels
from featcache.finetuning.recipes import Job, Recipe, choose_recipe
from featcache.finetuning.trainer import Trainer
from featcache.heads.head import SCALINGS, Head, scale_features, softmax
from featcache.system.device import Runtime
from featcache.system.distributed import Processes

RANDOM = np.random.default_rng(0)
# One of each of torchvision's families, the smallest (of AlexNet and VGG the lighter: half a gigabyte of random weights shows
# no more); and the smallest input it takes, where that is not 32.
FAMILIES = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vit_b_32"""
USUAL = (
    "alexnet",
    "densenet121",
    "mobilenet_v3_small",
    "resnet18",
    "swin_t",
    "vit_b_32",
)  # each with something of its own
EDGES = {"alexnet": 64, "inception_v3": 75, "maxvit_t": 224, "swin_v2_t": 64, "vit_b_32": 224}


def make_head(dim: int, scaling: Any, hidden: int = 0, classes: int = 3) -> Head:
    sizes = [dim, *([hidden] if hidden else []), classes]
    layers = tuple((RANDOM.normal(0, 1, (b, a)), RANDOM.normal(0, 1, b)) for a, b in itertools.pairwise(sizes))
    mean, scale = RANDOM.normal(0, 1, dim), RANDOM.uniform(0.5, 2, dim)
    return Head("mlp" if hidden else "logreg", scaling, mean, scale, layers)


def make_pixels(n: int, edge: int) -> Pixels:
    random = np.random.default_rng([n, edge])  # the same whatever ran before
    pictures = list(random.integers(0, 256, (n, edge, edge, 3), dtype=np.uint8))
    return Pixels(np.arange(n), {}, pictures, np.arange(n) % 3, (), "", np.zeros((n, 32), np.uint8))


def shrunk(backbone: Backbone, edge: int) -> Backbone:
    preprocess = dataclasses.replace(backbone.preprocess, resize=edge, crop=(edge, edge))
    return dataclasses.replace(backbone, preprocess=preprocess)


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return shrunk(load_backbone("squeezenet1_1", "none"), 32)


CPU = Runtime(torch.device("cpu"), 1, 3, "")
JOB = Job(None, Path(), "", None, seed=0, precision="fp32", runtime=CPU, processes=Processes())  # type: ignore[arg-type]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("hidden", [0, 7])
def test_the_assembled_network_computes_the_cached_head(tiny: Backbone, scaling: Any, hidden: int) -> None:
    head = make_head(tiny.dim, scaling, hidden)
    pixels = np.stack(make_pixels(5, 32).pictures)
    features = Encoder(tiny.module, tiny.preprocess, CPU.device, torch.float32)(pixels)
    network = networks.assemble(tiny, head, features).eval()
    seen = network.head[0](torch.from_numpy(features)).norm(dim=1)  # what the first layer sees: one length for all
    assert float((seen**2).mean()) == pytest.approx(1024, rel=1e-5)
    with torch.inference_mode():
        logits = network(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(logits, head.logits(features.astype(np.float64)), rtol=1e-4, atol=1e-4)
    again = networks.to_head(network)
    np.testing.assert_allclose(again.logits(features), logits, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, nn.Linear) for module in network.head) == 1 + bool(hidden)  # the scaler is folded in


def test_mixing_is_exact_at_its_ends_and_linear_between() -> None:
    start, tuned = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    for module, weight, counter in ((start, [0.0, 1.0], 3), (tuned, [1.0, 3.0], 5)):
        module.weight.data = torch.tensor(weight)
        module.num_batches_tracked.fill_(counter)
    for alpha, weight, counter in ((0, [0.0, 1.0], 3), (0.25, [0.25, 1.5], 5), (1, [1.0, 3.0], 5)):
        mixed = networks.interpolate(start, tuned, alpha=alpha)
        assert (mixed.weight.tolist(), mixed.num_batches_tracked) == (weight, counter)


def test_parity_tells_rounding_from_mistakes() -> None:
    head = make_head(20, "standardise")
    X = RANDOM.normal(0, 1, (30, 20))
    logits = head.logits(X)
    rounded = head.logits(X.astype(np.float16).astype(float))
    assert networks.check_parity(logits.astype(np.float32), rounded, tolerance=0.01) < 0.002
    assert networks.check_parity(logits + 5, logits, tolerance=1e-9) < 1e-9  # softmax does not see a constant
    weight, bias = head.layers[0]
    mistakes = {
        "scaling forgotten": Head("logreg", "none", head.mean, head.scale, head.layers).logits(X),
        "another row": np.roll(logits, 1, axis=0),
        "classes swapped": logits[:, ::-1],
        "bias forgotten": Head("logreg", "standardise", head.mean, head.scale, ((weight, bias * 0),)).logits(X),
        "not a number": logits * np.nan,
    }
    for wrong in mistakes.values():
        with pytest.raises(ModelError, match="does not compute what the cached head computes"):
            networks.check_parity(wrong, logits, tolerance=0.01)


def fitted_head(scaling: Any, X: np.ndarray) -> Head:
    """A random head of three classes on (n, D) features, its logits of about unit size whatever the size of X."""
    X = X.astype(np.float64)
    mean, scale = X.mean(axis=0), X.std(axis=0)
    scale[scale == 0] = 1
    seen = scale_features(X, scaling, mean, scale)
    weight, bias = np.random.default_rng(1).normal(0, 1, (3, X.shape[1])), np.zeros(3)
    weight[:, X.std(axis=0) == 0] = (
        0  # as a fit leaves it, whose scale of such a value is 1, however large embeddings are
    )
    logits = seen @ weight.T
    return Head("logreg", scaling, mean, scale, ((weight / logits.std(), bias - logits.mean(axis=0) / logits.std()),))


DROPPING = ("alexnet", "swin_t", "efficientnet_b0")  # they drop values or paths in their own training


# maxvit_t takes 10 s, and drops paths as swin_v2_t does.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in DROPPING else pytest.mark.slow)
        for name in FAMILIES.split()
        if name != "maxvit_t"
    ],
)
@pytest.mark.usefixtures("small_vits")
def test_the_first_step_starts_from_the_cached_heads_loss(name: str) -> None:
    """Measured by the step itself: the loss that it reports, of images as they are, against what the head makes of them."""
    edge = EDGES.get(name, 32)
    backbone, data = shrunk(load_backbone(name, "none"), edge), make_pixels(6, edge)
    X = Encoder(backbone.module, backbone.preprocess, CPU.device, torch.float32)(np.stack(data.pictures))
    head = fitted_head("standardise", X)
    expected = -np.log(head.probabilities(X.astype(np.float64))[np.arange(6), data.labels]).mean()
    recipe = choose_recipe(
        "default", 6, augmentation=(), label_smoothing=0.0, optimizer="sgd", ema=0.0
    )  # little memory
    trainer = Trainer(networks.assemble(backbone, head, X), data, recipe=recipe, job=JOB)
    before = -np.log(softmax(trainer.logits_in_training(data, np.arange(6)))[np.arange(6), data.labels]).mean()
    loss, _ = trainer.run_epoch()
    assert 0.1 < expected < 10
    assert (before, loss) == (pytest.approx(expected, abs=1e-3), pytest.approx(expected, abs=1e-3))


class Scaled(nn.Module):
    """A backbone whose embeddings are of another size."""

    def __init__(self, module: nn.Module, size: float) -> None:
        super().__init__()
        self.module, self.size = module, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) * self.size


@pytest.mark.parametrize("scaling", SCALINGS)
def test_training_does_not_depend_on_the_size_of_embeddings(tiny: Backbone, scaling: Any) -> None:
    """The same head on embeddings 1/128 to 128 times as large, which is exact in floating point, learns the same."""
    data, losses = make_pixels(9, 32), {}
    X = Encoder(tiny.module, tiny.preprocess, CPU.device, torch.float32)(np.stack(data.pictures))
    recipe = choose_recipe("default", 9, batch_size=3, epochs=4, augmentation=(), lr=1e-3, backbone_lr=1e-6)
    for size in (1.0, 1 / 128, 128.0):
        backbone = dataclasses.replace(tiny, module=Scaled(tiny.module, size))
        trainer = Trainer(
            networks.assemble(backbone, fitted_head(scaling, X * size), X * size), data, recipe=recipe, job=JOB
        )
        losses[size] = [trainer.run_epoch()[0] for _ in range(4)]
    assert losses[1.0][3] < 0.95 * losses[1.0][0]
    assert losses[1 / 128] == pytest.approx(losses[1.0], rel=1e-5)
    assert losses[128.0] == pytest.approx(losses[1.0], rel=1e-5)


def test_a_step_of_the_head_is_as_long_whatever_stays_zero_and_however_many_values_there_are(tiny: Backbone) -> None:
    """Dead values, as AlexNet with random weights has, change nothing; no values at all are left as they are."""
    X = RANDOM.normal(0, 0.009, (40, 300))
    dead = np.hstack([X, np.zeros((40, 700))])
    factors = [float(networks.assemble(tiny, fitted_head("none", x), x).head[0].factor) for x in (X, dead)]
    assert factors == pytest.approx([32 / (0.009 * np.sqrt(300))] * 2, rel=0.05)
    assert networks.assemble(tiny, make_head(5, "unit"), np.zeros((3, 5))).head[0].factor == 1


def test_weights_of_five_dimensions_are_taken(tiny: Backbone) -> None:
    """As lambda layers' have: the layout of images is not for them."""

    class Deep(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.deep = module, nn.Conv3d(1, 1, (3, 3, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x) + self.deep(x[:, None]).mean()

    recipe = Recipe(about="", hidden=())
    network = networks.with_new_head(dataclasses.replace(tiny, module=Deep(tiny.module)), recipe, 3, seed=0)
    layouts = {p.ndim: p.is_contiguous(memory_format=torch.channels_last) for p in network.parameters() if p.ndim == 4}
    assert layouts == {4: True}
    assert network(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 3)


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES.split()]
)
@pytest.mark.usefixtures("small_vits")
def test_every_family_trains_a_step_and_predicts(name: str, tmp_path: Path) -> None:
    edge = EDGES.get(name, 32)
    backbone = shrunk(load_backbone(name, "none"), edge)
    lr = 1e4 if name == "efficientnet_b0" else 0.1  # its random weights give embeddings of about 1e-10
    recipe = Recipe(about="", hidden=(), unfreeze="last-stage", optimizer="sgd", lr=lr, backbone_lr=lr, batch_size=4)
    network = networks.with_new_head(backbone, recipe, 3, seed=0)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    data = make_pixels(4, edge)
    loss, _ = Trainer(network, data, recipe=recipe, job=JOB).run_epoch()
    assert 0 < loss < 1e4
    last = {id(parameter) for parameter in networks.stages(network.backbone)[-1]}
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    trained = {key for key, parameter in network.named_parameters() if id(parameter) in last or key.startswith("head.")}
    frozen = {key for key, _ in network.named_parameters()} - trained
    assert frozen
    assert {"head.0.weight", "head.0.bias"} <= changed <= trained  # and so no statistic of a batch norm, either
    assert len(changed) > 2  # the stage, too
    tuned = networks.to_backbone(network, backbone, "a test")
    save_weights(tuned, tmp_path / "b.safetensors")
    loaded = load_backbone(name, tmp_path / "b.safetensors")
    assert loaded.weights_sha256 == tuned.weights_sha256 != backbone.weights_sha256
    logits = compute_logits(network, data.pictures, job=JOB)
    encoder = Encoder(loaded.module, backbone.preprocess, CPU.device, torch.float32)
    predicted = networks.to_head(network).logits(encoder(np.stack(data.pictures)))
    np.testing.assert_allclose(logits, predicted, rtol=1e-3, atol=1e-3 * np.abs(predicted).max())
    networks.take_weights(network, before)  # as those of the best epoch are
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


FIRST_BIASES = {  # of a network that can be traced, and of one that cannot
    "timm/levit_128s": "stages.0.blocks.0.attn.attention_biases",
    "timm/tiny_vit_5m_224": "stages.1.blocks.0.attn.attention_biases",
}


@pytest.mark.parametrize("name", FIRST_BIASES)
def test_what_a_backbone_remembers_in_prediction_trains(name: str) -> None:
    """Attention's biases: kept from one prediction to the next, they must follow their weights, and these must have gradients."""
    recipe = Recipe(about="", hidden=(), optimizer="sgd", lr=0.1, backbone_lr=0.1, batch_size=4, augmentation=())
    backbone = load_backbone(name, "none")
    for norm in (m for m in backbone.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.weight.data.fill_(0.5)  # LeViT's start at zero: nothing before them has a gradient
    network = networks.with_new_head(backbone, recipe, 3, seed=0)
    biases = {key: value for key, value in network.named_parameters() if key.endswith("attention_biases")}
    before = {key: value.detach().clone() for key, value in biases.items()}
    data = make_pixels(4, 224)
    compute_logits(network, data.pictures, job=JOB)  # as before the first step
    trainer = Trainer(network, data, recipe=recipe, job=JOB)  # two parts a step
    for _ in range(2):
        trainer.run_epoch()
    assert {key for key, value in biases.items() if value.grad is not None} == biases.keys() != set()
    assert not torch.equal(
        *(values["backbone." + FIRST_BIASES[name]] for values in (biases, before))
    )  # the last ones' vanish
    fresh = networks.with_new_head(backbone, recipe, 3, seed=0)
    networks.take_weights(fresh, network.state_dict())
    np.testing.assert_array_equal(
        *(compute_logits(each, data.pictures, job=JOB) for each in (network, fresh)),
    )


@pytest.mark.parametrize(
    ("name", "first_of_last"),
    [
        ("resnet18", "layer4.0.conv1.weight"),
        ("mobilenet_v2", "features.18.0.weight"),
        ("densenet121", "features.denseblock4.denselayer1.norm1.weight"),
        ("shufflenet_v2_x0_5", "conv5.0.weight"),
    ],
)
def test_stages_are_the_architectures_own(name: str, first_of_last: str) -> None:
    module = load_backbone(name, "none").module
    parts = networks.stages(module)
    names = {id(parameter): key for key, parameter in module.named_parameters()}
    assert [names[id(parameter)] for part in parts for parameter in part] == list(names.values())
    assert names[id(parts[-1][0])] == first_of_last
    assert len(parts) >= 4
    network = networks.with_new_head(load_backbone(name, "none"), Recipe(about="", hidden=()), 2, seed=0)
    # These networks use their parts in the order in which they register them.
    assert list(network.used) == list(names.values())
    ordered = networks.stages(network.backbone, network.used)
    assert [list(map(id, part)) for part in ordered] == [
        list(map(id, part)) for part in networks.stages(network.backbone)
    ]


class Late(nn.Module):
    """A projection that is registered first and used last, as OpenCLIP's, and a table that no embedding depends on."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.ones(512, 8))
        self.unread = nn.Parameter(torch.ones(2, 2))
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) @ self.projection


def test_what_is_used_last_is_in_the_last_stage_wherever_it_is_registered(tiny: Backbone) -> None:
    backbone = dataclasses.replace(tiny, module=Late(tiny.module), dim=8)
    recipe = choose_recipe("default", 500, hidden=(), unfreeze="most")
    network = networks.with_new_head(backbone, recipe, 2, seed=0)
    names = {id(parameter): key for key, parameter in network.backbone.named_parameters()}
    assert list(network.used) == [key for key in names.values() if key.startswith("body.")] + ["projection"]
    parts = networks.stages(network.backbone, network.used)
    assert names[id(parts[0][0])].startswith("body.") and "projection" in {names[id(p)] for p in parts[-1]}
    networks.unfreeze(network, recipe, epoch=0)
    parameters = dict(network.backbone.named_parameters())
    assert parameters["projection"].requires_grad
    assert not parameters["unread"].requires_grad
    assert not parameters[next(iter(network.used))].requires_grad  # the first convolution


def test_what_trains_follows_the_recipe(tiny: Backbone) -> None:
    def trained(unfreezing: Any, epoch: int) -> int:
        recipe = Recipe(about="", hidden=(), unfreeze=unfreezing, epochs=10)
        network = networks.with_new_head(tiny, recipe, 3, seed=0)
        networks.unfreeze(network, recipe, epoch=epoch)
        assert all(parameter.requires_grad for parameter in network.head.parameters())
        return sum(all(parameter.requires_grad for parameter in part) for part in networks.stages(network.backbone))

    n = len(networks.stages(tiny.module))
    assert [trained(what, 0) for what in ("head", "last-stage", "all")] == [0, 1, n]
    opened = [trained("gradual", epoch) for epoch in range(10)]
    assert opened[0] == 0
    assert opened == sorted(opened)
    assert opened[5:] == [n] * 5
    without_first = trained("most", 0)
    assert 0 < without_first < n
    half = trained("half", 0)
    assert 0 < half < without_first
    # A third of the epochs each, the longer ones first.
    assert [trained("freezeout", epoch) for epoch in range(10)] == [n] * 4 + [without_first] * 3 + [half] * 3


@pytest.mark.parametrize(
    ("name", "of_most", "of_half"),
    [
        ("resnet18", "layer2.0.conv1.weight", "layer4.0.conv1.weight"),
        ("resnet50", "layer2.0.conv1.weight", "layer4.0.conv1.weight"),
        ("squeezenet1_1", "features.4.squeeze.weight", "features.11.squeeze.weight"),
        ("mobilenet_v2", "features.6.conv.0.0.weight", "features.16.conv.0.0.weight"),
        ("efficientnet_b0", "features.4.0.block.0.0.weight", "features.6.0.block.0.0.weight"),
        ("convnext_tiny", "features.2.0.weight", "features.6.0.weight"),
        # Its patches' projection is 2.8 % of it.
        ("vit_b_32", "class_token", "encoder.layers.encoder_layer_5.ln_1.weight"),
    ],
)
@pytest.mark.parametrize(("what", "share"), [("most", 0.02), ("half", 0.5)])
def test_what_is_left_are_first_stages_of_few_weights(
    name: str, of_most: str, of_half: str, what: str, share: float
) -> None:
    recipe = choose_recipe("default", 500, unfreeze=what)
    network = networks.with_new_head(load_backbone(name, "none"), recipe, 2, seed=0)
    networks.unfreeze(network, recipe, epoch=0)
    named = [(key, p) for key, p in network.backbone.named_parameters()]
    trains = [key for key, p in named if p.requires_grad]
    assert trains[0] == (of_most if what == "most" else of_half)
    assert trains == [key for key, _ in named][-len(trains) :]  # and everything behind it
    assert sum(p.numel() for _, p in named if not p.requires_grad) <= share * sum(p.numel() for _, p in named)
    groups = networks.parameter_groups(network, recipe)
    moved = {id(p) for group in groups for p in group["params"]} - {id(p) for p in network.head.parameters()}
    assert moved == {id(p) for _, p in named if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "what", "batchnorm", "dropout", "moving"),
    [
        ("resnet18", "all", "frozen", False, 0),
        ("resnet18", "all", "train", False, 20),
        ("efficientnet_b0", "all", "frozen", True, 0),
        ("efficientnet_b0", "head", "train", True, 0),
    ],
)
def test_the_backbone_behaves_as_in_prediction_unless_told(
    name: str, what: Any, batchnorm: Any, dropout: bool, moving: int
) -> None:
    recipe = Recipe(about="", hidden=(), unfreeze=what, batchnorm=batchnorm, backbone_dropout=dropout)
    network = networks.with_new_head(load_backbone(name, "none"), recipe, 2, seed=0)
    networks.unfreeze(network, recipe, epoch=0)
    networks.training_mode(network, recipe)
    training = [module for module in network.backbone.modules() if module.training]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in training) == moving
    assert len(training) == moving or dropout
    assert any(isinstance(module, StochasticDepth) for module in training) == (dropout and what == "all")
    assert network.head.training


def test_learning_rates_and_weight_decay_by_stage(tiny: Backbone) -> None:
    recipe = Recipe(about="", hidden=(), lr=1.0, backbone_lr=0.1, layer_decay=0.5, weight_decay=0.01)
    network = networks.with_new_head(tiny, recipe, 3, seed=0)
    groups = networks.parameter_groups(network, recipe)
    rate = {id(p): (group["peak_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(rate) == len(list(network.parameters()))
    assert rate[id(network.head[0].weight)] == (1.0, 0.01)
    assert rate[id(network.head[0].bias)] == (1.0, 0.0)
    for depth, part in enumerate(reversed(networks.stages(network.backbone))):
        for parameter in part:
            assert rate[id(parameter)] == (0.1 * 0.5**depth, 0.01 if parameter.ndim > 1 else 0.0)


def test_parameters_are_counted(tiny: Backbone) -> None:
    recipe = Recipe(about="", hidden=(8,), dropout=(0.5,), unfreeze="head")
    network = networks.with_new_head(tiny, recipe, 3, seed=0)
    backbone = sum(parameter.numel() for parameter in tiny.module.parameters())
    head = tiny.dim * 8 + 8 + 8 * 3 + 3
    assert networks.count_parameters(network, recipe) == (backbone + head, head)
    everything = Recipe(about="", hidden=(8,))
    assert networks.count_parameters(network, everything) == (backbone + head, backbone + head)
