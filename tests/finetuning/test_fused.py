"""The form that trains on a CPU against the plain network: embeddings and every gradient, of every kind of network."""

import copy
from typing import Any

import pytest
import torch
from cpus import ONEDNN_BF16, needs_onednn_bf16
from test_network import shrunk
from torch import nn

from featcache.backbones import winograd
from featcache.backbones.load import load_backbone
from featcache.finetuning import convolutions, fused
from featcache.finetuning.attention import attend
from featcache.finetuning.draws import draw_by_image, drawn_by_image, draws_otherwise
from featcache.finetuning.fused import Form, make_form

FUSED = (
    "mobilenet_v2",
    "mobilenet_v3_small",
    "resnet18",
    "efficientnet_b0",
    "regnet_y_400mf",
    "timm/tf_efficientnet_lite0",
)
PLAIN = ("convnext_tiny", "timm/vit_tiny_patch16_224")  # blocks of other parts; only the first may be fused


def randomised(name: str, edge: int) -> nn.Module:
    """The network with random statistics of batch norms, so that folding has something to do."""
    module = copy.deepcopy(shrunk(load_backbone(name, "none"), edge).module).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1, generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.normal_(0, 0.1, generator=generator)
    return module.eval()


def gradients(module: nn.Module, embed: Any, x: torch.Tensor, form: Form | None) -> dict[str, torch.Tensor]:
    """Of the mean of one number per image, by name."""
    module.zero_grad(set_to_none=True)
    embedding = embed(x)
    weights = torch.linspace(-1, 1, embedding.shape[1])
    loss = (embedding @ weights).tanh().mean()
    if form is None:
        loss.backward()
    else:
        form.settle(torch.autograd.grad(loss, form.leaves, allow_unused=True))
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*FUSED, *(pytest.param(name, marks=pytest.mark.slow) for name in PLAIN)])
def test_every_gradient_is_the_plain_networks(name: str) -> None:
    edge = 224 if name == "timm/vit_tiny_patch16_224" else 64
    module = randomised(name, edge).requires_grad_(True)
    x = torch.rand(3, 3, edge, edge, generator=torch.Generator().manual_seed(0)) * 4 - 2
    form = make_form(module, nn.Linear(1, 1), x[:2], torch.float32)
    if torch.backends.mkldnn.is_available():
        assert form.fused or name in PLAIN
    expected = gradients(module, module, x, None)
    form.refresh(torch.float32)
    found = gradients(module, form.embed, x, form)
    torch.testing.assert_close(form.embed(x), module(x), rtol=1e-4, atol=1e-4)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        error = float((found[key] - gradient).norm())
        assert error <= 1e-3 * float(gradient.norm()) + 1e-7, (key, error, float(gradient.norm()))
        as_one_row = [t.as_strided((t.numel(),), (1,)) for t in (found[key], gradient)]  # fused optimizers read both so
        torch.testing.assert_close(*as_one_row, rtol=0.01, atol=1e-2 * float(gradient.abs().max()) + 1e-9)


GEOMETRIES = {  # in, out, kernel, stride, padding, dilation, groups
    "pointwise": (8, 12, 1, 1, 0, 1, 1),
    "pointwise, strided": (8, 12, 1, 2, 0, 1, 1),
    "pointwise, padded": (8, 12, 1, 1, 1, 1, 1),
    "3 x 3": (8, 12, 3, 1, 1, 1, 1),
    "by tiles": (8, 12, 3, 1, 1, 1, 1),
    "by tiles, not padded": (8, 12, 3, 1, 0, 1, 1),
    "dilated": (8, 12, 3, 1, 2, 2, 1),
    "pointwise, strided, of colours": (3, 48, 1, 2, 0, 1, 1),
    "stem": (3, 12, 7, 2, 3, 1, 1),
    "grouped": (8, 12, 3, 2, 1, 1, 4),
    "depthwise": (12, 12, 3, 1, 1, 1, 12),
    "depthwise, strided": (12, 12, 3, 2, 1, 1, 12),
    "depthwise, large": (12, 12, 5, 2, 2, 1, 12),
    "depthwise, 7 x 7": (16, 16, 7, 1, 3, 1, 16),
    "depthwise, 5 x 5 in steps of 3": (16, 16, 5, 3, 2, 1, 16),
    "depthwise, 5 x 5, dilated": (16, 16, 5, 1, 4, 2, 16),
    "depthwise, 5 x 5, twice as many": (8, 16, 5, 1, 2, 1, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_onednn_bf16)])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("after", ["nothing", "relu6", "residual", "residual and relu"])
