"""What this process computes with; and that saving time at the start costs nobody anything later."""

import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(
    ("program", "printed"),
    [(LATE, "4.0\n2.0\n"), pytest.param(OTHER_NAMES, "module defaultdict optimize\n", marks=pytest.mark.slow)],
    ids=["late", "other names of its modules"],
)
def test_the_compiler_is_imported_when_it_is_used(program: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == printed
