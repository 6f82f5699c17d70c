"""The Hugging Face hub, as far as weights need it: are they on this machine already, does it answer, may they be had?

In: the name of a repository. Out: facts, reasons in words, named files; none of these is run. The hub's own client repeats
requests for minutes where nobody answers, and cannot end a look-up of a name: here both end in time.
"""

import contextlib
import io
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from featcache.errors import AccessError, BackboneError, DownloadError

_PATIENCE = 10.0  # seconds without an answer, or a byte, after which there is no network
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@contextlib.contextmanager
def downloading(seconds: float = _PATIENCE) -> Iterator[None]:
    """A context for what a library may download: it gives up when nothing arrives for so long, and prints nothing to stdout.

    torch.hub sets no time limit of its own; the one set here is the process's.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before or seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results
            yield
    finally:
        socket.setdefaulttimeout(before)


def is_repository(text: str) -> bool:
    """Whether ``text`` is of the form ``OWNER/NAME`` that the hub's names have; no path is: ``./x``, ``/x/y``, ``../x``."""
    return bool(re.fullmatch(r"\w[\w-]*/\w[\w.-]*", text)) and ".." not in text


def fetch(repository: str, file: str, *, name: str) -> Path | None:
    """Where a file of ``OWNER/NAME`` lies on this machine, downloaded if need be; None if the repository has no such file.

    name: of the backbone, for messages.

    Raises:
        BackboneError: there is no such repository. AccessError, DownloadError: as ``reaching``.
    """
    from huggingface_hub import _CACHED_NO_EXIST, errors, hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(repository, file)
    if isinstance(known, str):
        return Path(known)
    try:
        with reaching(repository, name=name, file=file):
            return Path(hf_hub_download(repository, file, etag_timeout=_PATIENCE))
    except DownloadError as error:
        cause = error.__cause__
        gone = isinstance(cause, errors.EntryNotFoundError) and not isinstance(cause, errors.LocalEntryNotFoundError)
        # Or was so when it was last asked for.
        if gone or (known is _CACHED_NO_EXIST and not isinstance(error, AccessError)):
            return None
        if isinstance(cause, errors.RepositoryNotFoundError) and not isinstance(cause, errors.GatedRepoError):
            raise BackboneError(
                f"the hub has no repository {repository}, or it is private; check the name, or `hf auth login`"
            ) from error
        raise


@contextlib.contextmanager
def reaching(repository: str, *, name: str, file: str | None = None) -> Iterator[None]:
    """A context in which the weights of the backbone ``name`` come from the hub's cache on this machine, else from the hub.

    repository, file: where they are, as for ``is_held``; weights that are elsewhere have no repository.

    Raises:
        AccessError: the hub refuses them. DownloadError: it does not answer, or whatever else stands in the way.
    """
    held = bool(repository) and is_held(repository, file)
    failure = ask(repository, seconds=_PATIENCE) if repository and not held else None
    try:
        if failure and is_final(failure):  # before a network is built for nothing
            raise failure
        with downloading(), without_hub() if held else contextlib.nullcontext():
            yield
    except Exception as error:  # the hub's client raises a dozen kinds
        if refused := refusal(error, name, repository):
            raise refused from error
        reason = reason_of(error) if error is failure else f"{type(error).__name__}: {reason_of(error)}"
        raise DownloadError(f"the weights of {name} could not be downloaded ({reason})") from error


def is_held(repository: str, file: str | None = None) -> bool:
    """Whether the hub's cache on this machine has the weights of ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.

    file: in which they are; one of the usual names when None.
    """
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    files = [file] if file else _WEIGHTS
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision or None), str) for file in files)


def ask(repository: str, *, seconds: float) -> Exception | None:
    """What stands in the way of a download from ``repository``; None if nothing does. Takes no longer than ``seconds``."""
    found: list[Exception | None] = []

    def request() -> None:
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

        name, _, revision = repository.partition("@")
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision or None), timeout=seconds)
            found.append(None)
        except errors.EntryNotFoundError:  # no such file in a repository that is there
            found.append(None)
        except Exception as error:  # of the HTTP library that its client is built on
            found.append(error)

    # A thread of its own: looking up a name cannot be interrupted, and the time limits of a request add up.
    thread = threading.Thread(target=request, name="featcache-hub", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else TimeoutError(f"no answer within {seconds:g} s")


def is_final(error: Exception) -> bool:
    """Whether no download can follow: there is no network, no hub at its end, or it refuses; else it has said something else."""
    return _status(error) in (0, 401, 403) or _status(error) >= 500


def reason_of(error: Exception) -> str:
    """``error`` in words, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def refusal(error: Exception, name: str, repository: str) -> AccessError | None:
    """How to get the weights of the backbone ``name`` where the hub refuses them; None where ``error`` means something else."""
    from huggingface_hub import constants, errors

    gated = isinstance(error, errors.GatedRepoError)
    if not gated and _status(error) not in (401, 403) and not isinstance(error, errors.RepositoryNotFoundError):
        return None
    page = f"{constants.ENDPOINT}/{repository.partition('@')[0]}"
    what = f"are gated: ask for access at {page}" if gated else f"are refused: see {page}"
    return AccessError(f"the weights of {name} {what}, then run `hf auth login`")


@contextlib.contextmanager
def without_hub() -> Iterator[None]:
    """A context in which the hub's client takes what it has downloaded before, or fails at once."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _status(error: Exception) -> int:
    """The HTTP status of the hub's answer; 0 if there is none."""
    from huggingface_hub import errors

    response = getattr(error, "response", None) if isinstance(error, errors.HfHubHTTPError) else None
    return int(getattr(response, "status_code", 0))
