"""What this process computes with; and that saving time at the start costs nobody anything later."""

import copy
import subprocess
import sys

import pytest
import torch

from featcache.system.lazy_imports import optimizer_without_compiler

LATE = """
import sys
import featcache.backbones.load
assert not [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))]
import torch
from torchvision.ops import RoIAlign
with torch.inference_mode():
    boxes = [torch.tensor([[0.0, 0, 4, 4]])]
    print(float(RoIAlign(2, 1.0, 1)(torch.ones(1, 1, 8, 8), boxes).sum()))
module = sys.modules["torchvision.ops.roi_align"]
assert module.is_compile_supported("cpu") in (True, False)
import torch._dynamo
assert hasattr(torch._dynamo, "optimize")
print(float(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(()))))
"""
OTHER_NAMES = """
from featcache.system.lazy_imports import compiler_on_demand
import sys
with compiler_on_demand():
    import torchvision
    from torch._dynamo.utils import counters
    from torch._dynamo import optimize
print(type(sys.modules["torch._dynamo"]).__name__, type(counters).__name__, optimize.__name__)
"""


TRAINING = """
import sys
import featcache.finetuning.tune
import torch
from featcache.finetuning.augment import augment
from featcache.finetuning.fused import _Given
from featcache.system.lazy_imports import optimizer_without_compiler

def trained(kind):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_without_compiler(kind, [{"params": [weight], "lr": 0.1}], lr=1.0)
    for _ in range(2):
        torch.autograd.backward(_Given.apply([torch.ones(3)], weight))
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    return weight, optimizer

augment(torch.zeros(9, 9, 3, dtype=torch.uint8), [("resized_crop", 0.5, 1.0, 1.0), ("rotate", 9.0)], size=(4, 4), seed=(0, 0, 0))
for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
    weight, optimizer = trained(kind)
print([name for name in ("torch._dynamo", "sympy", "sklearn", "pandas") if name in sys.modules])
before = weight.detach().clone()
weight.grad = torch.ones(3)
torch.compile(optimizer.step, backend="eager")()  # later somebody does compile
print(bool((weight < before).all()), len(optimizer.state_dict()["state"]))
"""


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_without_the_compiler_is_the_same(kind: type[torch.optim.Optimizer]) -> None:
    """To the bit; restored in between."""
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)]
    optimizers = [kind([weights[0]], lr=0.03), optimizer_without_compiler(kind, [weights[1]], lr=0.03)]  # type: ignore[call-arg]
    for seed in range(6):
        gradient = torch.randn(7, generator=torch.Generator().manual_seed(seed))
        for weight, optimizer in zip(weights, optimizers, strict=True):
            optimizer.zero_grad()
            weight.grad = gradient.clone()
            optimizer.step()
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        (LATE, "4.0\n2.0\n"),
        (TRAINING, "[]\nTrue 1\n"),
        pytest.param(OTHER_NAMES, "module defaultdict optimize\n", marks=pytest.mark.slow),
    ],
    ids=["late", "training", "other names of its modules"],
)
def test_the_compiler_is_imported_when_it_is_used(program: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == printed
