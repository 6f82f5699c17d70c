"""The executor that is a Ray cluster. In: ``Work`` and positions, as for any executor. Out: parts, published by Ray's actors.

Ray Data hands out blocks of positions to a pool of actors, each with an ``Embedder`` of its own, and gives a block again when
an actor or its node is lost; progress and retries are Ray's. What is right is the parts' business alone (``executors.py``): no
pixel and no embedding travels through Ray, only positions there and names of parts back.

Every node must see the images and the folder of the output under the same paths, and have this version of featcache; both are
tried before work starts, and again by every actor, since nodes may join later.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np

import featcache
from featcache import errors
from featcache.cache.format import Indices
from featcache.errors import FeatcacheError, RefusedImage, StorageError, UsageError
from featcache.extraction.executors import BLOCK, Published, Work, blocks, run_here
from featcache.images.archives import archive_in
from featcache.images.locations import describe
from featcache.images.remote import Patience
from featcache.system.addresses import address_of
from featcache.system.display import quantity

if TYPE_CHECKING:
    from featcache.backbones.embed import Progress
    from featcache.backbones.embedder import Embedder

log = logging.getLogger("featcache")
_LOCAL = "local"
_PATIENCE = 5.0  # seconds that whoever listens at an address may take
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"  # of HTTP/2, which gRPC speaks: RFC 9113, 3.4
_IMPATIENT = Patience(tries=4, longest=2.0, request=30.0)  # whether a node reaches the images


@dataclasses.dataclass(frozen=True)
class RayExecutor:
    """Embeds on a Ray cluster.

    Attributes:
        address: of the cluster, as ``ray.init`` takes it; ``auto``: the one that runs already (``RAY_ADDRESS``, ``ray start``), else
            a new one of this machine alone, as with ``local``. Where Ray is connected already, that connection is used.
        block: images in a task.
    """

    address: str = "auto"
    block: int = BLOCK

    def check(self) -> None:
        """Raise UsageError if Ray is not installed, or nothing listens at the address. Nothing has been loaded yet."""
        ray, address = _ray(), _named(self.address)
        if address in ("auto", _LOCAL) or ray.is_initialized():
            return
        try:
            _knock(address.removeprefix("ray://"))
        except (OSError, ValueError, OverflowError) as error:
            raise _no_cluster(address, error) from error

    def __call__(self, work: Work, positions: Indices, *, progress: "Progress | None" = None) -> Published:
        """See ``executors.Executor``.

        Raises:
            UsageError: Ray is not installed, has no such cluster, or a node lacks this featcache. StorageError: a node does not see
            the images or the output. Otherwise what a worker raised.
        """
        ray = _ray()
        if not len(positions):
            return Published(work.folder, (), 0.0)
        with _connected(ray, self.address), _token(work) as token:
            nodes = _nodes(ray)
            _check_nodes(ray, nodes, work, token)
            tasks = list(blocks(positions, size=self.block))
            share = _share(nodes, work.device, len(tasks))
            log.info("ray: %s", share.reason)
            with _watched(ray.get_runtime_context().gcs_address):
                return _run(ray, work, tasks, share, token, progress)


class _Share(NamedTuple):
    """Of the cluster, what one actor gets, and how many actors there are."""

    actors: int
    cpus: int
    gpus: int
    reason: str


class _Worker:
    """An actor: prepares its ``Embedder`` for the first block, and keeps it.

    What goes wrong is returned, not raised: Ray would try again.
    """

    def __init__(self, work: Work, token: str) -> None:
        self._work, self._token = work, token
        self._embedder: Embedder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """{"data": (n,) positions} -> {"done": one JSON object}."""
        started, unseen = time.time(), ""
        try:
            if self._embedder is None:
                if unseen := _unseen(self._work, self._token):
                    raise StorageError(unseen)
                self._embedder = self._work.prepare()
                started = time.time()
            found = run_here(self._work, np.asarray(batch["data"], np.intp), embedder=self._embedder)
        except FeatcacheError as error:
            said = f"the Ray node {_ray().util.get_node_ip_address()} {'' if unseen else 'says: '}{error}"
            return {"done": [json.dumps({"error": [type(error).__name__, said]})]}
        return {
            "done": [json.dumps({"names": found.names, "images": len(batch["data"]), "span": [started, time.time()]})]
        }


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError("--executor ray takes Ray; install it: pip install 'featcache[ray]'") from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Ray, quiet; everything is as it was before at the end."""
    with contextlib.redirect_stdout(_Talk(sys.stdout)):
        if ray.is_initialized():
            yield
            return
        handlers = _handlers()
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        try:
            with _environment({"RAY_BACKEND_LOG_LEVEL": "fatal"}), _stderr_into_log():
                _init(ray, address, quiet)
            _restore(handlers)  # Ray's handler of SIGTERM ends the process at once
            yield
        finally:
            ray.shutdown()
            _restore(handlers)


