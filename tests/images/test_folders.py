"""Every image below a folder is listed, by its name or by its first bytes; what a system keeps there is not, and that is said."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from featcache.images.folders import holds_an_image, list_folder
from featcache.images.source import list_images

SUFFIXES = ".JPG .Jpeg .HIF .heic .heics .HEIFS .avifs .RAF .DNG .nrw .jxr .jxl .pcx .dib .jif .mpo .psd .EXR .b.raf"
WRITTEN = ["JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "PPM", "WEBP", "JPEG2000", "AVIF", "ICO", "PCX", "DDS"]
# From the formats' definitions.
BYTES = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "HEIC, 10 bits": b"\0\0\0\x1cftypheix\0\0\0\0mif1heix",
    "HEIF, any codec": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic",
    "HEIF sequence": b"\0\0\0\x18ftypmsf1\0\0\0\0msf1hevc",
    "AVIF sequence": b"\0\0\0\x18ftypavis\0\0\0\0avismsf1",
    "CR3": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
    "BigTIFF": b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0",
    "big-endian TIFF": b"MM\0*\0\0\0\x08",
    "ORF": b"IIRO\x08\0\0\0",
    "RW2": b"IIU\0\x08\0\0\0",
    "RAF": b"FUJIFILMCCD-RAW 0201",
    "JPEG XR": b"II\xbc\1\x20\0\0\0",
    "JPEG XL": b"\xff\x0a\xfa\x1f\x40\x8a",
    "JPEG XL in boxes": b"\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG 2000 codestream": b"\xff\x4f\xff\x51\0\x29",
    "PSD": b"8BPS\0\1\0\0\0\0\0\0\0\3",
    "OpenEXR": b"v/1\1\2\0\0\0",
    "QOI": b"qoif\0\0\0\x10",
    "PBM with a remark": b"P4\n# by hand\n8 8\n",
    "PFM": b"PF\n8 8\n-1.0\n",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg">',
}
OTHERS = {
    "nothing": b"",
    "a text on cars": b"BMW drives, and P3 is a class of its own here.",
    "a numbered text": b"P3 is a class; II. Chapter two",
    "chapter": b"II* Chapter two",
    "film": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2",
    "Apple's film": b"\0\0\0\x14ftypqt  \0\0\0\0qt  ",
    "MPEG": b"\0\0\1\xba\x44\0\4\0\4\1",
    "sound": b"RIFF\x24\x08\0\0WAVEfmt \x10\0\0\0",
    "font": b"\0\1\0\0\0\x0f\0\x80\0\3\0\x70",
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3",
    "PostScript": b"%!PS-Adobe-3.0\n%%Pages: 9\n",
    "archive": b"PK\3\4\x14\0\0\0\x08\0",
    "page": b"<!DOCTYPE html><html>",
    "lines": b"\n\n\n\n\n\n\n\n",
    "UTF-16": "\ufeffnotes".encode("utf-16-be"),
}


def written(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 199)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("suffix", SUFFIXES.split())
def test_an_images_suffix_is_enough(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"photo{suffix}").write_bytes(b"anything")
    assert list_images(tmp_path).paths == (f"photo{suffix}",)


@pytest.mark.parametrize("name", ["bare", "IMG_0001.HEIC.download", "photo.jpg~"])
def test_first_bytes_are_enough(tmp_path: Path, name: str) -> None:
    for kind, data in {**{kind: written(kind) for kind in WRITTEN}, **BYTES}.items():
        (tmp_path / name).write_bytes(data)
        assert list_images(tmp_path).paths == (name,), kind
    (tmp_path / "image.png").write_bytes(written("PNG"))
    for kind, data in OTHERS.items():
        (tmp_path / name).write_bytes(data)
        assert list_images(tmp_path).paths == ("image.png",), kind


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_that_takes_the_place_of_a_file_holds_up_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "bare")  # to open it waits for somebody who writes
    assert not holds_an_image(tmp_path / "bare")


def test_what_systems_keep_is_no_class_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "featcache")
    system = [
        "@eaDir",
        "#recycle",
        "@Recycle",
        "lost+found",
        "__MACOSX",
        "__pycache__",
        ".thumbnails",
        ".@__thumb",
        ".Trash-1000",
    ]
    system += ["System Volume Information", "$RECYCLE.BIN"]
    for folder in ("cat", "dog", "cat/@eaDir/0.png", "cat/.AppleDouble", *system):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.jpg").touch()
    for name in ("cat/._0.jpg", "cat/notes.txt", "dog/notes.TXT", "dog/README"):
        (tmp_path / name).write_text("no image")
    images = list_images(tmp_path)
    assert (images.classes, images.paths) == (("cat", "dog"), ("cat/0.jpg", "dog/0.jpg"))
    assert list_images(tmp_path, labelled=False).paths == images.paths
    assert [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()] == 2 * [
        f"{tmp_path}: passed over hidden or system files and folders: 14 (#recycle, $RECYCLE.BIN, .@__thumb and 10 more); "
        "files that are no images: 3 (.txt, README)"
    ]


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda red: (red / "1.jpg").unlink(), {}),
        (lambda red: (red / "1.jpg").rename(red / "2.jpg"), {}),  # by its new name it is for the next run
        (lambda red: red.rename(red.with_name(".old")) and red.touch(), {"red/0.jpg": 20, "red/1.jpg": 20}),
    ],
    ids=["removed", "renamed", "cannot be reached"],
)
def test_what_changes_while_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change, refused) -> None:
    """Each is one that is there, one that is not, or is refused with what the system says; the others are listed."""
    for name in ("blue/0.jpg", "red/0.jpg", "red/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scandir = os.scandir

    @contextlib.contextmanager
    def scan(folder: str) -> Iterator[list["os.DirEntry[str]"]]:
        with scandir(folder) as entries:
            found = list(entries)
        if str(folder).endswith("red/"):
            change(tmp_path / "red")
        yield found

    monkeypatch.setattr(os, "scandir", scan)
    found = list_folder(tmp_path, labelled=True, class_level=None)
    assert dict(found.refused) == {path: f"cannot be read: {os.strerror(code)}" for path, code in refused.items()}
    left = [path for path in ("red/0.jpg", "red/1.jpg") if (tmp_path / path).exists()]
    assert [entry.path for entry in found.entries] == ["blue/0.jpg", *left] and found.classes == {"blue", "red"}
