"""Memory of the start of training against rows of train: ``python -m tests.benchmarks.prompt_memory --rows 1000000``.

Prepared data with ``--rows`` rows and with a fifth of them are generated first, and not timed. For each size a process
of its own loads the data, makes the samples of all splits, the questions of SFT, the first batch of SFT and the first
of RL: what every rank does before its first step, but for the model. Memory is that of the process alone (RssAnon of
/proc); pages of files that are mapped are shared by all processes of a machine, and are counted apart. The slope is the
difference of the two sizes in MiB per million rows. The process is the first of its machine, which also hashes,
converts and measures; its second start finds the arrays that the first has left beside the data.

``--before DIR`` measures the code of another checkout too. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ITEMS, LONGEST, ROWS_AT_ONCE = 5000, 20, 100_000
WORDS = ["steel", "hex", "bolt", "hose", "3/4", "inch", "pack", "of", "10", "sealant", "gloves", "nitrile", "tape"]


def write_data(folder: Path, rows: int) -> Path:
    """Prepared data: ``rows`` rows of train with 1 to 20 of 5,000 items each, 1,000 rows of valid and of test."""
    folder.mkdir()
    draw = np.random.default_rng(rows)
    titles = [" ".join(draw.choice(WORDS, size=6)) + f" {item}" for item in range(ITEMS)]
    texts = dict.fromkeys(("description", "brand", "category", "price"), [""] * ITEMS)
    names = [f"B{item:06d}" for item in range(ITEMS)]
    pq.write_table(
        pa.table({"item": range(ITEMS), "external_id": names, "title": titles, **texts}), folder / "items.parquet"
    )
    for name, count in (("train", rows), ("valid", 1000), ("test", 1000)):
        _write_split(folder / f"{name}.parquet", count, draw)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.parquet")}
    manifest = {"format": "tawin_nemo.prepared.v1", "name": "bench", "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _write_split(path: Path, rows: int, draw: np.random.Generator) -> None:
    kinds = {"user": pa.int64(), "history": pa.list_(pa.int64()), "target": pa.int64(), "time": pa.int64()}
    schema = pa.schema(list(kinds.items()))
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, rows - first)
            offsets = np.concatenate([[0], np.cumsum(draw.integers(1, LONGEST + 1, size=count))]).astype(np.int32)
            history = pa.ListArray.from_arrays(offsets, draw.integers(0, ITEMS, size=offsets[-1]))
            number = np.arange(first, first + count)
            columns = [number // 5, history, draw.integers(0, ITEMS, size=count), number]
            writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema))


def resident() -> dict[str, float]:
    """Memory of this process alone, and of the files that it maps, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


class Peak:
    """The largest RssAnon while the block runs, looked at every two milliseconds."""

    def __enter__(self) -> Peak:
        self.mib, self._ends = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ends.wait(0.002):
            self.mib = max(self.mib, resident()["RssAnon"])

    def __exit__(self, *unused: object) -> None:
        self._ends.set()
        self._thread.join()


def measure(root: Path, template: str) -> dict[str, float]:
    """Start a training on the data in ``root``: MiB above those of the imports, seconds, microseconds per prompt."""
    from tawin_nemo.config.schema import DataConfig, ModelConfig, Recipe
    from tawin_nemo.data.batches import balanced_shard
    from tawin_nemo.run.world import build_world
    from tawin_nemo.train.plan import plans
    from tawin_nemo.train.rollouts import PromptStream
    from tawin_nemo.train.sft_data import sft_data

    data = DataConfig(dataset="prepared", root=str(root), template=template, max_prompt_tokens=2000)
    recipe, before = Recipe(data=data, model=ModelConfig(backbone="nano")), resident()
    with tempfile.TemporaryDirectory() as run_dir, Peak() as peak:
        begin = time.perf_counter()
        world = build_world(recipe, Path(run_dir), root)
        planned = list(plans(world))
        sft = sft_data(world, planned[0].rows)
        picked = sft.picked(0)
        lengths = sft.lengths_of(picked) if hasattr(sft, "lengths_of") else sft.lengths_N[picked]
        sft.batches(world, balanced_shard(picked, lengths, world.dp))
        train = world.samples["train"]
        stream = PromptStream.of(train, world.train_rows_for_rl, batch_size=64, seed=0, dp=world.dp)
        stream.take()
        seconds, after = time.perf_counter() - begin, resident()
    rows = np.random.default_rng(0).integers(0, len(train), size=(100, 128))
    begin = time.perf_counter()
    for some in rows:
        train.prompts.take(some)
    per_row = (time.perf_counter() - begin) / rows.size * 1e6
    return {
        "mib": after["RssAnon"] - before["RssAnon"], "peak_mib": peak.mib - before["RssAnon"],
        "mapped_mib": after["RssFile"] - before["RssFile"], "seconds": seconds, "us_per_prompt": per_row,
    }  # fmt: skip


def in_process(checkout: Path, root: Path, template: str) -> dict[str, float]:
    """``measure`` by the code of ``checkout``."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--template", template, "--measure", str(root)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env, cwd=checkout)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def slopes(small: dict[str, float], large: dict[str, float], rows: int) -> dict[str, float]:
    """MiB (and seconds) per million rows from the two sizes, and the largest size itself."""
    per_million = {
        f"{name}_per_million_rows": round((large[name] - small[name]) / (rows - rows // 5) * 1e6, 2)
        for name in ("mib", "peak_mib", "mapped_mib", "seconds")
    }
    return per_million | {name: round(value, 2) for name, value in large.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--template", default="compact")
    parser.add_argument("--before", type=Path, help="a checkout of earlier code, measured on the same data")
    parser.add_argument("--measure", type=Path, help="measure the data in this folder in this process")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.template)))
        return
    here = Path(__file__).resolve().parents[2]
    sides = {"first_start": here, "second_start": here} | ({"before": given.before} if given.before else {})
    with tempfile.TemporaryDirectory() as scratch:
        roots = [write_data(Path(scratch) / str(rows), rows) for rows in (given.rows // 5, given.rows)]
        results: dict[str, Any] = {}
        for name, checkout in sides.items():
            results[name] = slopes(*(in_process(checkout, root, given.template) for root in roots), given.rows)
    print(json.dumps({"rows": given.rows, "template": given.template, "cores": os.cpu_count()} | results))


if __name__ == "__main__":
    main()
