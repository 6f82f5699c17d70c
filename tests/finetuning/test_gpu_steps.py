"""The gradient of a batch on a GPU, which is a stand-in here (``streams.py``): a real one is met in ``test_training_on_gpu.py``.

Oracle: the plain network, the whole batch at once.
"""

import copy
import dataclasses
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from streams import Cuda
from test_network import JOB, make_pixels
from torch.nn import functional

from featcache.backbones.load import load_backbone
from featcache.finetuning.gpu_steps import GpuSteps
from featcache.finetuning.network import Network, training_mode, unfreeze, with_new_head
from featcache.finetuning.recipes import Recipe
from featcache.finetuning.trainer import make_optimizer

EDGE, SIZES = 32, (8, 8, 8, 7, 8, 7, 7)
RECIPE = Recipe(about="", hidden=(), lr=1e-4, backbone_lr=1e-5, epochs=3, batch_size=8, unfreeze="all")


def made(name: str = "timm/test_resnet", **changes: Any) -> tuple[Network, Recipe]:
    torch.manual_seed(0)
    recipe = dataclasses.replace(RECIPE, **changes)
    network = with_new_head(load_backbone(name, "none", size=(EDGE, EDGE)), recipe, 3, seed=0)
    unfreeze(network, recipe, epoch=0)
    training_mode(network, recipe)
    return network, recipe


def batches() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    rng, pictures = np.random.default_rng(0), make_pixels(40, EDGE)
    found = []
    for size in SIZES:
        rows = rng.permutation(40)[:size]
        pixels = torch.from_numpy(np.stack([pictures.pictures[row] for row in rows]))
        weights = torch.from_numpy(rng.uniform(0.5, 1.5, size).astype(np.float32))
        found.append((pixels, torch.from_numpy(pictures.labels[rows]), weights, size))
    return found


def plain(network: Network, batch: Any, recipe: Recipe) -> torch.Tensor:
    pixels, labels, weights, size = batch
    logits = network(pixels)
    losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=recipe.label_smoothing)
    ((losses * weights).sum() / size).backward()
    hits = ((logits.argmax(1) == labels) * weights).sum()
    return torch.stack([(losses.detach() * weights).sum(), hits, weights.sum()])


def run(cuda: Cuda, network: Network, recipe: Recipe, *, micro: int) -> None:
    """Some steps by both, from the same weights each time."""
    oracle = copy.deepcopy(network)
    steps = GpuSteps(network, recipe, JOB, None, cuda=cuda)
    optimizers = [make_optimizer(each, recipe) for each in (network, oracle)]
    for number, batch in enumerate(batches()):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(number)
        with cuda:
            sums = steps.accumulate(batch, micro=micro, scale=lambda loss: loss)
        torch.manual_seed(number)
        expected = plain(oracle, batch, recipe)
        torch.testing.assert_close(sums, expected, rtol=1e-3, atol=1e-3)
        pairs = list(zip(network.parameters(), oracle.parameters(), strict=True))
        assert [mine.grad is None for mine, _ in pairs] == [theirs.grad is None for _, theirs in pairs]
        # All in one row: an activation near zero may be on the other side of it after rounding.
        mine, theirs = (
            torch.cat([each[k].grad.flatten() for each in pairs if each[k].grad is not None]) for k in (0, 1)
        )  # type: ignore[union-attr]
        assert float((mine - theirs).norm()) <= 1e-2 * float(theirs.norm()), number
        for optimizer in optimizers:
            optimizer.step()
        network.load_state_dict(oracle.state_dict() | {k: v for k, v in network.state_dict().items() if "running" in k})
    for (name, own), other in zip(network.named_buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-2, atol=1e-3, msg=name)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """By featcache; other libraries' threads may have something to say as well."""
    return [record.getMessage() for record in caplog.records if record.name == "featcache"]


