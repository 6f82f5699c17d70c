"""For the tests of archives: files as a tar, a zip, shards or Parquet, written by the libraries that define them."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Files = Mapping[str, bytes]
SETTLED = 1_000_000_000  # seconds: a time that can be trusted


def settle(path: Path) -> Path:
    os.utime(path, (SETTLED, SETTLED))
    return path


def tar(path: Path, files: Files, mode: str = "w", **options: Any) -> Path:
    with tarfile.open(path, mode, **options) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return settle(path)


def zipped(path: Path, files: Files, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return settle(path)


FORMS: dict[str, Callable[[Path, Files], Path]] = {
    "a.tar": tar,
    "a.tar.gz": lambda path, files: tar(path, files, "w:gz"),
    "stored.zip": zipped,
    "deflated.zip": lambda path, files: zipped(path, files, zipfile.ZIP_DEFLATED),
}


def parquet(
    path: Path, images: list[bytes | None], names: tuple[str, ...] = (), *, group: int = 4, **columns: list[Any]
) -> Path:
    """As ``datasets`` writes it, without taking its seconds to import; ``names``: of the classes of a column ``label``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": one, "path": None} for one in images], struct)
    features = {"image": {"_type": "Image"}} | ({"label": {"names": [*names], "_type": "ClassLabel"}} if names else {})
    table = pa.table({"image": image, **columns})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return settle(path)


def read_folder(folder: Path) -> dict[str, bytes]:
    """path -> bytes of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
