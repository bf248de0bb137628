"""The engines of prepare on one generated log: ``python -m tests.benchmarks.prepare_engines --interactions 1000000``.

The log is the data contract (interactions/ and items/ in Parquet), generated first and not timed. Each engine runs in a
process of its own, so that its peak memory is its own. Files that differ between the engines are an error. The last
line on stdout is one JSON object; ``ratio`` is the second engine over the first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import read_manifest
from tawin_nemo.data_prep.prepare import prepare

PART_ROWS = 1_000_000
YEAR = 365 * 86400


def write_log(root: Path, interactions: int, *, seed: int = 1) -> None:
    """A log of one user for eight interactions and one item for three users; popular items, some ties and duplicates.

    Written in parts of PART_ROWS, so that this process stays small.
    """
    users, items = max(20, interactions // 8), max(20, interactions // 24)
    for folder in ("interactions", "items"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for start in range(0, interactions, PART_ROWS):
        rows = min(PART_ROWS, interactions - start)
        user = rng.integers(users, size=rows)
        item = (items * rng.random(rows) ** 2).astype(np.int64)
        day = rng.integers(2 * YEAR // 86400, size=rows) * 86400
        log = {
            "user_id": pa.array(np.char.add("user-", user.astype(str))),
            "item_id": pa.array(np.char.add("item-", item.astype(str))),
            "timestamp": 1_500_000_000 + np.where(rng.random(rows) < 0.1, day, day + rng.integers(86400, size=rows)),
        }
        pq.write_table(pa.table(log), root / "interactions" / f"part-{start // PART_ROWS:05d}.parquet")
    names = np.arange(items).astype(str)
    texts = {"item_id": np.char.add("item-", names), "title": np.char.add("Stainless steel bolt, model ", names)}
    pq.write_table(pa.table({name: pa.array(text) for name, text in texts.items()}), root / "items" / "all.parquet")


def measure(root: Path, engine: str, memory_gb: float) -> dict[str, Any]:
    """Prepare ``root`` in this process: seconds, CPU seconds (imports included), peak MiB, and what was written."""
    keys = PrepareConfig(engine=engine, memory_limit_gb=memory_gb)
    begin = time.perf_counter()
    out = prepare("parquet", root, root.parent / engine / "data", prepare=keys, data=DataConfig(), seed=0)
    seconds = time.perf_counter() - begin
    usage, manifest = resource.getrusage(resource.RUSAGE_SELF), read_manifest(out)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mib": round(usage.ru_maxrss / 1024, 1),
        "samples": sum(manifest["statistics"]["rows"].values()),
        "files": manifest["files"],
    }


def _run(root: Path, engine: str, memory_gb: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.prepare_engines", f"--folder={root}", f"--engines={engine}"]
    done = subprocess.run([*command, f"--memory-gb={memory_gb}"], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interactions", type=int, default=1_000_000)
    parser.add_argument(
        "--engines", default="polars,duckdb", help="compared in this order; one alone is measured alone"
    )
    parser.add_argument("--memory-gb", type=float, default=1.0, help="prepare.memory_limit_gb")
    parser.add_argument("--folder", type=Path, help="measure one engine on the log in this folder, in this process")
    parser.add_argument("--scratch", type=Path, help="where the log and the results lie meanwhile (default: TMPDIR)")
    given = parser.parse_args()
    engines = given.engines.split(",")
    if given.folder:
        print(json.dumps(measure(given.folder, engines[0], given.memory_gb)))
        return
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        root = Path(scratch) / "log"
        write_log(root, given.interactions)
        results = {engine: _run(root, engine, given.memory_gb) for engine in engines}
    files = [result.pop("files") for result in results.values()]
    if any(other != files[0] for other in files):
        raise SystemExit(f"the engines wrote different files: {files}")
    ratio = {}
    if len(engines) == 2:
        first, second = results.values()
        ratio = {key: round(second[key] / first[key], 3) for key in ("seconds", "cpu_seconds", "peak_rss_mib")}
    setting = {"interactions": given.interactions, "memory_limit_gb": given.memory_gb}
    print(json.dumps(setting | {"cores": len(os.sched_getaffinity(0)), "engines": results, "ratio": ratio}))


if __name__ == "__main__":
    main()