CHANGES = {
    "frozen batch norms": {},
    "batch norms that train": {"batchnorm": "train"},
    "dropout in the head": {"hidden": (16,), "dropout": (0.4,)},
    "the last stage": {"unfreeze": "last-stage"},
    "the head alone": {"unfreeze": "head"},
    "smoothed labels": {"label_smoothing": 0.1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_gives_the_gradients_of_the_plain_network(change: str, caplog: pytest.LogCaptureFixture) -> None:
    cuda, (network, recipe) = Cuda(), made(**CHANGES[change])
    with caplog.at_level(logging.DEBUG, "featcache"):
        run(cuda, network, recipe, micro=8)
    assert not said(caplog)
    # Of each size the first two are computed as they come, the third to capture what all others replay, once to compare.
    assert sorted(graph.replays for graph in cuda.graphs) == [SIZES.count(7) - 3 + 1, SIZES.count(8) - 3 + 1]


def test_a_loss_scaler_that_begins_too_high_keeps_no_graph_from_being_made() -> None:
    cuda, (network, recipe) = Cuda(), made()
    steps, (batch, *_) = GpuSteps(network, recipe, JOB, None, cuda=cuda), batches()
    for scale in (math.inf, math.inf, math.inf, math.inf, 2.0, 2.0):
        network.zero_grad(set_to_none=True)
        with cuda:
            steps.accumulate(batch, micro=8, scale=lambda loss, scale=scale: loss * scale)
        # Of gradients that are not finite nobody could say whether a graph gives the same.
        assert bool(cuda.graphs) == math.isfinite(scale)
    [graph] = cuda.graphs
    assert graph.replays == 2  # to compare, and the last step


def test_parts_add_up_whatever_their_sizes() -> None:
    cuda, (network, recipe) = Cuda(), made()
    run(cuda, network, recipe, micro=3)
    assert len(cuda.graphs) == 3  # of 3, 2 and 1
    assert cuda.graphs[0].replays > 2


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_efficientnet"])
def test_other_networks(name: str) -> None:
    cuda, (network, recipe) = Cuda(), made(name)
    run(cuda, network, recipe, micro=8)
    assert len(cuda.graphs) == 2


def test_what_cannot_be_captured_is_computed_as_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    cuda, (network, recipe) = Cuda(captures=False), made()
    with caplog.at_level(logging.DEBUG, "featcache"):
        run(cuda, network, recipe, micro=8)
    assert said(caplog) == [
        f"no CUDA graph of {count} images in training: operation not permitted when stream is capturing"
        for count in (8, 7)
    ]


def test_a_graph_that_gives_other_gradients_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Cuda):
        def graph(self, graph: Any, **options: Any) -> Any:
            for parameter in network.head.parameters():
                parameter.data.mul_(3)  # what is captured computes from other weights
            return super().graph(graph, **options)

    cuda, (network, recipe) = Wrong(), made()
    steps = GpuSteps(network, recipe, JOB, None, cuda=cuda)
    with caplog.at_level(logging.DEBUG, "featcache"), cuda:
        for batch in batches()[:3]:
            network.zero_grad(set_to_none=True)
            steps.accumulate(batch, micro=8, scale=lambda loss: loss)
    assert said(caplog) == ["no CUDA graph of 8 images in training: it gives other gradients"]


@pytest.mark.parametrize("unfreezing", ["gradual", "freezeout"])
def test_other_parameters_that_train_make_other_graphs(unfreezing: str) -> None:
    """And what has trained before has no gradient that a graph of then keeps."""
    cuda, (network, recipe) = Cuda(), made(unfreeze=unfreezing)
    steps = GpuSteps(network, recipe, JOB, None, cuda=cuda)
    trained = []
    for epoch in range(3):
        unfreeze(network, recipe, epoch=epoch)
        training = [p.requires_grad for p in network.parameters()]
        for batch in batches()[:3] * 2:
            network.zero_grad(set_to_none=True)
            with cuda:
                steps.accumulate(batch, micro=8, scale=lambda loss: loss)
            assert [p.grad is not None for p in network.parameters()] == training
        trained.append(sum(training))
    assert trained == sorted(trained, reverse=unfreezing == "freezeout") and trained[0] != trained[-1]
    assert len(cuda.graphs) == len(set(trained))