def test_one_convolution_with_what_follows_it(name: str, dtype: torch.dtype, after: str, bf16_arithmetic: bool) -> None:
    if dtype == torch.bfloat16 and not bf16_arithmetic:
        pytest.skip("training in bfloat16 is not fused here")
    inside, out, kernel, stride, padding, dilation, groups = GEOMETRIES[name]
    torch.manual_seed(0)
    conv = nn.Conv2d(inside, out, kernel, stride, padding, dilation, groups)
    x = torch.randn(2, inside, 9, 11, requires_grad=True)
    plain = conv(x)
    residual = torch.randn_like(plain, requires_grad=True) if "residual" in after else None
    activation = {"relu6": ("hardtanh", [0.0, 6.0], ""), "residual and relu": ("relu", [], "")}
    expected = 3 * (plain if residual is None else plain + residual)
    expected = {"relu6": nn.functional.relu6, "residual and relu": nn.functional.relu}.get(after, lambda y: y)(expected)
    cotangent = torch.randn_like(expected)
    inputs = [t for t in (x, residual, conv.weight, conv.bias) if t is not None]
    wanted = torch.autograd.grad(expected, inputs, cotangent)

    scaled = copy.deepcopy(conv)
    scaled.weight.data *= 3
    scaled.bias.data *= 3
    if residual is not None and groups > 1:
        pytest.skip("oneDNN adds no residual there; folding.chain_from leaves it out")
    by_tiles = "by tiles" in name
    module = fused._Convolution(scaled, (), activation.get(after, ("none", [], "")), by_tiles=by_tiles)
    pairs = list(module.refresh(dtype, {}))
    assert (module._of_weight is not None) == (by_tiles and dtype == torch.float32)
    got = module(x, None if residual is None else 3 * residual)
    leaves = [leaf for _, leaf in pairs]
    sources = [t for t in (x, residual) if t is not None]
    found = torch.autograd.grad(got, [*sources, *leaves], cotangent.to(dtype))
    found = (*found[: len(sources)], *(3 * gradient.float() for gradient in found[len(sources) :]))
    # in bfloat16 one value in a hundred falls on the other side of an activation's kink
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    torch.testing.assert_close(got.float(), expected, **close)
    for one, two in zip(found, wanted, strict=True):
        assert float((one.float() - two).norm()) <= (1e-5 if dtype == torch.float32 else 0.25) * float(two.norm())


