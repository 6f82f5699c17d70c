"""Whatever bytes and texts hypothesis can think of: read, or refused by an error of featcache's own.

In: generated files. Out: no other exception. ``soak`` tries more of the same.
"""

import contextlib
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


def json_text(_: Path, text: str) -> None:
    with contextlib.suppress(ValueError):
        parse_json(text)


def spec(_: Path, value: Any) -> None:
    with contextlib.suppress(UsageError):
        Spec.from_json(value)


def csv_file(folder: Path, text: str) -> None:
    (folder / "list.csv").write_text(text, errors="surrogatepass")
    with contextlib.suppress(FeatcacheError):
        for path in list_images(folder / "list.csv").paths:
            assert not path.startswith("/") and ".." not in path.split("/")


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


@pytest.mark.parametrize("how", [few, pytest.param(many, marks=pytest.mark.soak)], ids=["few", "many"])
def test_no_other_exception(tmp_path: Path, how: settings) -> None:
    specs = JSON | st.dictionaries(st.sampled_from(SPEC_KEYS), JSON)
    rows = st.text(alphabet='path,label"\n/.\0\\').map("path,label\n".__add__)
    files = st.builds(bytes.__add__, st.sampled_from(STARTS), st.binary(max_size=300))
    attempts: tuple[tuple[Any, Callable[[Path, Any], None]], ...] = (
        (st.text(), json_text),
        (specs, spec),
        (st.text() | rows, csv_file),
        (files, any_file),
        (JSON, manifest),
    )
    for strategy, attempt in attempts:
        how(given(st.just(tmp_path), strategy)(attempt))()
