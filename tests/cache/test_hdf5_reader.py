"""Only plain datasets are read: nothing that h5py would follow to another place. More of it in ``tests/attacks``."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from caches import make_cache

from featcache.cache.cache import FeatureCache
from featcache.errors import CacheError


def replace_features(path: Path, kind: str) -> None:
    """Put something else in the place of ``features`` that h5py would happily follow."""
    secret = path.with_name("secret.h5")
    with h5py.File(secret, "w") as file:
        file["features"] = np.zeros((50, 8), np.float16)
    with h5py.File(path, "r+") as file:
        del file["features"]
        if kind == "external link":
            file["features"] = h5py.ExternalLink(secret.name, "/features")
        elif kind == "soft link":
            file["other"] = np.zeros((50, 8), np.float16)
            file["features"] = h5py.SoftLink("/other")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((50, 8), np.float16)
            layout[:] = h5py.VirtualSource(secret, "features", (50, 8))
            file.create_virtual_dataset("features", layout)
        elif kind == "external storage":
            file.create_dataset("features", (50, 8), np.float16, external=[(secret.name, 0, h5py.h5f.UNLIMITED)])
        elif kind == "compressed":
            file.create_dataset("features", data=np.zeros((50, 8), np.float16), compression="gzip")
        elif kind == "wrong type":
            file["features"] = np.zeros((50, 8), np.int16)
        elif kind == "wrong shape":
            file["features"] = np.zeros((50, 8, 1), np.float16)
        elif kind == "group":
            file.create_group("features")
        elif kind == "huge":
            file.create_dataset("features", (10**9, 8), np.float16)


@pytest.mark.parametrize(
    "kind",
    [
        "external link",
        "soft link",
        "virtual",
        "external storage",
        "compressed",
        "wrong type",
        "wrong shape",
        "group",
        "huge",
        "none",
    ],
)
def test_storage_outside_the_file_is_never_followed(tmp_path: Path, kind: str) -> None:
    make_cache(tmp_path / "f.h5")
    replace_features(tmp_path / "f.h5", kind)
    with pytest.raises(CacheError, match="refused|damaged"):
        FeatureCache.open(tmp_path / "f.h5")
