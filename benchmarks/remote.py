"""What does it cost to read images out of tar shards in S3, against the same shards on the disk?

    python benchmarks/remote.py FOLDER [--shards 4] [--latency 0.03] [--faults 0.1] [--workers 4] [--images 2000]

The images of FOLDER, again and again until there are so many, are written into tars, on the disk and into moto's server, which runs in
a process of its own. Between it and featcache is a server that lets every request wait for ``--latency`` seconds and fails every so
many of them, as object stores do. All images are listed and then read, not decoded, on ``--workers`` threads. Printed are seconds,
images/s, requests for each image, and the bytes that were sent for each byte of an image: the floor is 1 for listing and reading each.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from facts import machine_facts
from objects import FAULTS, KEYS, Bucket, Request, Server, environment, forwarded, free_port, serving, wait_for

Row = dict[str, Any]


def pack(folder: Path, target: Path, shards: int, images: int) -> int:
    """Write the tars; returns how many bytes the images have."""
    files, total = sorted(path for path in folder.rglob("*.jpg")), 0
    for shard in range(shards):
        with tarfile.open(target / f"train-{shard:03d}.tar", "w") as tar:
            for number in range(shard * images // shards, (shard + 1) * images // shards):
                path = files[number % len(files)]
                tar.add(path, f"{path.parent.name}/{number:06d}.jpg")
                total += path.stat().st_size
    return total


def measure(source: str, workers: int, total: int, server: Server | None) -> Row:
    """List and read."""
    from featcache.images.read import read_images
    from featcache.images.source import list_images

    steps, digest = [], hashlib.sha256()
    before = (0, 0) if server is None else (len(server.requests), server.bytes_sent)
    started = time.perf_counter()
    images = list_images(source, counted=False)
    steps.append((time.perf_counter() - started, *_since(server, before)))
    before = (0, 0) if server is None else (len(server.requests), server.bytes_sent)
    started = time.perf_counter()
    for read in read_images(images, range(len(images)), len, workers=workers):
        assert not read.reason, read.reason
        digest.update(read.digest)
    steps.append((time.perf_counter() - started, *_since(server, before)))
    row: Row = {"source": source.partition(":")[0] if server else "disk", "digest": digest.hexdigest()}
    for what, (seconds, requests, sent) in zip(("list", "read"), steps, strict=True):
        row |= {f"{what}_seconds": seconds, f"{what}_images_per_second": len(images) / seconds}
        row |= {f"{what}_requests_per_image": requests / len(images), f"{what}_bytes_per_byte": sent / total}
    return row


def _since(server: Server | None, before: tuple[int, int]) -> tuple[int, int]:
    return (0, 0) if server is None else (len(server.requests) - before[0], server.bytes_sent - before[1])


def plan_of(latency: float, faults: float) -> Any:
    """What the server between does to each request."""
    chance = random.Random(0)

    def plan(_: Request) -> str | None:
        return chance.choice(FAULTS) if chance.random() < faults else None

    return plan


def show(rows: list[Row]) -> None:
    """The table for people."""
    print(f"{'':22}{'list s':>9}{'read s':>9}{'images/s':>10}{'requests/image':>16}{'bytes/byte: list':>18}{'read':>7}")
    for row in rows:
        requests = row["list_requests_per_image"] + row["read_requests_per_image"]
        sent = f"{row['list_bytes_per_byte']:18.2f}{row['read_bytes_per_byte']:7.2f}" if row["source"] != "disk" else ""
        rate = row["read_images_per_second"]
        print(f"{row['name']:22}{row['list_seconds']:9.2f}{row['read_seconds']:9.2f}{rate:10.0f}{requests:16.4f}{sent}")


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=0.03)
    parser.add_argument("--faults", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    pattern = f"train-{{000..{arguments.shards - 1:03d}}}.tar"
    with tempfile.TemporaryDirectory() as folder:
        target, port = Path(folder), free_port()
        total = pack(arguments.folder, target, arguments.shards, arguments.images)
        moto = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            env=os.environ | KEYS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for(port)
            rows = [measure(str(target / pattern), arguments.workers, total, None) | {"name": "disk"}]
            for name, latency, faults in (
                ("S3", 0.0, 0.0),
                (f"S3, {1000 * arguments.latency:g} ms", arguments.latency, 0.0),
                (f"and {arguments.faults:.0%} faults", arguments.latency, arguments.faults),
            ):
                with serving(forwarded(port), plan_of(latency, faults), latency=latency) as server:
                    os.environ.update(environment(server))
                    bucket = Bucket("bucket", server, port)
                    bucket.create()
                    for path in sorted(target.glob("*.tar")):
                        bucket.put(path.name, path.read_bytes())
                    row = measure(f"s3://bucket/{pattern}", arguments.workers, total, server)
                    rows.append(row | {"name": name, "faults": dict(server.faults)})
        finally:
            moto.terminate()
            moto.wait()
    show(rows)
    same = all(first["digest"] == second["digest"] for first, second in itertools.pairwise(rows))
    print(f"the same bytes in all: {same}")
    print(json.dumps({"rows": rows, "same": same, "image_bytes": total, **machine_facts()}))


if __name__ == "__main__":
    main()
