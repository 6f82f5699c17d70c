"""Caches made by somebody who means harm: refused with a reason, quickly, in little memory, reading nothing else.

In: good caches, changed through h5py or byte by byte, checksums set right where that is possible.
"""

import hashlib
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from caches import plain_rows
from conftest import SPEC
from hostile import NO_JSON, watched
from PIL import Image
from test_mutated_caches import write_shape

import featcache
from featcache.cache import format as cache_format
from featcache.cache.cache import FeatureCache
from featcache.cache.write import write_cache
from featcache.errors import CacheError, DamagedCacheError, FeatcacheError
from featcache.images.home import find_home
from featcache.reports.elements.pictures import Pictures
from featcache.spec import Spec, canonical_json


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_shape(tmp_path / "f.h5", 4)
    return tmp_path / "f.h5"


def reseal(path: Path, **texts: str) -> None:
    """Another spec or provenance in a well-formed cache, every checksum right."""
    with h5py.File(path, "r+") as file:
        file.attrs.update(texts)
        spec, provenance = file.attrs["spec"], file.attrs["provenance"]
        file.attrs["fingerprint"] = hashlib.sha256(spec.encode()).hexdigest()
        columns = {name: file[name][()] for name, _, _ in cache_format.COLUMNS}
        file.attrs["metadata_crc32"] = cache_format.metadata_checksum(columns, (spec, provenance))
        file.attrs["column_crc32"] = cache_format.column_checksums(columns, provenance)


def refused(path: Path, words: str) -> str:
    """Open ``path``, which must be refused: at once, by its name, and without opening anything but the file itself."""
    started = time.perf_counter()
    with watched() as seen, pytest.raises(CacheError, match=words) as error:
        FeatureCache.open(path)
    assert time.perf_counter() - started < 5
    assert {entry for entry in seen if "/proc/meminfo" not in entry and "cgroup" not in entry} <= {f"open {path}"}
    assert "\n" not in str(error.value)
    return str(error.value)


def test_libhdf5_never_sees_a_cache_that_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loops and overflows, plugins and external files are then nobody's concern."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("libhdf5 opens the file")

    monkeypatch.setattr(h5py, "File", fail)
    monkeypatch.setattr(h5py.h5f, "open", fail)
    cache = FeatureCache.open(path)
    assert cache.verify() == []
    assert len(cache.X) == len(cache) == 40


# ------------------------------------------------------------------------------------------ what h5py itself can write


Change = Callable[[h5py.File], object]


def linked(name: str, target: Any) -> Change:
    """Under ``name`` lies a link, or what has another name, too."""

    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = file[target] if isinstance(target, str) else target

    return change


