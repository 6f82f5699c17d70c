"""Sources that point elsewhere: CSV rows and links that leave the folder, devices, and folders without an end.

In: a folder or list that somebody sent. Out: every row embedded or refused with a reason; nothing outside is opened.
"""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY_FLAGS, make_photos, write_photo
from hostile import watched

from featcache.cache.cache import FeatureCache
from featcache.errors import FeatcacheError, RefusedImage
from featcache.images.read import read_file
from featcache.images.source import Source, list_images
from featcache.models.predict import predict

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """An image that is nobody's business."""
    return write_photo(tmp_path / "home" / "secret.jpg", (1, 2, 3), 0)


@pytest.mark.parametrize(
    "row",
    [
        "../home/secret.jpg",
        "a/../../home/secret.jpg",
        "{home}/secret.jpg",
        "a/../../home/./secret.jpg",
        "link/secret.jpg",
        "/proc/self/environ",
        "/dev/zero",
        "/dev/stdin",
    ],
)
def test_rows_that_leave_the_folder_are_refused_unopened(tmp_path: Path, secret: Path, row: str) -> None:
    folder = make_photos(tmp_path / "photos", each=1)
    (folder / "link").symlink_to(secret.parent)
    (folder / "list.csv").write_text(f"path\nred/00.jpg\n{row.format(home=secret.parent)}\n")
    with watched() as seen:
        images = list_images(folder / "list.csv")
    assert images.paths == ("red/00.jpg",)
    assert [refusal.reason for refusal in images.refused] == ["lies outside of the table's folder or --root"]
    assert not [line for line in seen if "secret" in line or "/proc" in line or "/dev" in line]


def test_links_that_leave_the_folder_are_refused_unopened(tmp_path: Path, secret: Path, run: Run) -> None:
    folder = make_photos(tmp_path / "photos", each=2)
    (folder / "red" / "file.jpg").symlink_to(secret)
    (folder / "red" / "folder").symlink_to(secret.parent)
    (folder / "red" / "zero.jpg").symlink_to("/dev/zero")
    (folder / "red" / "up").symlink_to("..")
    (folder / "red" / "self.jpg").symlink_to("self.jpg")
    with watched() as seen:
        code, _, err = run("extract", folder, "-o", tmp_path / "f.h5", *TINY_FLAGS, "--max-bad", 1)
    assert code == 0, err
    assert not [line for line in seen if "secret" in line or "/dev/zero" in line]
    assert dict(FeatureCache.open(tmp_path / "f.h5").refused) == {
        "red/file.jpg": "link that leaves the source folder",
        "red/folder": "link that leaves the source folder",
        "red/zero.jpg": "link that leaves the source folder",
        "red/up": "link loop",
        "red/self.jpg": "link loop",
    }


def test_a_link_put_in_place_of_a_listed_image_is_still_only_an_image(tmp_path: Path) -> None:
    """What is opened is what the user's folder names at that moment; a device is refused, and never waited for."""
    path = write_photo(tmp_path / "a.jpg", (9, 9, 9), 1)
    path.unlink()
    for target in ("/dev/zero", "/dev/tty", str(tmp_path)):
        path.symlink_to(target)
        with pytest.raises(RefusedImage, match="not a regular file|cannot be read"):
            read_file(path)
        path.unlink()


@pytest.mark.parametrize(
    "text",
    [
        "path,label\n" + "a" * 200_000 + ",x\n",
        'path,label\n"a.jpg,x\n',
        "path,path\na,b\n",
        "path,label,split,extra\na,b,c,d\n",
        "path\n" + "\0\n",
        "\ufeffpath,label\n",
        "path,label\na.jpg,x,y,z\n",
        "path;label\na.jpg;x\n",
        "",
        "\0" * 3_000_000,
        "a.jpg\0" + "b" * 3_000_000,
        "path" + ",label" * 100_000 + "\n",
        "path\n" + ",".join("ab" * 500_000) + "\n",
        "path,label\na.jpg" + ',"x\ny"' * 300_000 + "\n",
        '{"path": ' * 100_000,
        '{"path": "a.jpg", "x": ' + "[" * 10_000 + "]" * 10_000 + "}\n",
        "".join(f'{{"path": "a.jpg", "k{number}": 1}}\n' for number in range(20_000)),
        "sep=;\n",
        "path\nfile://[/a.jpg\nfile:////etc/passwd\nfile:///%00\nfile:///\udce9\n",
        "a\rb.jpg\n",
        " \0",
        '""\n',
        "path\n\\\\server\\share\\a.jpg\n",
    ],
    ids=[
        *(
            "long",
            "open quote",
            "twice",
            "columns",
            "NUL",
            "no rows",
            "fields",
            "semicolons",
            "empty",
            "NULs",
            "long name",
        ),
        *(
            "many labels",
            "many cells",
            "long row",
            "open JSON",
            "deep JSON",
            "many keys",
            "only sep",
            "addresses",
            "return",
            "blank",
            "quotes",
            "share",
        ),
    ],
)
def test_lists_that_are_none_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    try:
        images = list_images(tmp_path / "list.csv")
    except FeatcacheError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 2000
    else:
        assert not len(images) or all(not (tmp_path / path).exists() for path in images.paths)
        assert all(refusal.reason for refusal in images.refused)


