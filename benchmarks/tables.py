"""How long do a cache's rows take to and from other programs' files, and does memory grow with them?

    python benchmarks/tables.py [--rows 1000000] [--dim 384] [--folder FOLDER] [--formats parquet npz faiss ...]

A cache of random float16 vectors is written into a temporary folder below FOLDER and thrown away at the end. Each export, and the
import of what it wrote where there is one, runs in a process of its own; measured are its seconds, those of
its cores, and the peak of its resident
memory (VmHWM), less what importing the libraries alone takes. The rows' own columns, held by every open cache, are named beside it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from facts import machine_facts
from out_of_core import peak, write

FORMATS = ("parquet", "npz", "faiss", "fiftyone.json", "labelstudio.json")


def child(cache: Path, output: Path, step: str) -> dict[str, Any]:
    """Run in a process of its own: one step, and measure it."""
    import pyarrow.parquet  # noqa: F401

    from featcache.cache.cache import FeatureCache
    from featcache.extraction.external import import_vectors
    from featcache.reports.tables import export_cache

    imports = peak()
    FeatureCache.open(cache)
    opened = peak()
    started, used = time.perf_counter(), time.process_time()
    if step == "export":
        export_cache(cache, output, force=True)
    else:
        import_vectors(output, output.with_suffix(".h5"), force=True)
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    return {"imports_mb": imports, "opened_mb": opened - imports, "peak_mb": peak() - imports} | spent


def main() -> None:
    """Measure every format, print a table, end with a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--formats", nargs="*", default=["parquet", "npz", "faiss"], choices=FORMATS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        cache, output, step = arguments.child
        print(json.dumps(child(Path(cache), Path(output), step)))
        return
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cache = Path(folder) / "features.h5"
        write(cache, arguments.rows, arguments.dim, 101, 3.0)
        size = cache.stat().st_size / 1e6
        print(f"{arguments.rows:,} rows x {arguments.dim}, {size:,.0f} MB")
        print(f"{'format':18}{'step':8}{'seconds':>9}{'CPU s':>8}{'peak MB':>9}{'of it rows':>11}{'file MB':>9}")
        for name in arguments.formats:
            output = Path(folder) / f"out.{name}"
            for step in ("export", *(["import"] if name in ("parquet", "npz") else [])):
                command = [sys.executable, __file__, "--child", str(cache), str(output), step]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                found |= {"format": name, "step": step, "file_mb": output.stat().st_size / 1e6}
                results.append(found)
                print(
                    f"{name:18}{step:8}{found['seconds']:9.1f}{found['cpu_seconds']:8.1f}{found['peak_mb']:9.0f}{found['opened_mb']:11.0f}"
                    f"{found['file_mb']:9.0f}",
                    flush=True,
                )
            for path in Path(folder).glob("out.*"):
                path.unlink()
    print(json.dumps({"rows": arguments.rows, "dim": arguments.dim, "runs": results} | machine_facts()))


if __name__ == "__main__":
    main()
