"""Whatever bytes and texts hypothesis can think of: read, or refused by an error of featcache's own.

In: generated files. Out: no other exception. ``soak`` tries more of the same.
"""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from featcache.cache.cache import FeatureCache
from featcache.cache.hdf5_reader import SIGNATURE
from featcache.errors import CacheError, FeatcacheError, ModelError, RefusedImage, UsageError
from featcache.images.decode import decode_pixels
from featcache.images.source import list_images
from featcache.models.model import load_model
from featcache.spec import Spec
from featcache.system.safe_load import DamagedFile, load_tensors, parse_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
)
SPEC_KEYS = ("backbone", "feature", "preprocess", "precision", "storage", "views", "spec_version")
STARTS = (
    b"",
    SIGNATURE,
    b"\xff\xd8\xff\xe0",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"RIFF\0\0\0\0WEBP",
    b"II*\0",
    b"BM",
    b"P6\n",
)

# The folder is the same for all examples of a test, and each writes its file anew.
few = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
many = settings(few, max_examples=20_000, derandomize=False, phases=[Phase.generate, Phase.shrink])


def json_text(text: str) -> None:
    with contextlib.suppress(ValueError):
        parse_json(text)


def spec(value: Any) -> None:
    with contextlib.suppress(UsageError):
        Spec.from_json(value)


def csv_file(folder: Path, text: str) -> None:
    (folder / "list.csv").write_text(text, errors="surrogatepass")
    try:
        images = list_images(folder / "list.csv")
        assert all(not path.startswith(("/", "..")) for path in images.paths)
    except FeatcacheError:
        pass


def any_file(folder: Path, data: bytes) -> None:
    path = folder / "any.h5"
    path.write_bytes(data)
    with pytest.raises(CacheError):
        FeatureCache.open(path)
    with pytest.raises(DamagedFile):
        load_tensors(path)
    with contextlib.suppress(RefusedImage):
        decode_pixels(data)


def manifest(folder: Path, value: Any) -> None:
    (folder / "model.json").write_text(json.dumps(value))
    with pytest.raises(ModelError):
        load_model(folder)


def try_everything(folder: Path, how: settings) -> None:
    specs = JSON | st.dictionaries(st.sampled_from(SPEC_KEYS), JSON)
    rows = st.text(alphabet='path,label"\n/.\0\\').map("path,label\n".__add__)
    files = st.builds(bytes.__add__, st.sampled_from(STARTS), st.binary(max_size=300))
    for strategy, attempt in (
        (st.text(), json_text),
        (specs, spec),
        (st.text() | rows, functools.partial(csv_file, folder)),
        (files, functools.partial(any_file, folder)),
        (JSON, functools.partial(manifest, folder)),
    ):
        how(given(strategy)(_named(attempt)))()


def _named(attempt: Callable[[Any], None]) -> Callable[[Any], None]:
    def test(value: Any) -> None:  # hypothesis wants a function with a name
        attempt(value)

    return test


def test_no_other_exception(tmp_path: Path) -> None:
    try_everything(tmp_path, few)


@pytest.mark.soak
def test_no_other_exception_at_length(tmp_path: Path) -> None:
    try_everything(tmp_path, many)
