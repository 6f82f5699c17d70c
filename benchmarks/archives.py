"""What does it cost to read images out of archives instead of files?

    python benchmarks/archives.py FOLDER [--members 200000]

Packs FOLDER as tar, tar.gz, zip and Parquet, lists each, and reads and hashes every image in order on two threads, in seconds of
CPU; the ceiling is the folder itself. Then it looks through a tar and a zip of many small files, and counts the bytes that are kept.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

from facts import machine_facts

from featcache.images.archives import look_through
from featcache.images.read import read_images
from featcache.images.source import list_images


def pack(folder: Path, to: Path) -> dict[str, Path]:
    """The images of ``folder`` in every form."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = list_images(folder)
    files = [(name, (folder / name).read_bytes()) for name in images.paths]
    for name, mode in (("x.tar", "w"), ("x.tar.gz", "w:gz")):
        with tarfile.open(to / name, mode) as archive:
            for path, content in files:
                info = tarfile.TarInfo(path)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    for name, method in (("stored.zip", zipfile.ZIP_STORED), ("deflated.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(to / name, "w", method) as archive:
            for path, content in files:
                archive.writestr(path, content)
    table = pa.table({"image": [{"bytes": content, "path": None} for _, content in files], "label": images.labels})
    pq.write_table(table, to / "x.parquet", row_group_size=100)
    return {
        "folder": folder,
        **{name: to / name for name in ("x.tar", "x.tar.gz", "stored.zip", "deflated.zip", "x.parquet")},
    }


def cpu(work: Callable[[], object]) -> float:
    """Seconds of CPU, the best of three."""
    times = []
    for _ in range(3):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def read_all(source: Path) -> None:
    """List a source and read all of it."""
    images = list_images(source, counted=False)
    refused = [read.reason for read in read_images(images, range(len(images)), len, workers=2) if read.reason]
    assert not refused, refused[0]


def many(to: Path, count: int) -> dict[str, dict[str, float]]:
    """Seconds and kept bytes per member of archives of ``count`` files."""
    with tarfile.open(to / "many.tar", "w") as archive:
        for k in range(count):
            info = tarfile.TarInfo(f"class{k % 100:03}/{k:09}.jpg")
            info.size = 10
            archive.addfile(info, io.BytesIO(bytes(10)))
    with zipfile.ZipFile(to / "many.zip", "w") as packed:
        for k in range(count):
            packed.writestr(f"class{k % 100:03}/{k:09}.jpg", bytes(10))
    found = {}
    for name in ("many.tar", "many.zip"):
        started = time.process_time()
        look_through(to / name)
        seconds = time.process_time() - started
        tracemalloc.start()
        archive_kept = look_through(to / name)
        archive_kept.members = []
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        found[name] = {"us": 1e6 * seconds / count, "kept": kept / count, "peak": peak / count}
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--members", type=int, default=200_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as to:
        forms = pack(given.folder, Path(to))
        count = len(list_images(given.folder))
        rows = {}
        for name, source in forms.items():
            listed = cpu(lambda source=source: list_images(source, counted=False))
            rows[name] = {
                "list_ms": 1e3 * listed,
                "ms_per_image": 1e3 * (cpu(lambda source=source: read_all(source)) - listed) / count,
            }
        print(f"{count} images    CPU ms to list    CPU ms to read and hash an image")
        for name, row in rows.items():
            print(f"{name:14}{row['list_ms']:14.1f}{row['ms_per_image']:24.3f}")
        members = many(Path(to), given.members)
        print(f"{given.members} members    us to list one    bytes kept of one    at the peak")
        for name, row in members.items():
            print(f"{name:14}{row['us']:14.1f}{row['kept']:20.0f}{row['peak']:16.0f}")
    print(json.dumps({"benchmark": "archives", "images": count, "forms": rows, "members": members, **machine_facts()}))


if __name__ == "__main__":
    main()
