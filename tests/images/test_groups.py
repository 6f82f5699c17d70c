"""What belongs together: partitions joined, groups of a table joined to paths."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import FeatcacheError
from featcache.images.groups import group_by_name, joined, read_groups
from featcache.images.source import Source


def test_images_without_a_name_stand_alone() -> None:
    assert group_by_name(["b", "", "a", "b", "", "a"]).tolist() == [0, 1, 2, 0, 4, 2]
    assert group_by_name([]).tolist() == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 12)] * 3), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_what_is_joined_is_what_a_search_through_the_graph_reaches(names, seed) -> None:
    random = np.random.default_rng(seed)
    pairs = random.integers(0, len(names), (random.integers(0, 5), 2))
    columns = [[*column] for column in zip(*names, strict=True)]
    found = joined(*(group_by_name([*map(str, column)]) for column in columns), pairs=pairs)
    for start in range(len(names)):
        reached, pending = {start}, [start]
        while pending:
            here = pending.pop()
            near = {k for k in range(len(names)) if any(column[k] == column[here] for column in columns)}
            near |= {a for a, b in pairs.tolist() if b == here} | {b for a, b in pairs.tolist() if a == here}
            near -= reached
            reached |= near
            pending += near
        assert found[start] == min(reached)


def test_a_long_chain_is_joined_at_once() -> None:
    pairs = np.stack([np.arange(99_999), np.arange(1, 100_000)], axis=1)
    assert not joined(np.arange(100_000), pairs=np.random.default_rng(0).permutation(pairs)).any()


PATHS = ("cat/1.jpg", "cat/2 b.jpg", "dog/\u00fc.jpg")


@pytest.mark.parametrize(
    ("rows", "paths"),
    [
        (("cat/1.jpg,a", "cat/2 b.jpg,b", "dog/\u00fc.jpg,a"), PATHS),
        (("./cat/1.jpg,a", "cat\\2 b.jpg,b", " dog//u\u0308.jpg ,a"), PATHS),
        (("photos/cat/1.jpg,a", "photos/cat/2 b.jpg,b", "photos/dog/\u00fc.jpg,a", "x/cat/1.jpg,z"), PATHS),
        (("cat/1.jpg,a", "cat/2 b.jpg,b", "dog/\u00fc.jpg,a"), tuple(f"photos/{path}" for path in PATHS)),
        (("cat/1,a", "cat/2 b,b", "dog/\u00fc,a"), PATHS),
        (("/home/me/cat/1.jpg,a", "/home/me/cat/2 b.jpg,b", "/home/me/dog/\u00fc.jpg,a"), PATHS),
        (("'=1.jpg,a", "'-2.jpg,b", "''@.jpg,a"), ("=1.jpg", "-2.jpg", "'@.jpg")),
    ],
    ids=["as they are", "spellings", "below a folder", "above a folder", "without suffix", "whole paths", "escaped"],
)
def test_paths_are_found_as_people_write_them(tmp_path: Path, rows: tuple[str, ...], paths: tuple[str, ...]) -> None:
    (tmp_path / "t.csv").write_text("file,patient\n" + "\n".join([*rows, "other.jpg,c"]) + "\n")
    table = Source(tmp_path / "t.csv", group_column="patient")
    assert read_groups(table, paths) == ["a", "b", "a"]
    assert read_groups(table, paths[::-1]) == ["a", "b", "a"]
    needed = [True, True, True, False]
    assert read_groups(table, (*paths, "cat/unknown.jpg"), needed=needed) == ["a", "b", "a", ""]
    for four in ((*paths, "cat/unknown.jpg"), ("cat/unknown.jpg", *paths)):
        with pytest.raises(FeatcacheError, match=r"no row for 1 of 4 images \(cat/unknown.jpg\)"):
            read_groups(table, four)
    with pytest.raises(FeatcacheError, match=r"has none of the images: its first path is .*, theirs x/1\.jpg; give"):
        read_groups(table, ("x/1.jpg", "x/2.jpg"))


def test_jsonl_and_semicolons_name_groups_too(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"image": "1.jpg", "site": 3}\n{"image": "2.jpg", "site": null}\n')
    assert read_groups(Source(tmp_path / "t.jsonl", group_column="site"), ["1.jpg", "2.jpg"]) == ["3", ""]
    (tmp_path / "t.csv").write_text("image;site\n1.jpg;north, hill\n2.jpg;\n")
    assert read_groups(Source(tmp_path / "t.csv", group_column="site"), ["1.jpg", "2.jpg"]) == ["north, hill", ""]
