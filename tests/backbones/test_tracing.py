"""A traced network computes what the plain one does, of any number of images, also where its own code decides by sizes."""

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from featcache.backbones.folding import fold_batchnorm
from featcache.backbones.load import load_backbone
from featcache.backbones.tracing import evaluating, finished, trace

EDGE = 12


class Net(nn.Module):
    def __init__(self, compute: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.compute = compute
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)
        self.norm = nn.BatchNorm2d(8)
        self.bias, self.attention_bias_cache = nn.Parameter(torch.randn(8)), dict[str, torch.Tensor]()
        self.eval()

    def train(self, mode: bool = True) -> "Net":
        super().train(mode)
        self.attention_bias_cache = {}
        return self

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:
            raise RuntimeError("nobody gives it")
        return self.compute(self, self.norm(self.conv(x)))


class Bare(Net):
    """Without a second input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


def windows(net: Net, x: torch.Tensor) -> torch.Tensor:
    """As Swin's: padded to whole windows, these side by side in the batch."""
    n, c, height, width = x.shape
    pad = (5 - height % 5) % 5
    if pad > 0:
        x = functional.pad(x, (0, pad, 0, pad))
    side = x.size(-1) // 5
    parts = x.view(n, c, side, 5, side, 5).permute(0, 2, 4, 3, 5, 1).reshape(-1, 25, c)
    if parts.ndim == 3 and len(parts.shape) == 3 and x.dim() == 4:
        parts = net.linear(parts) * parts.shape[0]
    whole = parts.view(n, side, side, 5, 5, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, side * 5, -1)
    return whole[:, :, :height, :width].mean((2, 3))


def batch_second(net: Net, x: torch.Tensor) -> torch.Tensor:
    tokens = x.flatten(2).permute(2, 0, 1)
    length, n, c = tokens.size()
    if length != EDGE * EDGE or c != 8:
        raise RuntimeError("not these sizes")
    return net.linear(tokens.reshape(length * n, c)).view(length, n, c).sum(0) / n


def cuts(net: Net, x: torch.Tensor) -> torch.Tensor:
    parts = x.split([3, 5], dim=1) if x.shape[1] % 2 == 0 else (x,)
    first, second = parts
    return torch.cat(
        [part.mean((2, 3)) for part in x.chunk(len(parts), 1)] + [first.amax((2, 3)), second.amin((2, 3))], 1
    )


def remembers(net: Net, x: torch.Tensor) -> torch.Tensor:
    """As TinyViT's: what it computes of its weights it keeps, by a device that is a symbol while it is traced."""
    key = str(x.device)
    if key not in net.attention_bias_cache:
        net.attention_bias_cache[key] = net.bias * 2
    x = x + net.attention_bias_cache[key].view(1, -1, 1, 1)
    return x.mean((2, 3)) if x.shape[2] > 3 else x.amax((2, 3))


def made(net: Net, x: torch.Tensor) -> torch.Tensor:
    grid = torch.arange(x.shape[3], dtype=torch.float32) if x.shape[3] < 100 else torch.zeros(1)
    return (x * grid).mean((2, 3)) + x.new_zeros(x.shape[0], 8)


@pytest.mark.parametrize("kind", [Net, Bare])
@pytest.mark.parametrize("compute", [windows, batch_second, cuts, remembers, made])
def test_networks_that_decide_by_sizes(
    compute: Callable[[nn.Module, torch.Tensor], torch.Tensor], kind: type[Net]
) -> None:
    net = kind(compute)
    net.norm.running_mean.normal_()
    folded = fold_batchnorm(net, (EDGE, EDGE))
    assert isinstance(folded, fx.GraphModule)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    for n in (1, 2, 3, 7):
        x = torch.randn(n, 3, EDGE, EDGE)
        with torch.inference_mode():
            torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-5)


