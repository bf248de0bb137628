"""The verb recommend against the bare engine: what reading, checking, encoding and writing in parts cost.

python -m tests.benchmarks.recommend [--rows N] [--json FILE]

Recipe industrial_sid_cpu with random weights: Industrial's catalog and the histories of its rows, repeated under new
user ids. The bare engine is one call of ``engine.search`` for all prompts, which are encoded before. The verb's side
reads the histories from Parquet, checks them, encodes prompts, searches, and writes lists with checksums. Sides
alternate. --full is 200,000 users, once.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tawin_nemo.commands.recommend import compute, encoded
from tawin_nemo.commands.recommend_job import check_counts, counts_of
from tawin_nemo.commands.session import codes_path, started
from tawin_nemo.config.load import load_recipe
from tawin_nemo.data.history_files import HistoryFiles
from tawin_nemo.eval.top_lists import Allowed
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.run.datasets import prepared_root
from tawin_nemo.run.parts import Parts
from tawin_nemo.run.world import World, build_world
from tawin_nemo.train.start import engine_of
from tawin_nemo.types import TokenRows
from tests.benchmarks.harness import REPOSITORY, Report, Target, in_turn, parser, resident_mib, rounded, this_machine
from tests.benchmarks.setting import shared_folder

ROWS, FULL_ROWS = 2048, 200_000
GOAL = 0.9


def write_histories(world: World, rows: int, file: Path) -> TokenRows:
    """``rows`` users with the histories of the test split, one after the other and again; returns the histories."""
    split = world.dataset.test
    history = split.history.take(np.arange(rows) % len(split))
    names = pa.array(world.catalog.external_ids).take(pa.array(history.flat))
    lists = pa.ListArray.from_arrays(pa.array(history.offsets, type=pa.int32()), names)
    pq.write_table(pa.table({"user_id": np.arange(rows), "item_ids": lists}), file, row_group_size=8192)
    return history


def measure(world: World, folder: Path, rows: int, repeats: int, threads: int, json_file: str) -> None:
    """Time both sides, compare what they found, and print the report."""
    history = write_histories(world, rows, folder / "users.parquet")
    engine = engine_of(world)
    assert isinstance(engine, RolloutEngine)
    recipe, width = world.recipe, min(world.recipe.eval.beams, world.catalog.trie.num_leaves)
    prompts = encoded(world, history).prompts
    out = folder / "lists"

    def bare() -> torch.Tensor:
        return engine.search(prompts, width, token_budget=recipe.eval.token_budget).items_BW

    def verb() -> None:
        shutil.rmtree(out, ignore_errors=True)
        source = HistoryFiles(folder / "users.parquet", world.catalog.external_ids, key="recommend.histories")
        check_counts(counts_of(source, out, world.catalog.fingerprint, keep=True), recipe.recommend)
        parts = Parts(out, source.rows, recipe.recommend.part_rows, "recommend.output")
        compute(world, engine, source, parts, Allowed(world.catalog), parts.share(0, 1))

    before = resident_mib()
    verb()
    grown = resident_mib() - before
    engine.pop_flops()
    found = bare()
    flops = engine.pop_flops().forward_flops(world.shape)
    listed = pq.read_table(out)["item_ids"].to_pylist()
    names = world.catalog.external_ids
    same = np.mean([[names[i] for i in row] == line for row, line in zip(found[:, :10].tolist(), listed, strict=True)])
    timed = in_turn({"engine": bare, "recommend": verb}, repeats=repeats, warm=["engine", "recommend"])
    shapes = {"users": rows, "items": len(names), "beams": width, "rows per part": recipe.recommend.part_rows}
    report = Report("recommend", this_machine(), shapes, {"recipe": "industrial_sid_cpu", "threads": threads})
    report.checks = {"share of equal lists": rounded(float(same)), "MiB resident after the first run": rounded(grown)}
    for name, times in timed.items():
        report.rows.append({"side": name, **times.facts(), "rows_per_s": rounded(rows / times.median)})
    ratio = timed["engine"].median / timed["recommend"].median
    report.targets["rows/s of the bare engine"] = Target.at_least(GOAL, ratio)
    report.unfair += [
        "weights are random; the search of a trained model drops more beams, and is then a smaller part of the time",
        "the bare engine holds all prompts and results in memory, and its prompts are encoded before the clock starts",
    ]
    report.finish(
        ours=timed["recommend"].median, baseline=timed["engine"].median,
        floor=report.machine.floor_seconds(flops=flops), json_file=json_file,
    )  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=0, help=f"users (default: {ROWS}; with --full {FULL_ROWS})")
    given = options.parse_args()
    rows, repeats = given.rows or (FULL_ROWS if given.full else ROWS), 1 if given.full else given.repeats
    with tempfile.TemporaryDirectory(prefix="bench_recommend_") as name:
        words = [f"data.root={shared_folder('amazon18_industrial')}", f"run_dir={name}/run"]
        words += [f"trainer.threads={given.threads}"]
        recipe = load_recipe(REPOSITORY / "recipes" / "industrial_sid_cpu.yaml", words)
        with started(recipe):
            world = build_world(recipe, Path(name) / "run", prepared_root(recipe), codes_path=codes_path(recipe))
            measure(world, Path(name), rows, repeats, given.threads, given.json)


if __name__ == "__main__":
    main()
