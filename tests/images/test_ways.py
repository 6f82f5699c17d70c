"""The ways in which people write a table or a folder, each with the paths, classes and splits that it says, written by hand."""

import codecs
import csv
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from conftest import write_photo

from featcache.errors import FeatcacheError
from featcache.images.source import Source, list_images
from featcache.spec import SPLITS


class Way(NamedTuple):
    """Files below ``photos/``, among them perhaps a table; what is given as source; what it says: ``path|class|split``."""

    says: str
    text: str | bytes = ""
    source: str = "list.csv"
    options: Mapping[str, Any] = MappingProxyType({})
    files: str = "fox/1.jpg fox/2.jpg owl/3.jpg"


SPLIT = "fox/1.jpg|fox|train fox/2.jpg|fox|val owl/3.jpg|owl|test"
PLAIN = "fox/1.jpg|fox|none fox/2.jpg|fox|none owl/3.jpg|owl|none"
PATHS = "fox/1.jpg|-|none fox/2.jpg|-|none owl/3.jpg|-|none"
TABS = "Path\tSpecies\tSplit\r\nfox/1.jpg\tfox\tTrain\r\nfox/2.jpg\tfox\tVal\r\nowl/3.jpg\towl\tTest\r\n"
FLAT = "1.jpg 2.jpg 3.jpg"
BIRDS = "file_name,species\n1.jpg,fox\n2.jpg,fox\n3.jpg,owl\n"