def test_what_decides_by_pixels_is_not_traced() -> None:
    net = Net(lambda net, x: net.linear(x.mean((2, 3))) if x.mean() > 0 else x.mean((2, 3)))
    with pytest.raises(Exception, match=r"meta|control flow|data"):
        trace(net, (EDGE, EDGE))
    assert not isinstance(fold_batchnorm(net, (EDGE, EDGE)), fx.GraphModule)


def test_sizes_need_neither_memory_nor_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a network is asked while it is traced by sizes, nothing has values."""
    devices = set[str]()
    right = nn.Conv2d.forward

    def forward(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        devices.add(x.device.type)
        return right(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    traced = trace(Net(windows), (EDGE, EDGE))
    assert devices == {"meta"}
    assert {tensor.device.type for tensor in traced.state_dict().values()} == {"cpu"}


def unpacks(net: Net, x: torch.Tensor) -> torch.Tensor:
    """As most transformers do, which plain symbols allow as well."""
    n, c, length = x.flatten(2).shape
    first, second = x.view(n, c, length).chunk(2, 1)
    return net.linear(torch.cat([first, second], 1).mean(2))


@pytest.mark.parametrize("compute", [windows, batch_second, cuts, remembers, unpacks])
def test_networks_are_given_back_at_once(compute: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    """Not when Python looks for cycles next: it counts objects, not a GPU's memory."""
    net = Bare(compute)
    held = weakref.ref(net.linear.weight)
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            expected, x = net(torch.ones(2, 3, EDGE, EDGE)), torch.ones(2, 3, EDGE, EDGE)
            traced = finished(trace(net, (EDGE, EDGE)))
            torch.testing.assert_close(traced(x), expected)
        del net, traced, expected
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("decides", [False, True])
def test_other_threads_compute_while_a_network_is_traced(decides: bool) -> None:
    """As in a service that loads one model and predicts with another: PyTorch replaces methods of all modules meanwhile."""
    other, x, found = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4), list[torch.Tensor]()
    expected = other(x).detach()

    def compute(net: nn.Module, y: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: found.append(other(x).detach()))
        thread.start()
        thread.join()
        return y.mean((2, 3)) if not decides or y.shape[2] > 3 else y

    traced = trace(Bare(compute), (EDGE, EDGE))
    assert len(found) == 1 + decides
    assert all(torch.equal(each, expected) for each in found)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2


def test_two_threads_trace_one_after_the_other() -> None:
    """At once, the one that ends last would give all modules back what the other one had put there."""
    call, inside, done = nn.Module.__call__, threading.Event(), threading.Event()
    traced = list[fx.GraphModule]()

    def second(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        inside.set()
        done.wait(5)
        return x.mean((2, 3))

    thread = threading.Thread(target=lambda: traced.append(trace(Bare(second), (EDGE, EDGE))))

    def first(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        thread.start()
        inside.wait(0.3)
        return x.amax((2, 3))

    traced.append(trace(Bare(first), (EDGE, EDGE)))
    done.set()
    thread.join()
    assert nn.Module.__call__ is call
    assert [len(graph.graph.nodes) for graph in traced] == [5, 5]


@pytest.mark.parametrize("name", ["timm/mobilevitv2_050", "timm/tiny_vit_5m_224"])
def test_real_ones(name: str) -> None:
    backbone = load_backbone(name, "none")
    folded = fold_batchnorm(backbone.module, backbone.preprocess.crop)
    assert isinstance(folded, fx.GraphModule)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    x = torch.randn(3, 3, *backbone.preprocess.crop)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), backbone.module(x), rtol=1e-3, atol=1e-4)


def test_evaluating_restores_each_mode_and_has_parts_forget() -> None:
    net = Net(remembers)
    net.conv.training, net.norm.training = True, False
    net.training = True
    with evaluating(net):
        assert not any(part.training for part in net.modules())
        net(torch.randn(1, 3, EDGE, EDGE))
        assert net.attention_bias_cache
    assert (net.training, net.conv.training, net.norm.training, net.linear.training) == (True, True, False, False)
    assert not net.attention_bias_cache