def made(name: str, *arguments: Any, **options: Any) -> Change:
    """Under ``name`` lies another dataset: shape, type."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, *arguments, **options)

    return change


def soft_link(file: h5py.File) -> None:
    file.move("labels", "other")
    file["labels"] = h5py.SoftLink("/other")


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(file["labels"].shape, "<i4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", file["labels"].shape)
    del file["labels"]
    file.create_virtual_dataset("labels", layout)


def plugin(file: h5py.File) -> None:  # a filter that libhdf5 would look for in HDF5_PLUGIN_PATH
    values = file["labels"][()]
    del file["labels"]
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((len(values),))
    creation.set_filter(h5py.h5z.FILTER_DEFLATE, h5py.h5z.FLAG_OPTIONAL, (1,))
    space = h5py.h5s.create_simple(values.shape)
    dataset = h5py.h5d.create(file.id, b"labels", h5py.h5t.STD_I32LE, space, creation)
    dataset.write_direct_chunk((0,), b"xxxx")


PLAIN = "is not a plain contiguous dataset of the expected type"
NO_LINK = "is missing or a link to somewhere else|a group is missing, or of a kind"
DATASETS: dict[str, tuple[Change, str]] = {
    "external link": (linked("paths", h5py.ExternalLink("/etc/passwd", "/paths")), NO_LINK),
    "soft link": (soft_link, "labels is missing or a link to somewhere else"),
    "virtual": (virtual, PLAIN),
    "external storage": (made("digests", (40, 32), "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]), PLAIN),
    "gzip bomb": (made("labels", (2**33,), "i4", chunks=(2**20,), compression="gzip"), PLAIN),
    "shape bomb": (made("digests", (2**40, 32), "u1"), "digests is larger than the file"),
    "shape overflow": (made("digests", (2**62, 32), "u1"), "digests is larger than the file"),  # 0 in 64 bits
    "filter": (plugin, PLAIN),
    "vlen": (made("paths", (40,), h5py.string_dtype()), PLAIN),
    "vlen arrays": (made("paths", (40,), h5py.vlen_dtype("i4")), PLAIN),
    "references": (made("paths", (40,), h5py.ref_dtype), PLAIN),
    "compound": (made("paths", (40,), [("a", "i4"), ("b", "S3")]), PLAIN),
    "opaque": (made("paths", (40,), h5py.opaque_dtype("M8[s]")), PLAIN),
    "enum": (made("paths", (40,), h5py.enum_dtype({"A": 1}, "i4")), PLAIN),
    "cycle of groups": (linked("refused", "/"), "refused/(paths|reasons) is missing"),
    "features that are paths": (linked("features", "paths"), PLAIN),
    "a crowd": (
        lambda file: [file.create_group(f"group{k}") for k in range(3000)],
        "index never ends|not inside the file",
    ),
}


def object_pointer(file: h5py.File) -> None:
    """h5py takes the tag's word for it that these bytes are a Python object's address, and follows it."""
    kind = h5py.h5t.create(h5py.h5t.OPAQUE, 8)
    kind.set_tag(b"NUMPY:|O")
    del file.attrs["format"]
    attribute = h5py.h5a.create(file.id, b"format", kind, h5py.h5s.create(h5py.h5s.SCALAR))
    attribute.write(np.frombuffer(b"AAAAAAAA", "V8").reshape(()), kind)


def attribute(name: str, value: Any, dtype: Any = None) -> Change:
    return lambda file: file.attrs.create(name, value, dtype=dtype)  # in place of the one that is there


VLEN = np.array([np.arange(3, dtype="i4"), np.arange(2, dtype="i4")], object)
ATTRIBUTES: dict[str, tuple[Change, str]] = {
    "object pointer": (object_pointer, "another program"),
    "format, list": (attribute("format", ["featcache", "x"]), "another program"),
    "spec, vlen numbers": (attribute("spec", VLEN, h5py.vlen_dtype("i4")), "damaged"),
    "spec, reference": (attribute("spec", h5py.Reference(), h5py.ref_dtype), "damaged"),
    "spec, huge": (attribute("spec", "x" * 10**7), "spec does not match its fingerprint"),
    "spec, compound": (attribute("spec", np.zeros((), [("a", "i4")])), "damaged"),
    "version, text": (attribute("format_version", "one"), "damaged"),
    "version, huge": (attribute("format_version", 2**64 - 1), "format version 18446744073709551615"),
    "version, none": (attribute("format_version", h5py.Empty("i4")), "damaged"),
    "checksums, 60 KB": (attribute("features_crc32", np.zeros(15000, "u4")), "checksums are incomplete"),
    "rows_per_checksum": (attribute("rows_per_checksum", -1), "checksums are incomplete"),
    "many": (lambda file: [file.attrs.create(f"a{k}", k) for k in range(400)], "does not hold together|damaged"),
}


@pytest.mark.parametrize("kind", [*DATASETS, *ATTRIBUTES])
def test_what_is_not_plain_is_refused(path: Path, kind: str) -> None:
    change, words = (DATASETS | ATTRIBUTES)[kind]
    with h5py.File(path, "r+") as file:
        change(file)
    refused(path, words)


def test_a_user_block_is_not_read_past(path: Path) -> None:
    path.write_bytes(bytes(512) + path.read_bytes())
    refused(path, "is not an HDF5 file")


# ------------------------------------------------------------------------------------- what only an editor of bytes can


def numbers(mark: bytes, offset: int, form: str, *values: int) -> Callable[[bytearray], None]:
    """Other numbers behind the first ``mark`` of a file."""
    return lambda data: struct.pack_into(form, data, data.find(mark) + offset, *values)


def endless_header(data: bytearray) -> None:  # the root's header continues in itself
    root = struct.unpack_from("<Q", data, 64)[0]
    struct.pack_into("<QQ", data, root + 24, root + 16, 24)


def endless_index(data: bytearray) -> None:  # a B-tree node that is its own child
    tree = data.find(b"TREE")
    struct.pack_into("<Q", data, tree + 32, tree)


SUPERBLOCK = b"\x89HDF"
BYTES = {
    "endless header": (endless_header, "does not hold together|damaged"),
    "endless index": (endless_index, "index never ends|names do not hold together"),
    "wide index": (numbers(b"TREE", 6, "<H", 65535), "not inside the file"),
    # an object of no size: libhdf5 2.0 never comes past it
    "endless heap": (numbers(b"GCOL", 16, "<HHIQ", 9, 0, 0, 0), "a text is lost|another program|does not match"),
    # libhdf5 copies the object, whatever room was made for the text
    "text beyond its object": (numbers(b"GCOL", 24, "<Q", 4000), "a text is lost"),
    "huge heap": (numbers(b"GCOL", 8, "<Q", 2**62), "not inside the file"),
    "moved base": (numbers(SUPERBLOCK, 24, "<Q", 512), "superblock"),
    # "family" and "multi" files open further files by name
    "other driver": (numbers(SUPERBLOCK, 48, "<Q", 96), "superblock"),
    "newer superblock": (numbers(SUPERBLOCK, 8, "<B", 3), "superblock"),
}


@pytest.mark.parametrize("kind", BYTES)
def test_structures_that_deceive_are_refused(path: Path, kind: str) -> None:
    change, words = BYTES[kind]
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    refused(path, words)


def test_a_hole_of_terabytes_is_not_read_into_memory(path: Path) -> None:
    """A sparse file costs nothing, its zeros would cost all memory there is."""
    rows = 2**37
    data = bytearray(path.read_bytes())
    shape = struct.pack("<QQ", 40, 40)
    data = data.replace(shape, struct.pack("<QQ", rows, rows))  # every column claims as many, from the file's start on
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(2**43)
    refused(path, "its shape asks for|do not fit into this machine's memory|not a plain")


def test_columns_beyond_memory_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "r+") as file:
        for name, shape, kind in (
            (b"digests", (2**25, 32), h5py.h5t.STD_U8LE),
            (b"sizes", (2**25,), h5py.h5t.STD_I64LE),
            (b"mtimes", (2**25,), h5py.h5t.STD_I64LE),
        ):
            del file[name]
            h5py.h5d.create(file.id, name, kind, h5py.h5s.create_simple(shape), creation)
    monkeypatch.setattr("featcache.cache.cache.available_memory", lambda: 2**30)
    assert path.stat().st_blocks * 512 < 2**24
    refused(path, "1.6 GB of rows do not fit into this machine's memory")


# ------------------------------------------------------------------------------------------------ JSON in attributes


@pytest.mark.parametrize("kind", NO_JSON)
def test_json_that_is_none_is_refused(path: Path, kind: str) -> None:
    for place, words in (("provenance", "damaged"), ("spec", "damaged|cannot be used")):
        write_shape(path, 4)
        reseal(path, **{place: NO_JSON[kind]})
        refused(path, words)


SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "weights elsewhere": ("backbone", {"weights_sha256": "../../../../etc/passwd"}),
    "weights, absolute": ("backbone", {"weights_sha256": "/etc/passwd"}),
    "weights, NUL": ("backbone", {"weights_sha256": "\0" * 64}),
    "weights, number": ("backbone", {"weights_sha256": 7}),
    "name, list": ("backbone", {"name": ["resnet18"]}),
    "no whole pixels": ("preprocess", {"resize": 40.5}),
    "yes as a size": ("preprocess", {"resize": True}),
    "huge": ("preprocess", {"resize": 10**30}),
    "crop of three": ("preprocess", {"crop": [32, 32, 32]}),
    "mean of words": ("preprocess", {"mean": ["a", "b", "c"]}),
    "mean beyond floats": ("preprocess", {"mean": [10**400, 0, 0]}),
    "no filter": ("preprocess", {"interpolation": ["bilinear"]}),
}


@pytest.mark.parametrize("kind", SPECS)
def test_a_spec_that_asks_for_harm_is_refused(path: Path, kind: str) -> None:
    spec = FeatureCache.open(path).spec.to_json()
    part, changes = SPECS[kind]
    reseal(path, spec=canonical_json(spec | {part: spec[part] | changes}))
    refused(path, "cannot be used: ")


def test_a_cache_may_be_a_link_that_the_user_names(path: Path) -> None:
    link = path.with_name("link.h5")
    link.symlink_to(path)
    assert len(FeatureCache.open(link)) == 40


@pytest.mark.parametrize("name", ["/dev/zero", "/proc/self/mem", "/dev/stdin", "/etc"])
def test_devices_are_no_caches(name: str) -> None:
    with pytest.raises(CacheError, match="is a pipe, socket or device|cannot be read|is a folder|not an HDF5 file"):
        FeatureCache.open(name)


def test_checksums_alone_prove_nothing_about_shapes(path: Path) -> None:
    """Every checksum right, and yet one column too long."""
    with h5py.File(path, "r+") as file:
        values = file["sizes"][()]
        del file["sizes"]
        file["sizes"] = np.append(values, 1)
    reseal(path)
    refused(path, "differ in length")


def test_a_forged_checksum_of_features_is_of_no_use_for_others(path: Path) -> None:
    """Features under another number of rows per checksum are checked by that number, or not used at all."""
    with h5py.File(path, "r+") as file:
        file.attrs["rows_per_checksum"] = 20
        file.attrs["features_crc32"] = np.array([zlib.crc32(file["features"][:20].tobytes()), 0], np.uint32)
    with pytest.raises(DamagedCacheError, match="20-39"):
        FeatureCache.open(path).check_features()


def test_what_check_spec_refuses_has_no_traceback() -> None:
    for spec in (None, [], {}, {"backbone": {}}, {"backbone": {"name": 1}, "preprocess": 3}):
        with pytest.raises(FeatcacheError):
            Spec.from_json(spec)


def test_no_path_of_a_cache_leads_out_of_the_folder(tmp_path: Path) -> None:
    """The right bytes, but elsewhere: opened neither by an audit, nor for its page or a report's, nor to find the folder."""
    photos, secret = tmp_path / "photos", tmp_path / "home" / "secret.png"
    secret.parent.mkdir()
    photos.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 8, 3), np.uint8)).save(secret)
    shutil.copy(secret, photos / "a.png")
    digest = hashlib.sha256(secret.read_bytes()).digest()
    names = ["../home/secret.png", str(secret), "b/../../home/secret.png", "a.png"]
    rows = plain_rows(names, digests=np.frombuffer(digest * 4, np.uint8).reshape(-1, 32))
    write_cache(tmp_path / "f.h5", rows, [np.eye(4, 8, dtype=np.float16)], dim=8, spec=SPEC, classes=())
    with watched() as seen:
        found = featcache.audit(tmp_path / "f.h5", tmp_path / "audit", source=photos)
        pictures = Pictures(photos, search=False).thumbnails(names, [digest] * 4, budget=10**6)
        assert find_home([(names[0], digest)], [photos]) is None
    assert [finding.row for finding in found.findings["tiny"]] == [3]
    assert any(note.startswith("3 images were not found unchanged") for note in found.notes)
    assert [each.webp is None for each in pictures] == [True, True, True, False]
    assert not [entry for entry in seen if "secret.png" in entry]