WAYS = {
    "our own names": Way(SPLIT, "path,label,split\nfox/1.jpg,fox,train\nfox/2.jpg,fox,val\nowl/3.jpg,owl,test\n"),
    "filename,species": Way(PLAIN, "filename,species\nfox/1.jpg,fox\nfox/2.jpg,fox\nowl/3.jpg,owl\n"),
    "capitals, blanks, other words": Way(
        SPLIT, "File Name,CLASS_NAME,Partition\nfox/1.jpg,fox,TRAINING\nfox/2.jpg,fox,valid\nowl/3.jpg,owl,Testing\n"
    ),
    "semicolons, mark, CRLF": Way(
        SPLIT, "\ufeffBild;image;label;set\r\n1;fox/1.jpg;fox;train\r\n2;fox/2.jpg;fox;dev\r\n3;owl/3.jpg;owl;test\r\n"
    ),
    "tabs in a .tsv": Way(SPLIT, TABS, "list.tsv"),
    "bars in a .txt": Way(PLAIN, "photo|breed\nfox/1.jpg|fox\nfox/2.jpg|fox\nowl/3.jpg|owl\n", "list.txt"),
    "Excel's sep=": Way(PLAIN, "sep=;\r\npath;label\r\nfox/1.jpg;fox\r\nfox/2.jpg;fox\r\nowl/3.jpg;owl\r\n"),
    "Excel's sep=TAB": Way(PLAIN, "sep=\t\r\npath\tlabel\r\nfox/1.jpg\tfox\r\nfox/2.jpg\tfox\r\nowl/3.jpg\towl\r\n"),
    "Excel's Unicode text": Way(SPLIT, codecs.BOM_UTF16_LE + TABS.encode("utf-16-le"), "list.txt"),
    "UTF-16 without a mark": Way(SPLIT, TABS.encode("utf-16-be"), "list.tab"),
    "Windows-1252": Way(
        "f\xfcchse/1.jpg|f\xfcchse|none owl/2.jpg|owl|none",
        "file;class\r\nf\xfcchse/1.jpg;f\xfcchse\r\nowl/2.jpg;owl\r\n".encode("cp1252"),
        files="f\xfcchse/1.jpg owl/2.jpg",
    ),
    "Windows paths": Way(PLAIN, "path,label\nfox\\1.jpg,fox\n.\\fox\\2.jpg,fox\nowl\\3.jpg,owl\n"),
    "a data frame's index": Way(PLAIN, ",image_path,target\n0,fox/1.jpg,fox\n1,fox/2.jpg,fox\n2,owl/3.jpg,owl\n"),
    "more columns, quotes, blank rows": Way(
        "fox/1.jpg|fox, red|none fox/2.jpg|-|none owl/3.jpg|NA|none",
        'id,img,"label",by,,\n7,fox/1.jpg,"fox, red","Ann ""A"" B",,\n\n8,fox/2.jpg, ,B,,\n,,,,,\n9,owl/3.jpg,NA,C,,\n',
    ),
    "blanks after commas": Way(PLAIN, 'path, label\nfox/1.jpg, fox\n fox/2.jpg, "fox"\nowl/3.jpg , owl\n'),
    "Kaggle's names without suffix": Way(
        "1.jpg|fox|none 2.jpg|fox|none 3.JPG|owl|none",
        "image_id,breed\n1,fox\n2,fox\n3,owl\n",
        files="1.jpg 2.jpg 3.JPG",
    ),
    "Kaggle's train.csv beside its images": Way(
        "1.jpg|0|none 2.jpg|0|none 3.jpg|10|none",
        "id,label\n1,0\n2,0\n3,10\n",
        options={"root": "train_images"},
        files="train_images/1.jpg train_images/2.jpg train_images/3.jpg",
    ),
    "fastai's is_valid": Way(
        "fox/1.jpg|fox|train fox/2.jpg|fox|val owl/3.jpg|owl|train",
        "name,label,is_valid\nfox/1.jpg,fox,False\nfox/2.jpg,fox,True\nowl/3.jpg,owl,False\n",
    ),
    "no header": Way(PLAIN, "fox/1.jpg,fox\nfox/2.jpg,fox\nowl/3.jpg,owl\n"),
    "no header, with splits": Way(SPLIT, "fox/1.jpg;fox;train\nfox/2.jpg;fox;val\nowl/3.jpg;owl;test\n"),
    "ImageNet's lists": Way(
        "fox/1.jpg|0|none fox/b 2.jpg|0|none owl/3.jpg|1|none",
        "fox/1.jpg 0\nfox/b 2.jpg 0\nowl/3.jpg 1\n",
        "list.txt",
        files="fox/1.jpg fox/b%202.jpg owl/3.jpg",
    ),
    "a path on each line": Way(PATHS, "fox/1.jpg\r\n./fox/2.jpg\r\n\r\nowl/3.jpg", "list.txt"),
    "find -print0": Way(PATHS, "./fox/1.jpg\0./fox/2.jpg\0./owl/3.jpg\0", "-", {"root": "."}),
    "a list on stdin": Way(PATHS, "fox/1.jpg\nfox/2.jpg\nowl/3.jpg\n", "-", {"root": "."}),
    "a table on stdin": Way(PLAIN, "file,label\nfox/1.jpg,fox\nfox/2.jpg,fox\nowl/3.jpg,owl\n", "-", {"root": "."}),
    "JSON lines": Way(
        SPLIT,
        '{"image": "fox/1.jpg", "label": "fox", "split": "train"}\n'
        '{"image": "fox/2.jpg", "label": "fox", "split": "validation", "box": [1, 2]}\n'
        '{"label": "owl", "split": "test", "image": "owl/3.jpg"}\n',
        "list.jsonl",
    ),
    "numbers and null in JSON": Way(
        "fox/1.jpg|7|none fox/2.jpg|-|none owl/3.jpg|10|none",
        '{"path": "fox/1.jpg"   , "class": 7}\n{"path": "fox/2.jpg", "class": null}\n{"path": "owl/3.jpg", "class": 10}\n',
        "list.jsonl",
    ),
    "a table elsewhere": Way(
        PLAIN,
        "path,label\nfox/1.jpg,fox\nfox/2.jpg,fox\nowl/3.jpg,owl\n",
        "../lists/all.csv",
        {"root": "."},
    ),
    "whole paths and addresses of files": Way(
        PLAIN, "path,label\n{root}/fox/1.jpg,fox\nfile://{root}/fox/%32.jpg,fox\nfile://localhost{root}/owl/3.jpg,owl\n"
    ),
    "columns named by options": Way(
        SPLIT,
        "Bild,label,Art,Teil\nfox/1.jpg,5,fox,train\nfox/2.jpg,5,fox,val\nowl/3.jpg,6,owl,test\n",
        options={"path_column": "Bild", "label_column": "art", "split_column": "TEIL"},
    ),
    "folds left out": Way(
        PLAIN,
        "path,label,label_name,set\nfox/1.jpg,0,fox,3\nfox/2.jpg,0,fox,4\nowl/3.jpg,1,owl,3\n",
        options={"label_column": "label_name", "split_column": "none"},
    ),
    "a flat folder": Way("1.jpg|-|none 2.jpg|-|none 3.jpg|-|none", source=".", files=FLAT),
    "class folders": Way(PLAIN, source="."),
    "splits by other names": Way(
        "Testing/fox/1.jpg|fox|test Training/fox/2.jpg|fox|train valid/owl/3.jpg|owl|val",
        source=".",
        files="Testing/fox/1.jpg Training/fox/2.jpg valid/owl/3.jpg",
    ),
    "places with species": Way(
        "north/fox/1.jpg|fox|none south/fox/2.jpg|fox|none south/owl/3.jpg|owl|none",
        source=".",
        options={"class_level": 2},
        files="north/fox/1.jpg south/fox/2.jpg south/owl/3.jpg",
    ),
    "Hugging Face's metadata.csv": Way(
        "1.jpg|fox|none 2.jpg|fox|none 3.jpg|owl|none 4.jpg|-|none", BIRDS, "metadata.csv:.", files=f"{FLAT} 4.jpg"
    ),
    "metadata.csv above split folders": Way(
        "test/1.jpg|fox|test train/2.jpg|fox|train train/3.jpg|owl|train",
        "file_name,label\ntest/1.jpg,fox\ntrain/2.jpg,fox\ntrain/3.jpg,owl\n",
        "metadata.csv:.",
        files="test/1.jpg train/2.jpg train/3.jpg",
    ),
    "metadata.jsonl in a split folder": Way(
        "test/a/1.jpg|-|test train/a/2.jpg|fox|train train/b/3.jpg|owl|train",
        '{"file_name": "a/2.jpg", "text": "a fox", "label": "fox"}\n{"file_name": "b/3.jpg", "text": "", "label": "owl"}\n',
        "train/metadata.jsonl:.",
        {"label_column": "label"},
        files="test/a/1.jpg train/a/2.jpg train/b/3.jpg",
    ),
    "metadata.csv without classes": Way(PLAIN, "file_name,text\nfox/1.jpg,a fox\n", "metadata.csv:."),
}


