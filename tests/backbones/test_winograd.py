"""Convolutions by tiles, and their gradients, against PyTorch's own in float64; and where they are taken."""

import pytest
import torch
from torch import nn

from featcache.backbones import winograd
from featcache.backbones.encoder import Encoder
from featcache.backbones.folding import fold_batchnorm
from featcache.backbones.load import load_backbone


def maps(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal noise, the same each time."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


SHAPES = {  # images, channels in and out, height, width, padding
    "whole tiles": (2, 5, 3, 8, 12, (1, 1)),
    "parts of tiles": (2, 4, 6, 7, 9, (1, 1)),
    "less than a tile": (3, 3, 2, 2, 1, (1, 1)),
    "a pixel that is left": (1, 3, 4, 3, 3, (0, 0)),
    "not padded": (2, 3, 4, 10, 7, (0, 0)),
    "padded unevenly": (2, 3, 4, 6, 11, (0, 2)),
    "padded widely": (1, 2, 2, 5, 5, (3, 2)),
    "no image": (0, 2, 3, 6, 6, (1, 1)),
}


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("images_at_once", [1, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_convolution_and_gradients_are_those_of_the_definition(
    name: str, images_at_once: int, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not keeps:
        monkeypatch.setattr(winograd, "_KEPT", -1)
    if images_at_once == 1:
        monkeypatch.setattr(winograd, "_IN_CACHE", 0)
        monkeypatch.setattr(winograd, "_MANY_TILES", 0)
    n, c, k, height, width, padding = SHAPES[name]
    x, weight, bias = maps(n, c, height, width), maps(k, c, 3, 3), maps(k)
    inputs = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    expected = nn.functional.conv2d(x, weight, bias, padding=padding)
    gradient = maps(*expected.shape)
    wanted = torch.autograd.grad(expected, inputs, gradient)
    with torch.no_grad():
        of_weights, kept = winograd.of_weights(weight), list[torch.Tensor]()
        found = winograd.convolve(x, of_weights, bias, padding, kept)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert not found._is_view()
        assert len(kept) == (keeps or n == 0) * (max(n, 1) if images_at_once == 1 else 1)
        of_x, of_w, of_b = winograd.back(gradient, x, of_weights, padding, kept, (True, True, True))
        assert of_w is not None
        torch.testing.assert_close(of_x, wanted[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(winograd.of_weights_back(of_w), wanted[1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(of_b, wanted[2], rtol=1e-10, atol=1e-10)
        for needed in ((True, False, False), (False, True, False), (False, False, True)):
            some = winograd.back(gradient, x, of_weights, padding, kept, needed)
            for one, whole, is_needed in zip(some, (of_x, of_w, of_b), needed, strict=True):
                assert (one is not None) == is_needed
                assert one is None or torch.equal(one, whole)
        without = winograd.convolve(x, of_weights, None, padding)
        torch.testing.assert_close(without + bias[:, None, None], found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [64, 512])
def test_in_float32_it_rounds_a_few_times_as_much(channels: int) -> None:
    """Lavin and Gray find errors of 2e-5 of values about one, where a plain convolution has 4e-6."""
    x, weight = maps(2, channels, 14, 14), maps(channels, channels, 3, 3) / (9 * channels) ** 0.5
    expected = nn.functional.conv2d(x, weight, padding=1)
    plain = nn.functional.conv2d(x.float(), weight.float(), padding=1)
    found = winograd.convolve(x.float(), winograd.of_weights(weight.float()), None, (1, 1))
    error, least = (float((y.double() - expected).norm() / expected.norm()) for y in (found, plain))
    assert error < 1e-5
    assert error < 20 * least + 1e-6


def test_where_nothing_changes_there_is_no_noise() -> None:
    """Of a tile of one value all numbers but one are exactly zero, so that all of its pixels get the same bits."""
    x, weight = torch.full((1, 64, 18, 18), 0.3), maps(64, 64, 3, 3, dtype=torch.float32)
    found = winograd.convolve(x, winograd.of_weights(weight), torch.full((64,), 0.7), (0, 0))
    assert torch.equal(found, found[:, :, :1, :1].expand_as(found))
    torch.testing.assert_close(found[0, :, 0, 0], 0.3 * weight.sum((1, 2, 3)) + 0.7, rtol=1e-4, atol=1e-4)


def geometry(inside: int, out: int, **options: int) -> nn.Conv2d:
    """A 3 x 3 convolution as networks have them."""
    return nn.Conv2d(inside, out, **{"kernel_size": 3, "padding": 1} | options)


@pytest.mark.parametrize(
    ("conv", "size", "expected"),
    [
        (geometry(64, 64), 56, True),
        (geometry(512, 512), 7, True),
        (geometry(48, 192), 28, True),
        (geometry(32, 32), 56, False),
        (geometry(3, 64), 224, False),
        (geometry(128, 32), 28, False),
        (geometry(512, 512), 1, False),
        (geometry(512, 512), 2, False),
        (geometry(256, 256, stride=2), 28, False),
        (geometry(256, 256, dilation=2), 28, False),
        (geometry(256, 256, groups=32), 28, False),
        (geometry(256, 256, kernel_size=1), 28, False),
        (geometry(256, 256, kernel_size=5), 28, False),
        (geometry(256, 256).bfloat16(), 28, False),
        (geometry(256, 256).half(), 28, False),
    ],
)
def test_where_it_pays(conv: nn.Conv2d, size: int, expected: bool) -> None:
    assert winograd.pays(conv, 8, (size, size)) == expected


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing is fused without oneDNN")
def test_an_embedding_does_not_depend_on_its_neighbours() -> None:
    """Nor on its place in the batch: to the bit, in a network most of which is computed by tiles."""
    backbone = load_backbone("resnet18", "none")
    module = fold_batchnorm(backbone.module, backbone.preprocess.crop)
    encoder = Encoder(module, backbone.preprocess, torch.device("cpu"), torch.float32)
    assert encoder.fuse(8)
    assert sum(type(module).__name__ == "_TiledConvolution" for module in encoder._module.modules()) == 13
    pixels = torch.randint(0, 256, (8, 224, 224, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    together = encoder(pixels)
    assert (encoder(pixels[[3, 0, 7, 1, 2, 6, 5, 4]]) == together[[3, 0, 7, 1, 2, 6, 5, 4]]).all()
    assert (encoder(pixels[[5] * 8]) == together[[5] * 8]).all()


@pytest.mark.parametrize("last", [False, True])
def test_where_some_rows_are_computed_otherwise_nothing_is_tiled(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may have other kernels for a matrix's last rows."""
    right = torch.bmm

    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found = right(a, b)
        if last:
            found[:, -1] = torch.nextafter(found[:, -1], torch.tensor(torch.inf))
        return found

    winograd.are_rows_alike.cache_clear()
    monkeypatch.setattr(torch, "bmm", wrong)
    try:
        assert winograd.are_rows_alike(8, (14, 14), 256, 256) != last
        backbone = load_backbone("resnet18", "none")
        encoder = Encoder(
            fold_batchnorm(backbone.module, (224, 224)), backbone.preprocess, torch.device("cpu"), torch.float32
        )
        encoder.fuse(8)
        tiled = any(type(module).__name__ == "_TiledConvolution" for module in encoder._module.modules())
        assert tiled == (torch.backends.mkldnn.is_available() and not last)
    finally:
        winograd.are_rows_alike.cache_clear()
