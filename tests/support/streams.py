"""A stand-in for ``torch.cuda`` that computes on the CPU at once, and tells what a GPU would be free to do too early.

Streams, events and the host keep vector clocks. Every operator that PyTorch runs is noted with the stream it was queued on:
reading what another stream wrote, or writing what another read or wrote, without having waited for it, is a ``RaceError``.
"""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = collections.Counter[str]


class RaceError(AssertionError):
    """Something is used before it is there, or changed while it is used."""


class Stream:
    def __init__(self, cuda: "Cuda", name: str) -> None:
        self.cuda, self.name, self.clock = cuda, name, Clock()

    def wait_stream(self, other: "Stream") -> None:
        self.clock |= other.clock

    def wait_event(self, event: "Event") -> None:
        self.clock |= event.clock

    def record_event(self) -> "Event":
        event = Event(self.cuda)
        event.record(self)
        return event


class Event:
    def __init__(self, cuda: "Cuda", *, blocking: bool = False) -> None:
        self.cuda, self.clock, self.blocking = cuda, Clock(), blocking

    def record(self, stream: Stream) -> None:
        self.clock = Clock(stream.clock)

    def synchronize(self) -> None:
        assert self.blocking, "it spins"
        self.cuda.host.clock |= self.clock


class Graph:
    """Repeats operators on the tensors that they were captured with."""

    def __init__(self, cuda: "Cuda") -> None:
        self.cuda, self.calls, self.replays = cuda, list[tuple[Any, Any, Any, Any]](), 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, arguments, named, result in self.calls:
                for new, old in zip(tree_leaves(function(*arguments, **named)), tree_leaves(result), strict=True):
                    if isinstance(old, torch.Tensor) and new is not old and new.data_ptr() != old.data_ptr():
                        old.detach().copy_(new)

    def pool(self) -> object:
        return self


class Cuda(TorchDispatchMode):
    """Use it as a context around what is to be watched, in one thread."""

    def __init__(self, *, captures: bool = True) -> None:
        super().__init__()
        self.host = self.current = Stream(self, "host")
        self.default, self.captures = Stream(self, "default"), captures
        self.streams, self.graphs = 0, list[Graph]()
        self.capturing: Graph | None = None
        self.written: dict[int, tuple[str, int]] = {}  # address -> who, when
        self.read: dict[int, Clock] = collections.defaultdict(Clock)
        self.kept = list[Any]()  # so that no address comes twice

    def Stream(self, device: object) -> Stream:  # noqa: N802
        self.streams += 1
        return Stream(self, f"stream {self.streams}")

    def Event(self, *, blocking: bool = False) -> Event:  # noqa: N802
        return Event(self, blocking=blocking)

    def CUDAGraph(self) -> Graph:  # noqa: N802
        self.graphs.append(Graph(self))
        return self.graphs[-1]

    def get_rng_state(self, device: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object) -> None:
        torch.set_rng_state(state)

    def current_stream(self, device: object) -> Stream:
        return self.default

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        stream.clock |= self.host.clock  # what is queued comes after what queues it
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Graph, *, stream: Stream, capture_error_mode: str, pool: Any = None) -> Iterator[None]:
        assert pool is None or pool in self.graphs
        assert capture_error_mode == "thread_local"
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        with self.stream(stream):
            self.capturing = graph
            yield
            self.capturing = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.current.clock[self.current.name] += 1
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        inputs = {self.address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        outputs = {self.address(leaf) for leaf in tree_leaves((result, written)) if isinstance(leaf, torch.Tensor)}
        changed = {self.address(value) for value in tree_leaves(written)} | (outputs - inputs)
        for address in inputs - {0}:  # of what is empty
            self.check(self.written.get(address), func)
            self.read[address][self.current.name] = self.current.clock[self.current.name]
        for address in changed - {0}:
            self.check(self.written.get(address), func)
            for who, when in self.read[address].items():
                self.check((who, when), func)
            self.written[address] = self.current.name, self.current.clock[self.current.name]
        if self.capturing:
            self.capturing.calls.append((func, args, kwargs, result))
        return result

    def check(self, use: tuple[str, int] | None, func: Any) -> None:
        if use and self.current.clock[use[0]] < use[1]:
            raise RaceError(f"{func} on {self.current.name} does not wait for {use[0]}")

    def address(self, tensor: torch.Tensor) -> int:
        self.kept.append(tensor)
        return tensor.untyped_storage().data_ptr()