@contextlib.contextmanager
def _watched(address: str, *, pause: float = _PATIENCE) -> Iterator[None]:
    """Say when a cluster's head, HOST:PORT, no longer answers: a minute later Ray ends this process without a word."""
    ended = threading.Event()

    def answers() -> bool:
        with contextlib.suppress(OSError, ValueError, OverflowError):
            _knock(address)
            return True
        return False

    def watch() -> None:
        if answers():  # not where only Ray's client reaches it
            while answers() or answers():
                if ended.wait(pause):
                    return
            if not ended.is_set():
                log.error(
                    "the Ray cluster at %s no longer answers; unless it does within a minute, Ray ends this run: what is finished "
                    "is kept, and the same command goes on from there",
                    address,
                )

    threading.Thread(target=watch, name="featcache-ray", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class _Talk(io.TextIOBase):
    """Stdout for this thread; what others print, which are Ray's telling of lost nodes, goes to the log, for ``-v``."""

    def __init__(self, stdout: TextIO) -> None:
        self._stdout, self._owner = stdout, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._owner:
            return self._stdout.write(text)
        for line in text.splitlines():
            if line.strip() and "[state-dump]" not in line:
                log.debug("ray: %s", line)
        return len(text)

    def flush(self) -> None:
        self._stdout.flush()


def _knock(address: str) -> None:
    """Raise OSError, ValueError, OverflowError unless what listens at HOST:PORT speaks gRPC; of anything else Ray waits for ever."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise ValueError("that has no port")
    with socket.create_connection((host.strip("[]"), int(port)), _PATIENCE) as talk:
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            talk.sendall(_HELLO)
            if talk.recv(9)[3:4] != b"\x04":  # SETTINGS, what every server of HTTP/2 begins with
                raise ValueError("what listens there is not Ray's own port, by default 6379; 8265 is its dashboard")


def _named(address: str) -> str:
    """``auto`` as the environment means it: who sets ``RAY_ADDRESS`` wants that cluster, and no other."""
    return os.environ.get("RAY_ADDRESS") or address if address == "auto" else address


def _no_cluster(address: str, error: Exception) -> UsageError:
    return UsageError(
        f"no Ray cluster answers at {address} ({_first_line(error)}), expected HOST:PORT; start one with `ray start --head`, or "
        "give --ray-address local"
    )


# Of a cluster that is ours alone: Ray's own niceness is 15, and it tells its makers about its use, unless told not to.
_OURS = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def _init(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    address = _named(address)
    try:
        if address == "auto":
            with contextlib.suppress(ConnectionError):
                ray.init(address="auto", **quiet)
                return
        if address in ("auto", _LOCAL):
            with _environment(_OURS):
                ray.init(address=_LOCAL, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        if address in ("auto", _LOCAL):
            why = _first_line(error)
            raise UsageError(f"Ray does not start on this machine ({why}); leave --executor ray out") from error
        raise _no_cluster(address, error) from error


@contextlib.contextmanager
def _stderr_into_log() -> Iterator[None]:
    """What is written to this process's stderr meanwhile, also by what is not Python, goes to the log, for ``-v``."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                log.debug("ray: %s", line)


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """With further variables, for processes that are started meanwhile; what the user set stays."""
    added = {name: value for name, value in more.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, handler)


@contextlib.contextmanager
def _token(work: Work) -> Iterator[str]:
    """The name of a file in the folder of parts, by which a node shows that it sees this very folder."""
    path = work.folder / f".{secrets.token_hex(8)}.tmp"
    try:
        path.touch()
        yield path.name
    except OSError as error:
        raise StorageError(f"cannot write in {work.folder}: {error.strerror or error}") from error
    finally:
        path.unlink(missing_ok=True)


def _nodes(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _unseen(work: Work, token: str) -> str:
    """What this machine does not see of what it needs; empty if nothing."""
    if not (work.folder / token).is_file():
        return f"does not see {work.folder.absolute()}; put the output on a file system that all nodes share, under one path"
    root: Path = work.images.root
    first = root / work.images.paths[0] if len(work.images) else root
    archive = archive_in(first)
    if address_of(first):  # which has not been asked for anything yet
        try:
            describe(archive[0] if archive else first, _IMPATIENT)
        except (FeatcacheError, RefusedImage) as error:
            return f"cannot read the images: {error}; a node has the variables that it was started with, not this command's"
        return ""
    if not (os.path.lexists(first) or archive):
        return f"does not see {root.absolute()}; put the images on a file system that all nodes share, under one path"
    return ""


def _check_nodes(ray: Any, nodes: list[dict[str, Any]], work: Work, token: str) -> None:
    """Raise unless every node sees what it has to and has this featcache."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    first = dataclasses.replace(work, images=work.images.take(np.arange(min(1, len(work.images)))))
    try_it = ray.remote(num_cpus=0)(_try_node)
    tries = {
        node["NodeManagerAddress"]: try_it.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(first, token)
        for node in nodes
    }
    for address, reference in tries.items():
        try:
            version, unseen = ray.get(reference)
        except ray.exceptions.RayError as error:
            raise UsageError(
                f"the Ray node {address} cannot run featcache ({_first_line(error)}); install the same on all nodes"
            ) from error
        if version != featcache.__version__:
            raise UsageError(
                f"the Ray node {address} has featcache {version}, here is {featcache.__version__}; install one"
            )
        if unseen:
            raise StorageError(f"the Ray node {address} {unseen}")


def _try_node(work: Work, token: str) -> tuple[str, str]:
    return featcache.__version__, _unseen(work, token)


def _share(nodes: list[dict[str, Any]], device: str, tasks: int) -> _Share:
    """An actor for each GPU if there are some, else for each node, or for as much of it as the smallest has."""
    resources = [node["Resources"] for node in nodes]
    with_gpu = [found for found in resources if found.get("GPU", 0) >= 1]
    if with_gpu and device in ("auto", "cuda", "cuda:all"):
        cpus = max(1, int(min(found.get("CPU", 1) // found["GPU"] for found in with_gpu)))
        actors, gpus = int(sum(found["GPU"] // 1 for found in with_gpu)), 1
    else:
        usable = [int(found["CPU"]) for found in resources if found.get("CPU", 0) >= 1]
        if not usable:
            raise UsageError("the Ray cluster has no CPUs; add a node that has some")
        cpus, gpus = min(usable), 0
        actors = sum(count // cpus for count in usable)
    actors = min(actors, tasks)
    what = f"{cpus} CPU{'s' if cpus > 1 else ''}" + (" and a GPU" if gpus else "")
    return _Share(actors, cpus, gpus, f"{quantity(len(nodes), 'node')}, {quantity(actors, 'worker')} with {what} each")


def _run(
    ray: Any, work: Work, tasks: list[Indices], share: _Share, token: str, progress: "Progress | None"
) -> Published:
    """Have every block embedded; take results as they come."""
    work = dataclasses.replace(work, workers=work.workers or share.cpus)
    data = ray.data.from_numpy(tasks)
    data = data.map_batches(
        _Worker,
        batch_size=None,
        fn_constructor_args=(work, token),
        compute=ray.data.ActorPoolStrategy(size=share.actors),
        num_cpus=share.cpus,
        num_gpus=share.gpus,
    )
    names, spans, done, total = [], [], 0, sum(map(len, tasks))
    with _quiet(ray):
        if progress:
            progress(0, total, "ray")
        for row in _rows(ray, data):
            found = json.loads(row["done"])
            if "error" in found:
                kind, text = found["error"]
                raise getattr(errors, kind, StorageError)(text)
            names += found["names"]
            spans.append(found["span"])
            done += found["images"]
            if progress:
                progress(done, total, "ray")
    seconds = max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0.0
    return Published(work.folder, tuple(names), seconds)


def _rows(ray: Any, data: Any) -> Iterator[dict[str, Any]]:
    """Of a data set, as they come. Raises FeatcacheError: Ray gives up."""
    try:
        yield from data.iter_rows()
    except ray.exceptions.RayError as error:
        raise FeatcacheError(
            f"the Ray cluster gave up ({_first_line(error)}); what is finished is kept, and the same command goes on from there"
        ) from error


@contextlib.contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Ray Data without bars, and without telling how it goes."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.CRITICAL)  # what it fails of is raised
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        logger.setLevel(before[1])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
