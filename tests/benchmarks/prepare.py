"""Time and memory of preparing a large raw log: ``python -m tests.benchmarks.prepare --reviews 1000000``.

The log is generated first and not timed; preparing runs in a process of its own so that its peak memory is its own.
The last line on stdout is one JSON object.
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

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import read_manifest
from tawin_nemo.data_prep import synthetic
from tawin_nemo.data_prep.prepare import prepare


def measure(folder: Path) -> dict[str, float]:
    """Prepare the raw files in ``folder``: wall and CPU seconds, peak MiB of this process, number of samples."""
    begin = time.perf_counter()
    out = prepare("amazon", folder, folder / "prepared", prepare=PrepareConfig(), data=DataConfig(), seed=0)
    seconds = time.perf_counter() - begin
    rows = read_manifest(out)["statistics"]["rows"]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),  # of the whole process, imports included
        "peak_rss_mib": round(usage.ru_maxrss / 1024, 1),
        "samples": sum(rows.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reviews", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="measure the raw files in this folder and generate nothing")
    given = parser.parse_args()
    if given.folder:
        print(json.dumps(measure(given.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        users = given.reviews // 8
        synthetic.write_raw(Path(scratch), max(50, users // 3), users, 8.0, seed=1)
        command = [sys.executable, "-m", "tests.benchmarks.prepare", "--folder", scratch]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = {"reviews": given.reviews, "cores": len(os.sched_getaffinity(0))}
    print(json.dumps(result | json.loads(done.stdout.splitlines()[-1])))


if __name__ == "__main__":
    main()
