"""Float32 is float32 inside a context and whatever the program chose outside; memory that runs out has one name."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from featcache.system.device import choose_runtime, kept_random_state, memory_errors, seed_random_numbers, true_float32

BACKENDS = torch.backends
SWITCHES = {
    "convolutions on a GPU": BACKENDS.cudnn.conv,
    "products on a GPU": BACKENDS.cuda.matmul,
    "convolutions on a CPU": BACKENDS.mkldnn.conv,
    "products on a CPU": BACKENDS.mkldnn.matmul,
}
READINGS: dict[str, Callable[[], object]] = {
    **{name: lambda switch=switch: switch.fp32_precision for name, switch in SWITCHES.items()},
    "everything": lambda: BACKENDS.fp32_precision,
    "old, convolutions": lambda: BACKENDS.cudnn.allow_tf32,
    "old, products": lambda: BACKENDS.cuda.matmul.allow_tf32,
    "older, products": torch.get_float32_matmul_precision,
}


def readings() -> dict[str, object]:
    """What a program reads by every interface; some refuse while others were used."""
    found: dict[str, object] = {}
    for name, read in READINGS.items():
        try:
            found[name] = read()
        except RuntimeError as error:
            found[name] = str(error)[:60]
    return found


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    before = readings()
    yield
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for switch in SWITCHES.values():
        switch.fp32_precision = "none"
    BACKENDS.cudnn.conv.fp32_precision = BACKENDS.cudnn.rnn.fp32_precision = "tf32"
    assert readings() == before


def allow_by_the_old_interface() -> None:
    BACKENDS.cuda.matmul.allow_tf32 = BACKENDS.cudnn.allow_tf32 = True


def forbid_by_the_old_interface() -> None:
    BACKENDS.cuda.matmul.allow_tf32 = BACKENDS.cudnn.allow_tf32 = False


def allow_everywhere() -> None:
    BACKENDS.fp32_precision = "tf32"


def allow_one_by_one() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "tf32"
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"


CHOICES = {
    "nothing": lambda: None,
    "old, on": allow_by_the_old_interface,
    "old, off": forbid_by_the_old_interface,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "new, everything": allow_everywhere,
    "new, one by one": allow_one_by_one,
}


@pytest.mark.parametrize("choice", CHOICES)
def test_float32_is_exact_inside_and_the_programs_choice_stays(choice: str) -> None:
    CHOICES[choice]()
    before = readings()
    with true_float32:
        assert {switch.fp32_precision for switch in SWITCHES.values()} == {"ieee"}
    assert readings() == before


def test_a_switch_that_followed_the_one_above_it_still_does() -> None:
    BACKENDS.fp32_precision = "tf32"
    with true_float32:
        pass
    BACKENDS.fp32_precision = "ieee"
    assert BACKENDS.cuda.matmul.fp32_precision == BACKENDS.mkldnn.conv.fp32_precision == "ieee"


def test_the_last_of_several_threads_turns_the_switches_back() -> None:
    allow_everywhere()
    with contextlib.ExitStack() as other:
        with true_float32:
            other.enter_context(true_float32)
        assert BACKENDS.cudnn.conv.fp32_precision == "ieee"
        with pytest.raises(ValueError, match="on the way"), true_float32:
            raise ValueError("on the way")
        assert BACKENDS.cudnn.conv.fp32_precision == "ieee"
    assert BACKENDS.cudnn.conv.fp32_precision == "tf32"


OUT_OF_MEMORY = [
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1 GB, max allowed: 9.07 GB)."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_memory_that_runs_out_has_one_name(error: Exception) -> None:
    with pytest.raises(torch.OutOfMemoryError), memory_errors():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_keep_theirs(error: Exception) -> None:
    with pytest.raises(type(error)) as found, memory_errors():
        raise error
    assert found.value is error


def test_random_numbers_go_on_as_if_nothing_had_been_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of an Apple GPU, which is pretended; and where what is inside fails."""
    state = [torch.tensor([7], dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: state.__setitem__(0, torch.tensor([seed % 256])))
    for name, inside in (("cpu", 7), ("mps", 3)):
        before = torch.random.get_rng_state()
        with contextlib.suppress(KeyError), kept_random_state(torch.device(name)):
            seed_random_numbers(3, torch.device(name))
            assert state[0].item() == inside
            raise KeyError
        assert torch.equal(torch.random.get_rng_state(), before)
        assert state[0].item() == 7


@pytest.mark.parametrize(
    ("device", "cores", "workers", "batch_size"),
    [("cpu", 64, 64, 8), ("cuda", 64, 32, 256), ("cuda", 16, 16, 256), ("mps", 10, 10, 64)],
)
def test_workers_and_batches_of_a_device(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, workers: int, batch_size: int
) -> None:
    monkeypatch.setattr("featcache.system.device.choose_device", lambda name: (torch.device(name), "as asked"))
    monkeypatch.setattr("featcache.system.device.usable_cores", lambda: cores)
    chosen = choose_runtime(device)
    assert (chosen.workers, chosen.batch_size) == (workers, batch_size)
    assert choose_runtime(device, batch_size=3).batch_size == 3
