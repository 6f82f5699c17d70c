"""Logits of a split are the network's, by whatever form they are computed. Oracle: the network itself, all images at once."""

import dataclasses

import numpy as np
import pytest
import torch
from test_network import JOB, make_pixels

from featcache.backbones.load import load_backbone
from featcache.finetuning.logits import compute_logits, fastest_form
from featcache.finetuning.network import Network, with_new_head
from featcache.finetuning.recipes import Recipe
from featcache.system.device import Runtime

EDGE, N = 32, 70
RECIPE = Recipe(about="", hidden=(8,), lr=1e-3, backbone_lr=1e-3, epochs=1, batch_size=8)
CPU = Runtime(torch.device("cpu"), 2, 8, "")
DATA = make_pixels(N, EDGE)


def made(name: str) -> Network:
    torch.manual_seed(0)
    network = with_new_head(load_backbone(name, "none", size=(EDGE, EDGE)), RECIPE, 3, seed=0).eval()
    for module in network.modules():  # statistics as after training, not 0 and 1
        if (
            isinstance(module, torch.nn.BatchNorm2d)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network


def expected(network: Network) -> np.ndarray:
    with torch.inference_mode():
        return network(torch.from_numpy(np.stack(DATA.pictures))).numpy()


@pytest.mark.parametrize("name", ["timm/test_resnet", "mobilenet_v3_small", "timm/test_vit"])
def test_logits_are_the_networks_also_after_its_weights_have_changed(name: str) -> None:
    network, job = made(name), dataclasses.replace(JOB, runtime=CPU)
    for _ in range(2):
        found = compute_logits(network, DATA, job=job)
        np.testing.assert_allclose(found, expected(network), rtol=1e-3, atol=1e-4 * np.abs(found).max())
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1 + 0.05 * torch.rand_like(parameter))


def test_a_form_is_made_for_many_images_on_a_cpu() -> None:
    network = made("timm/test_resnet")
    assert fastest_form(network, DATA.pictures, runtime=CPU) is not network
    assert fastest_form(network, DATA.pictures[:63], runtime=CPU) is network
    assert (
        fastest_form(network, DATA.pictures, runtime=dataclasses.replace(CPU, device=torch.device("meta"))) is network
    )


def test_what_the_network_makes_of_weights_that_are_no_numbers_is_not_hidden() -> None:
    """oneDNN's ReLU makes 0 of NaN."""
    network = made("timm/test_resnet")
    with torch.no_grad():
        next(network.backbone.parameters()).fill_(torch.nan)
    assert fastest_form(network, DATA.pictures, runtime=CPU) is network
    assert np.isnan(compute_logits(network, DATA, job=dataclasses.replace(JOB, runtime=CPU))).all()


def test_a_form_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    network = made("timm/test_resnet")
    monkeypatch.setattr(
        "featcache.finetuning.logits.fused_form", lambda folded, sample, batch_size: lambda x: folded(x) * 1.01
    )
    assert fastest_form(network, DATA.pictures, runtime=CPU) is network
    monkeypatch.undo()
    assert fastest_form(network, DATA.pictures, runtime=CPU) is not network
