"""Files of the Hugging Face hub: from its local cache, or downloaded. Named files only, and none of them is run.

In: a repository's name and a file's. Out: where the file lies. A hub that does not answer is given up at once.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from featcache.backbones.backbone import PATIENCE, downloading
from featcache.errors import BackboneError, DownloadError


def fetch(repository: str, file: str, *, name: str) -> Path | None:
    """The file's place on this machine; None if the repository has no such file.

    Args:
        repository: ``OWNER/NAME``. name: of the backbone, for messages.

    Raises:
        BackboneError: there is no such repository.
        DownloadError: the hub does not answer, or not to us, and the file was not downloaded before.
    """
    from huggingface_hub import _CACHED_NO_EXIST, errors, hf_hub_download, try_to_load_from_cache

    with downloading(), offline_if(silence_of(repository)):
        try:
            return Path(hf_hub_download(repository, file, etag_timeout=PATIENCE))
        except errors.LocalEntryNotFoundError as error:
            if try_to_load_from_cache(repository, file) is _CACHED_NO_EXIST:  # it was asked for before
                return None
            reason = f"{file} was not downloaded before, and the hub does not answer"
            raise DownloadError(f"the weights of {name} could not be downloaded ({reason})") from error
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise DownloadError(
                f"the weights of {name} are gated: ask for access at https://huggingface.co/{repository}, then `hf auth login`"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise BackboneError(
                f"the hub has no repository {repository}, or it is private; check the name, or `hf auth login`"
            ) from error
        except Exception as error:  # of the HTTP library that its client is built on
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DownloadError(f"the weights of {name} could not be downloaded ({reason})") from error


def is_repository(text: str) -> bool:
    """Whether ``text`` is of the form ``OWNER/NAME`` that the hub's names have; no path is: ``./x``, ``/x/y``, ``../x``."""
    return bool(re.fullmatch(r"\w[\w-]*/\w[\w.-]*", text)) and ".." not in text


def silence_of(repository: str) -> str:
    """Why the hub does not answer about a repository; empty if it does. Its client repeats every request for minutes."""
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_hf_file_metadata(hf_hub_url(repository, "config.json"), timeout=PATIENCE)
    except errors.HfHubHTTPError:  # an answer
        return ""
    except Exception as error:  # of the HTTP library that its client is built on
        return " ".join(str(error).split()) or type(error).__name__
    return ""


@contextlib.contextmanager
def offline_if(silence: str) -> Iterator[None]:
    """A context in which the hub's client, if the hub is silent, takes what it has downloaded before, or fails at once."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = bool(silence) or before
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