@pytest.mark.parametrize("start", [b"", b"path\n", b'path,label\na.jpg,"', b'{"path": "', b"a.jpg\0"])
def test_memory_is_bounded_by_a_row(tmp_path: Path, start: bytes) -> None:
    """A line without an end, and rows without an end, of 64 MB."""
    with (tmp_path / "list.csv").open("wb") as file:
        file.write(start)
        for _ in range(64):
            file.write(b"x" * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(FeatcacheError, match="a row of more than 1,048,576 characters"):
            list_images(tmp_path / "list.csv")
        assert tracemalloc.get_traced_memory()[1] < 24e6
    finally:
        tracemalloc.stop()


ROWS_TOO_LONG = {
    "line": "path\n" + "x" * 1_100_000,
    "lines": "path,label\na.jpg" + ',"x\ny"' * 200_000,
    "name": "a.jpg\n" + "x" * 1_100_000,
    "JSON": '{"path": "a.jpg"}\n{"path": "' + "x" * 1_100_000 + '"}\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("text", ROWS_TOO_LONG.values(), ids=ROWS_TOO_LONG)
def test_a_row_that_is_too_long_is_never_cut(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "list.csv").write_text(text, encoding)
    with pytest.raises(FeatcacheError, match="line [0-9]+: a row of more than 1,048,576 characters"):
        list_images(tmp_path / "list.csv")


@pytest.mark.parametrize(
    "row",
    [
        "'../home/secret.jpg",
        "..\\home\\secret.jpg",
        " ../home/secret.jpg",
        "file:///{home}/secret.jpg",
        "file://localhost{home}/%73ecret.jpg",
        "../home/secret",
        "link/secret",
        "link\\secret.jpg",
    ],
)
def test_other_spellings_lead_nowhere_else(tmp_path: Path, secret: Path, row: str) -> None:
    folder = make_photos(tmp_path / "photos", each=1)
    (folder / "link").symlink_to(secret.parent)
    for name in ("list.csv", "metadata.csv"):
        (folder / name).write_text(f"file_name,label\nred/00.jpg,a\n{row.format(home=secret.parent)},b\n")
    with watched() as seen:
        found = [list_images(folder / "list.csv"), list_images(Source(folder, label_column="label"))]
    for images in found:
        there = [path for path, size in zip(images.paths, images.sizes, strict=True) if size >= 0]
        assert set(there) <= {"red/00.jpg", "blue/00.jpg", "green/00.jpg"}
    assert not [line for line in seen if "secret" in line or "home" in line]


def test_inputs_of_predict_follow_the_same_rules(tmp_path: Path, secret: Path, trained: Path) -> None:
    folder = make_photos(tmp_path / "photos", each=1)
    (folder / "out.jpg").symlink_to(secret)
    (folder / "list.csv").write_text("path\n../home/secret.jpg\nred/00.jpg\n")
    with watched() as seen:
        rows = list(predict(trained / "m", [folder, folder / "list.csv"]))
    reasons = [row.reason for row in rows if row.path.endswith(("out.jpg", "secret.jpg"))]
    assert reasons == ["link that leaves the source folder", "lies outside of the table's folder or --root"]
    assert not [line for line in seen if "secret" in line]


def test_a_name_of_a_program_or_an_address_is_no_source(tmp_path: Path, run: Run) -> None:
    for name in ("http://example.org/photos", "s3://photos", "file:///etc", "|id", "$(id)", "-"):
        code, out, err = run("extract", "--", name, "-o", os.fspath(tmp_path / "f.h5"))
        assert (code, out) == (2 if "-o" in err else 1, ""), (name, err)
        assert not (tmp_path / "f.h5").exists()