@pytest.fixture
def stdin(tmp_path: Path) -> Iterator[int]:
    """A file that stands for stdin, as on the command line, where it was read once."""
    before = os.dup(0)
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        os.dup2(file.fileno(), 0)
        yield file.fileno()
    os.dup2(before, 0)
    os.close(before)


def make(way: Way, root: Path, stdin: int) -> Source:
    """Make the files and the table of a way, and say how it is given."""
    for path in way.files.split():
        write_photo(root / path.replace("%20", " "), (1, 2, 3), 1)
    table, _, folder = way.source.partition(":")
    data = way.text.replace("{root}", root.as_posix()).encode() if isinstance(way.text, str) else way.text
    if table == "-":
        os.write(stdin, data)
    elif data:
        (root / table).parent.mkdir(exist_ok=True)
        (root / table).write_bytes(data)
    options = {name: root / value if name == "root" else value for name, value in way.options.items()}
    return Source(Path("-") if table == "-" else root / (folder or table), **options)


def read(source: Source) -> list[str]:
    images = list_images(source)
    names = [*images.classes, "-"]
    rows = zip(images.paths, images.labels.tolist(), images.splits.tolist(), strict=True)
    return [f"{path}|{names[label]}|{SPLITS[split]}" for path, label, split in rows]


@pytest.mark.parametrize("case", WAYS)
def test_what_people_write_is_read(tmp_path: Path, stdin: int, case: str) -> None:
    way = WAYS[case]
    assert " ".join(read(make(way, tmp_path / "photos", stdin))) == way.says


# Names and labels that take quotes in a CSV, and what pandas writes for none.
ODD = {
    "a b/1.jpg": "x, y",
    "c,2.jpg": 'say "hi"',
    "d;3.jpg": "a;b",
    "\xfc4.jpg": "na\xefve",
    "'5.jpg": None,
    "6.jpg": "two\n|lines",
    "7": "'q",
}


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_what_pandas_writes_is_read(tmp_path: Path, separator: str, encoding: str) -> None:
    pandas = pytest.importorskip("pandas")
    for path in ODD:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"\xff\xd8\xff")
    frame = pandas.DataFrame({"Image": [*ODD], "n": range(len(ODD)), "Class": [*ODD.values()]})
    for quoting, index, end in itertools.product((csv.QUOTE_MINIMAL, csv.QUOTE_ALL), (True, False), ("\n", "\r\n")):
        frame.to_csv(
            tmp_path / "list.csv", sep=separator, encoding=encoding, quoting=quoting, index=index, lineterminator=end
        )
        images = list_images(tmp_path / "list.csv")
        labels = [(*images.classes, None)[label] for label in images.labels]
        assert dict(zip(images.paths, labels, strict=True)) == ODD


if __name__ == "__main__":  # the same as a table, for people: python tests/images/test_ways.py
    for name, way in WAYS.items():
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 0)
            try:
                found = " ".join(read(make(way, Path(folder) / "photos", file.fileno())))
            except (FeatcacheError, TypeError) as error:
                found = f"error: {str(error).replace(folder, '')[:150]}"
            print(f"{'ok ' if found == way.says else 'NOT'} | {name} | {found}")
