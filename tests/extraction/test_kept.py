"""Embeddings kept by content: none of another image or spec, none made twice, none lost; damage is made again."""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, make_photos, write_photo

from featcache.backbones.embedder import Embedder
from featcache.cache.cache import FeatureCache
from featcache.cache.write import write_cache
from featcache.errors import SpecMismatchError, StorageError
from featcache.extraction import kept
from featcache.extraction.kept import KeptEmbeddings, Settled, embed_now
from featcache.extraction.request import load_requested
from featcache.images.read import Paths
from featcache.images.source import list_images

RECORD = TINY.record()


@pytest.fixture(scope="module")
def photos_here(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    images = list_images(make_photos(tmp_path_factory.mktemp("photos")))
    return Paths(None, tuple(str(images.root / path) for path in images.paths))


@pytest.fixture(scope="module")
def embedder(photos_here: Paths) -> Embedder:
    return Embedder.prepare(load_requested(TINY, None), photos_here, precision="fp32")


@pytest.fixture(scope="module")
def settled(embedder: Embedder) -> Settled:
    return Settled(embedder.spec(storage="float16"), embedder.backbone.dim)


@pytest.fixture
def expected(photos_here: Paths, embedder: Embedder, settled: Settled) -> Any:
    found, refused = embed_now(photos_here, embedder, settled)
    assert not refused
    return found


class Counting(Embedder):
    """Counts what it is asked to embed."""

    counted = 0

    def embed(self, files: Any, **options: Any) -> Any:
        Counting.counted += len(files.paths)
        return super().embed(files, **options)


@pytest.fixture
def ask(tmp_path: Path, photos_here: Paths, embedder: Embedder, settled: Settled) -> Callable[..., Any]:
    """Ask for some of the photos; afterwards ``ask.made`` is how many were embedded for that."""

    def call(names: Any = photos_here.paths, embedder: Any = lambda: Counting(**vars(embedder))) -> Any:
        before = Counting.counted
        found = KeptEmbeddings(tmp_path).embed(Paths(None, tuple(names)), settled, embedder, RECORD)
        vars(call)["made"] = Counting.counted - before
        return found

    return call


def test_each_content_is_embedded_once(ask: Any, expected: Any, photos_here: Paths, tmp_path: Path) -> None:
    twice = [*photos_here.paths[:5], *photos_here.paths[3:8], photos_here.paths[0]]
    found, refused = ask(twice)
    assert (ask.made, refused) == (8, {})
    np.testing.assert_array_equal(found, expected[[*range(5), *range(3, 8), 0]])
    np.testing.assert_array_equal(ask()[0], expected)
    assert ask.made == len(expected) - 8
    np.testing.assert_array_equal(ask(embedder=None)[0], expected)
    moved = tmp_path / "renamed.jpg"
    moved.write_bytes(Path(photos_here.paths[4]).read_bytes())
    np.testing.assert_array_equal(ask([str(moved)], embedder=None)[0], expected[4:5])


def test_several_at_once_embed_each_content_once(ask: Any, expected: Any) -> None:
    results, before = list[Any](), Counting.counted
    threads = [threading.Thread(target=lambda: results.append(ask()[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for found in results:
        np.testing.assert_array_equal(found, expected)
    assert Counting.counted - before == len(expected)


@pytest.mark.parametrize("share", [0.3, 0.99])
@pytest.mark.parametrize("kind", ["flipped", "cut", "zeros"])
def test_damaged_parts_are_made_again(ask: Any, expected: Any, tmp_path: Path, share: float, kind: str) -> None:
    ask()
    (part,) = tmp_path.glob("*.parts/*.h5")
    data = bytearray(part.read_bytes())
    place = int(share * len(data))
    if kind == "flipped":
        data[place] ^= 0xFF
    elif kind == "cut":
        del data[place:]
    else:
        data[place : place + 4096] = bytes(len(data[place : place + 4096]))
    part.write_bytes(data)
    found, refused = ask()
    np.testing.assert_array_equal(found, expected)
    assert refused == {}


@pytest.mark.parametrize("change", ["spec", "dim", "decoder"])
def test_a_part_of_another_spec_is_never_used(
    ask: Any, expected: Any, tmp_path: Path, settled: Settled, change: str
) -> None:
    """Put where it does not belong, with the very digests that are asked for."""
    ask()
    (path,) = tmp_path.glob("*.parts/*.h5")
    part, dim = FeatureCache.open(path), settled.dim
    spec, provenance = part.spec, part.provenance
    if change == "spec":
        spec = dataclasses.replace(spec, weights_sha256="1" * 64)
    elif change == "dim":
        dim += 1
    else:
        provenance = dataclasses.replace(provenance, decoder=part.provenance.decoder - 1)
    wrong = [np.ones((len(part), dim), np.float16)]
    write_cache(path, part.rows, wrong, dim=dim, spec=spec, provenance=provenance)
    np.testing.assert_array_equal(ask()[0], expected)


def test_another_embedder_is_refused(ask: Any, photos_here: Paths, embedder: Embedder, settled: Settled) -> None:
    other = Settled(dataclasses.replace(settled.spec, weights_sha256="1" * 64), settled.dim)
    with pytest.raises(SpecMismatchError, match="weights_sha256: 111111111111… -> "):
        embed_now(photos_here, embedder, other)
    backbone = dataclasses.replace(embedder.backbone, weights_sha256="1" * 64)
    with pytest.raises(SpecMismatchError, match="fit again"):
        ask(embedder=lambda: dataclasses.replace(embedder, backbone=backbone))
    assert ask()[1] == {}


def test_refusals_have_reasons_and_are_asked_again(ask: Any, photos_here: Paths, tmp_path: Path, expected: Any) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    names = [str(bad), photos_here.paths[0], str(tmp_path / "missing.jpg"), str(bad)]
    found, refused = ask(names)
    assert list(refused) == [0, 2, 3]
    assert refused[0] == refused[3] == "not an image, or of an unsupported format"
    assert "No such file" in refused[2]
    assert np.isnan(found[[0, 2, 3]]).all()
    np.testing.assert_array_equal(found[1], expected[0])
    bad.write_bytes(Path(photos_here.paths[3]).read_bytes())
    np.testing.assert_array_equal(ask(names)[0][0], expected[3])


def test_a_file_that_changes_meanwhile_gets_no_embedding(
    ask: Any, photos_here: Paths, tmp_path: Path, embedder: Embedder
) -> None:
    path = write_photo(tmp_path / "x.jpg", (1, 2, 3), 1)

    def late() -> Embedder:
        write_photo(path, (200, 2, 3), 2)
        return embedder

    found, refused = ask([str(path)], embedder=late)
    assert refused == {0: "changed while it was read"}
    assert np.isnan(found).all()
    found, refused = ask([str(path)], embedder=None)  # what was embedded is kept under its own content
    np.testing.assert_array_equal(found, embed_now(Paths(None, (str(path),)), embedder, _of(embedder))[0])


def _of(embedder: Embedder) -> Settled:
    return Settled(embedder.spec(storage="float16"), embedder.backbone.dim)


def test_interrupted_work_is_kept(ask: Any, embedder: Embedder, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(Embedder):
        def embed(self, files: Any, **options: Any) -> Any:
            for batch in super().embed(files, **options):
                yield batch
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(embedder=lambda: Stops(**vars(embedder)))
    np.testing.assert_array_equal(ask()[0], expected)
    assert ask.made == len(expected) - embedder.runtime.batch_size


def test_many_small_parts_become_one(
    ask: Any, photos_here: Paths, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MAX_SMALL", 2)
    for number, path in enumerate(photos_here.paths[:7]):
        np.testing.assert_array_equal(ask([path])[0], expected[number : number + 1])
    assert len([*tmp_path.glob("*.parts/*.h5")]) <= 3
    np.testing.assert_array_equal(ask(photos_here.paths[:7], embedder=None)[0], expected[:7])


def test_what_a_request_means_is_settled_once(tmp_path: Path, settled: Settled) -> None:
    here = KeptEmbeddings(tmp_path / "deep" / "kept")
    other = Settled(dataclasses.replace(settled.spec, storage="float32"), 7)
    assert here.settle(RECORD, lambda: settled) == settled
    assert here.settle(RECORD, lambda: other) == settled
    assert here.settle(RECORD | {"crop": 40}, lambda: other) == other
    for path in here.folder.glob("*.json"):
        text = path.read_text()
        for damaged in (text.replace("float16", "float32").replace("float32", "float16", 1), text[:50], "{}", "[]", ""):
            path.write_text(damaged)
            again = here.settle(RECORD, lambda: settled), here.settle(RECORD | {"crop": 40}, lambda: other)
            assert again == (settled, other)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="give the cache another folder"):
        KeptEmbeddings(tmp_path / "file").settle(RECORD, lambda: settled)