@pytest.mark.parametrize("edge", [16, 18])  # of 18, the maps are cut out of larger ones
def test_what_follows_may_change_maps_in_place(edge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As activations that are not done along with the convolution."""
    monkeypatch.setattr(winograd, "pays", lambda *_: True)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    module, x = nn.Sequential(*layers).requires_grad_(True), torch.randn(2, 3, edge, edge)
    form = make_form(module, nn.Linear(1, 1), x, torch.float32)
    assert form.fused == torch.backends.mkldnn.is_available()
    expected = gradients(module, module, x, None)
    form.refresh(torch.float32)
    for name, gradient in gradients(module, form.embed, x, form).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_what_is_frozen_gets_no_gradient_and_no_leaf() -> None:
    module = randomised("mobilenet_v2", 32)
    last = list(module.parameters())[-3:]
    for parameter in last:
        parameter.requires_grad_(True)
    form = make_form(module, nn.Linear(1, 1), torch.rand(2, 3, 32, 32), torch.float32)
    form.refresh(torch.float32)
    found = gradients(module, form.embed, torch.rand(2, 3, 32, 32), form)
    assert set(found) == {name for name, p in module.named_parameters() if any(p is one for one in last)}
    assert len(form.leaves) == (2 if form.fused else 3) + 2  # the last convolution's weight and bias; the head's


def test_two_parameters_never_share_a_gradient() -> None:
    """That of a sum is one tensor for both, which clipping then would scale twice; and what lies otherwise is laid as its parameter."""
    module = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
    head = nn.Module()
    head.a, head.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    form = Form(module, head)
    form.refresh(torch.float32)
    pixels = torch.rand(2, 3, 8, 8)
    given = list(torch.autograd.grad(((form.embed(pixels).mean((0, 2, 3)) + head.a + head.b) ** 2).sum(), form.leaves))
    assert given[1] is given[2] or given[1].data_ptr() == given[2].data_ptr()
    given[0] = given[0].contiguous()
    wanted = [gradient.clone() for gradient in given]
    form.settle(given)
    form.refresh(torch.float32)
    form.settle([gradient.clone() for gradient in wanted])  # added to what is there
    parameters = [module.weight, head.a, head.b]
    torch._foreach_mul_([p.grad for p in parameters], 0.25)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / 2)
        assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e18])
def test_weights_that_are_no_numbers_are_noticed(value: float, dtype: torch.dtype) -> None:
    module = randomised("resnet18", 32).requires_grad_(True)
    form = make_form(module, nn.Linear(1, 1), torch.rand(2, 3, 32, 32), torch.float32)
    with torch.no_grad():
        module.layer3[0].conv1.weight[7, 3, 1, 1] = value
    form.refresh(dtype)
    assert form.is_finite() == (value == 1e18)


def test_a_network_that_disagrees_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another build of PyTorch computes otherwise is not used."""
    module = randomised("resnet18", 32).requires_grad_(True)
    right = convolutions._back
    monkeypatch.setattr(convolutions, "_back", lambda *a: (*right(*a)[:2], None))  # the gradient of biases is lost
    form = make_form(module, nn.Linear(1, 1), torch.rand(2, 3, 32, 32), torch.float32)
    assert not form.fused
    assert form.module is module


def test_fusing_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    module = randomised("resnet18", 32).requires_grad_(True)
    monkeypatch.setenv("FEATCACHE_FUSE", "0")
    form = make_form(module, nn.Linear(1, 1), torch.rand(2, 3, 32, 32), torch.float32)
    assert not form.fused
    assert form.module is module


def test_a_mistake_below_a_last_layer_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose lengths do not depend on what is below: a gradient of these would hardly pass it."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    module, sample = nn.Sequential(*layers, nn.LayerNorm(16)).requires_grad_(True), torch.rand(2, 3, 16, 16)
    assert make_form(module, nn.Linear(1, 1), sample, torch.float32).fused == torch.backends.mkldnn.is_available()
    right = convolutions._back

    def wrong(*a: Any) -> tuple[torch.Tensor | None, ...]:
        gx, gw, gb = right(*a)
        return gx, None if gw is None else gw * 1.1, gb

    monkeypatch.setattr(convolutions, "_back", wrong)
    assert not make_form(module, nn.Linear(1, 1), sample, torch.float32).fused


@pytest.mark.parametrize(("first", "second"), [(False, True), (False, False)])
def test_other_images_are_looked_at_before_a_form_is_given_up(
    first: bool, second: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, seen = iter([first, second]), list[torch.Tensor]()

    def is_near(_: object, __: object, images: torch.Tensor) -> bool:
        seen.append(images)
        return next(answers)

    monkeypatch.setattr(fused, "_is_near", is_near)
    module = randomised("resnet18", 32).requires_grad_(True)
    form = make_form(module, nn.Linear(1, 1), torch.rand(2, 3, 32, 32), torch.float32)
    assert form.fused == (second and torch.backends.mkldnn.is_available())
    assert not torch.equal(*seen)


class _Normed(nn.Module):
    """Two convolutions, the second with a residual, each with some batch norms behind it."""

    def __init__(self, channels: int, *, norms: int, bias: bool) -> None:
        super().__init__()
        convolutions = nn.Conv2d(3, channels, 3, bias=bias), nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.first, self.second = (
            nn.Sequential(conv, *(nn.BatchNorm2d(channels) for _ in range(norms))) for conv in convolutions
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return (x + self.second(x)).relu().mean((2, 3))


@pytest.mark.parametrize("channels", [8, 5])  # of these, not all biases begin where a kernel may want them to
@pytest.mark.parametrize("norms", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["", "norms", "weights"])
@pytest.mark.parametrize("by_tiles", [False, True])
def test_chains_of_norms_and_parts_that_are_frozen(
    channels: int, norms: int, bias: bool, frozen: str, by_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "pays", lambda *_: by_tiles)
    torch.manual_seed(3)
    module = _Normed(channels, norms=norms, bias=bias).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values in (part.running_mean, part.running_var, part.weight.data, part.bias.data):
                values.uniform_(0.5, 1.5)
        part.requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(
            (frozen == "norms" and ".0." in name) or (frozen == "weights" and ".0." not in name) or not frozen
        )
    x = torch.rand(4, 3, 12, 12)
    form = make_form(module, nn.Linear(1, 1), x[:2], torch.float32)
    assert form.folded == torch.backends.mkldnn.is_available()
    expected = gradients(module, module, x, None)
    for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 0.05))[: 1 + ONEDNN_BF16]:
        form.refresh(dtype)
        found = gradients(module, form.embed, x, form)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            assert float((gradient - expected[name]).norm()) <= error * float(expected[name].norm()), (name, dtype)


def test_forms_are_compared_in_true_float32_whatever_the_program_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32, which PyTorch allows in convolutions on a GPU, moves gradients of a ResNet-50 by more than a form may."""
    switches: Any = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before, seen = [switch.fp32_precision for switch in switches], set()
    compute = fused._embed_and_back

    def look(form: Form, backbone: nn.Module, sample: torch.Tensor, dtype: torch.dtype) -> Any:
        seen.add((dtype, *(switch.fp32_precision for switch in switches)))
        return compute(form, backbone, sample, dtype)

    monkeypatch.setattr(fused, "_embed_and_back", look)
    module = randomised("resnet18", 32).requires_grad_(True)
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        make_form(module, nn.Linear(1, 1), torch.rand(2, 3, 32, 32), torch.float32)
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
    assert seen == ({(torch.float32, "ieee", "ieee")} if torch.backends.mkldnn.is_available() else set())


def vit_of(**options: Any) -> nn.Module:
    """A small one of timm's; all that is drawn from a normal distribution, so that every token matters."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
    return varied(VisionTransformer(**sizes | options))


def torchvisions(**options: Any) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return varied(VisionTransformer(32, 8, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96, **options))


def varied(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return module.requires_grad_(True).train()


VITS = {  # with tokens of the last block's MLP: only those that are read
    "class token": (lambda: vit_of(reg_tokens=2, init_values=0.5, qk_norm=True), 1),
    "mean": (lambda: vit_of(global_pool="avg"), 17),
    "torchvision": (torchvisions, 1),
}


@pytest.mark.parametrize("name", VITS)
def test_every_gradient_of_a_transformer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form for bfloat16, where attention has a way back of its own, computed in float32."""
    monkeypatch.setattr(fused, "has_matrix_units", lambda: False)
    make, tokens = VITS[name]
    module, x = make(), torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 4 - 2
    traced = fused._fused(module, x[:2], torch.bfloat16)
    assert [node.target for node in traced.graph.nodes].count(attend) == 3
    form, seen = Form(traced, nn.Linear(1, 1)), list[torch.Size]()
    for part in traced.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda _, given, result: seen.append(given[0].shape))
    expected = gradients(module, module, x, None)
    form.refresh(torch.float32)
    seen.clear()
    found = gradients(module, form.embed, x, form)
    assert [shape[1] for shape in seen if len(shape) == 3][-2:] == [tokens] * 2
    torch.testing.assert_close(form.embed(x), module(x), rtol=1e-4, atol=1e-4)
    assert found.keys() == expected.keys()
    rounding = 1e-6 * max(float(gradient.norm()) for gradient in expected.values())  # all that a bias of keys has
    for key, gradient in expected.items():
        error = float((found[key] - gradient).norm())
        assert error <= 1e-3 * float(gradient.norm()) + rounding, (key, error, float(gradient.norm()))


def test_attention_in_float32_and_with_matrix_units_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 3, 32, 32)
    for units, dtype, expected in ((False, torch.float32, 0), (True, torch.bfloat16, 0), (False, torch.bfloat16, 3)):
        monkeypatch.setattr(fused, "has_matrix_units", lambda units=units: units)
        nodes = fused._fused(vit_of(), x, dtype).graph.nodes
        assert [node.target for node in nodes].count(attend) == expected


def test_what_drops_while_it_trains_stays() -> None:
    """Tokens that are not read, and attention of torchvision's, only where nothing is drawn for them."""
    x = torch.rand(2, 3, 32, 32)
    for make in (lambda: vit_of(proj_drop_rate=0.3), lambda: torchvisions(dropout=0.3, attention_dropout=0.3)):
        training, still = (fused._fused(make().train(mode), x, torch.bfloat16) for mode in (True, False))
        dropping = [[part for part in one.modules() if isinstance(part, nn.Dropout)] for one in (training, still)]
        assert len(dropping[0]) > 3 and all(part.p == 0.3 for part in dropping[0]) and not dropping[1]
    whole = [part for part in training.modules() if isinstance(part, nn.MultiheadAttention)]
    assert len(whole) == 3 and not any(isinstance(part, nn.MultiheadAttention) for part in still.modules())


def test_dropout_belongs_to_images_however_they_are_batched() -> None:
    module = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.4))
    draw_by_image(module)
    x = torch.ones(5, 6)
    with drawn_by_image(1, 2, range(5)):
        whole = module(x)
    parts = []
    for part in (range(2), range(2, 5)):
        with drawn_by_image(1, 2, part):
            parts.append(module(x[list(part)]))
    torch.testing.assert_close(torch.cat(parts), whole)
    assert (whole == 0).float().mean() == pytest.approx(0.4, abs=0.12)
    with drawn_by_image(1, 3, range(5)):
        assert not torch.equal(module(x) == 0, whole == 0)
    kept = whole[whole != 0]
    torch.testing.assert_close(kept, (module.eval()(x) / 0.6)[whole != 0])


def test_dropout_inside_attention_is_noticed() -> None:
    x = torch.rand(2, 3, 8)
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    draw_by_image(attention)
    assert draws_otherwise(attention, x)
    assert not draws_otherwise(attention.eval(), x)
    assert not draws_otherwise(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(3)), x)
