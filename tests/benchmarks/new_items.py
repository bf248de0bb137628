"""New items under frozen codebooks: does a model recommend items that neither its codebooks nor its training have seen?

    python -m tests.benchmarks.new_items --json recipes/results/semantic_ids/new_items.json

A share of the items is drawn at random and taken out of the shop: out of code training, out of the targets of train and
valid, and out of all histories there (a new item has no past; a row whose history is then empty goes, too). The verb
`tokenize` makes the index of this earlier shop, SFT trains on it with the settings of study `indexes`. Then the items
come back: `semantic_ids.grow_from` gives them codes, and the same weights are evaluated in the complete shop, whose
histories name the new items where users had them. The control differs in one thing: new items have random free codes.

Rows that target a new item come from valid and test (their part of valid has not chosen the checkpoint), the rest from
test. One seed. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.commands.session import started
from tawin_nemo.commands.tokenize import tokenize
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import ITEMS_FILE, Split, load_dataset
from tawin_nemo.data_prep.dataset import Prepared, Step, write_dataset
from tawin_nemo.data_prep.prepare import prepare
from tawin_nemo.eval.evaluate import evaluate
from tawin_nemo.eval.intervals import normal_interval
from tawin_nemo.eval.paired import metric_values, paired_test
from tawin_nemo.run.world import World, build_world
from tawin_nemo.semantic_ids.coder import random_codes
from tawin_nemo.semantic_ids.index_files import read_index, write_index
from tawin_nemo.tools.study.arms import read_study
from tawin_nemo.tools.study.plan import as_override
from tawin_nemo.tools.study.provenance import code_version, hardware
from tawin_nemo.train.start import engine_of
from tawin_nemo.types import ITEM, SPLITS, TokenRows
from tests.benchmarks.harness import REPOSITORY, rounded, table
from tests.benchmarks.setting import shared_folder

RECIPE = REPOSITORY / "recipes" / "industrial_sid_cpu.yaml"
STUDY = REPOSITORY / "recipes" / "studies" / "indexes.yaml"
METRICS = ("recall@1", "recall@3", "ndcg@3", "recall@10", "recall@50")
#: Codes of the new items.
GROWN, RANDOM = "grown", "random free codes"


@dataclass(frozen=True)
class Found:
    """An evaluation of the complete shop: ranks of the targets, and whether each row's target is a new item."""

    rank_B: np.ndarray
    new_B: np.ndarray
    new_of_ten: float  # share of the first ten of all lists that are new items
    listed: int  # new items among all that one exhaustive search returns
    invalid_rate: float


# -- the shop before the new items came ------------------------------------------------------------------------------
def held_out(items: int, share: float, seed: int) -> np.ndarray:
    """Which items are new, bool [I]."""
    chosen_I = np.zeros(items, dtype=bool)
    chosen_I[np.random.default_rng(seed).choice(items, round(share * items), replace=False)] = True
    return chosen_I


def earlier_rows(split: Split, new_I: np.ndarray) -> Split:
    """Rows whose target is not new and whose history holds an item that is not; items counted anew without the new."""
    place_I = np.cumsum(~new_I) - 1
    row_F = np.repeat(np.arange(len(split)), split.history.lengths)
    known_F = ~new_I[split.history.flat]
    left_N = np.bincount(row_F[known_F], minlength=len(split))
    good_N = ~new_I[split.target_N] & (left_N > 0)
    kept_F = known_F & good_N[row_F]
    history = TokenRows(place_I[split.history.flat[kept_F]], np.concatenate([[0], np.cumsum(left_N[good_N])]))
    return Split(split.user_N[good_N], history, place_I[split.target_N[good_N]], split.time_N[good_N])


def write_earlier_shop(root: Path, out: Path, new_I: np.ndarray) -> Path:
    """The prepared folder ``root`` without its new items, in ``out``; external ids stay."""
    dataset = load_dataset(root)
    frame = pl.read_parquet(root / ITEMS_FILE).filter(pl.Series(~new_I))
    frame = frame.with_columns(pl.Series(ITEM, np.arange(frame.height)))
    splits = {name: earlier_rows(getattr(dataset, name), new_I) for name in SPLITS}
    longest = max(int(split.history.lengths.max()) for split in splits.values())
    rows = sum(map(len, splits.values()))
    steps = [Step(f"without {int(new_I.sum())} new items", rows, None, frame.height)]
    name = str(dataset.manifest["name"])
    return write_dataset(Prepared(name, "inter", frame, splits, longest, steps), out, {"without": int(new_I.sum())})


# -- codes -----------------------------------------------------------------------------------------------------------
def make_indexes(work: Path, new_I: np.ndarray, words: Sequence[str], recipe: Path | None) -> dict[str, Path]:
    """Index files ``earlier``, GROWN and RANDOM; they agree about all items that are not new."""

    def made(root: Path, *more: str) -> Path:
        return Path(tokenize(load_recipe(recipe, [*words, f"run_dir={work}", *more]), root)["index"])

    earlier = made(work / "earlier", f"semantic_ids.output={work / 'codes'}")
    grown = made(work / "all", f"semantic_ids.output={work / 'grown'}", f"semantic_ids.grow_from={work / 'codes'}")
    cfg = load_recipe(recipe, [*words]).semantic_ids
    names = load_dataset(work / "all").items.external_ids
    codes_IL = read_index(grown, names).codes_IL
    fresh = random_codes(int(new_I.sum()), levels=cfg.levels, codes=cfg.codes, seed=1, taken=codes_IL[~new_I])
    codes_IL[new_I] = np.pad(fresh, ((0, 0), (0, codes_IL.shape[1] - cfg.levels)), constant_values=-1)
    (work / "items.json").write_text(json.dumps(names))
    write_index(work / "random.index.json", codes_IL)
    return {"earlier": earlier, GROWN: grown, RANDOM: work / "random.index.json"}


# -- training and search ---------------------------------------------------------------------------------------------
def train(work: Path, index: Path, words: Sequence[str], recipe: Path | None) -> Path:
    """SFT in the earlier shop; the stage's folder. A run that was stopped goes on."""
    run_dir = work / "sft_run"
    chosen = [] if recipe is None else ["--recipe", str(recipe)]
    keys = [*words, "rl.enabled=false", "eval.splits=[valid]", f"data.root={work / 'earlier'}",
            f"catalog.index={index.resolve()}", f"run_dir={run_dir}"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "tawin_nemo", "train", *chosen, *keys], check=True, stdout=sys.stderr)
    return run_dir / "sft"


def found_in_the_complete_shop(
    name: str, work: Path, index: Path, new_I: np.ndarray, words: Sequence[str], recipe: Path | None
) -> Found:
    """The weights of the earlier shop among all items, under one index."""
    told = [*words, f"data.root={work / 'all'}", f"catalog.index={index.resolve()}", f"checkpoint={work}/sft_run/sft",
            f"data.tokenizer={work}/sft_run/tokenizer", f"run_dir={work / name.split()[0]}.eval"]  # fmt: skip
    cfg = load_recipe(recipe, told)
    with started(cfg):
        run_dir = Path(cfg.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        return _searched(build_world(cfg, run_dir, work / "all", codes_path=index), new_I)


def _searched(world: World, new_I: np.ndarray) -> Found:
    engine, ranks, news, invalid = engine_of(world), [], [], []
    new_of_ten = []
    for split in ("valid", "test"):
        samples = world.samples[split]
        found = evaluate(engine, samples, world.catalog, world.recipe.eval, dp=world.dp, label=f"evaluate {split}")
        new_B = new_I[samples.target_N]
        used_B = new_B | (split == "test")
        ranks.append(found.per_user["rank"].to_numpy()[used_B])
        news.append(new_B[used_B])
        invalid.append(found.invalid_rate)
        some = samples.prompts.take(np.arange(0, len(samples), 8))
        lists = engine.search(some, min(10, world.catalog.trie.num_leaves)).items_BW.numpy()
        new_of_ten.append(new_I[lists[lists >= 0]].mean())
    everything = engine.search(world.samples["test"].prompts.take(np.arange(1)), world.catalog.trie.num_leaves)
    listed = set(everything.items_BW[0].tolist()) & set(np.flatnonzero(new_I).tolist())
    return Found(np.concatenate(ranks), np.concatenate(news), float(np.mean(new_of_ten)), len(listed), max(invalid))


# -- result ----------------------------------------------------------------------------------------------------------
def lines(found: dict[str, Found]) -> list[dict[str, Any]]:
    """One per arm and group of rows: means with 95 % intervals."""
    result = []
    for arm, one in found.items():
        for group, rows_B in (("new items", one.new_B), ("the rest", ~one.new_B)):
            values = {name: normal_interval(metric_values(name, one.rank_B[rows_B])) for name in METRICS}
            means = {name: [rounded(v.mean), rounded(v.low), rounded(v.high)] for name, v in values.items()}
            result.append({"codes of new items": arm, "rows that target": group, "rows": int(rows_B.sum()), **means})
    return result


def differences(found: dict[str, Found]) -> list[dict[str, Any]]:
    """GROWN minus RANDOM on the same rows."""
    ours, theirs = found[GROWN], found[RANDOM]
    result = []
    for group, rows_B in (("new items", ours.new_B), ("the rest", ~ours.new_B)):
        for name in METRICS:
            test = paired_test(*(metric_values(name, one.rank_B[rows_B])[None] for one in (ours, theirs)))
            span = [rounded(test.difference.low), rounded(test.difference.high)]
            result.append(
                {"rows that target": group, "metric": name, "difference": rounded(test.difference.mean),
                 "interval": span, "p": rounded(test.p), "detectable": rounded(test.detectable)}
            )  # fmt: skip
    return result


def compare(work: Path, new_I: np.ndarray, words: Sequence[str], recipe: Path | None) -> dict[str, Any]:
    """Everything behind the prepared folder ``work/all``."""
    write_earlier_shop(work / "all", work / "earlier", new_I)
    words = [*words, "data.dataset=prepared"]
    indexes = make_indexes(work, new_I, words, recipe)
    begin = time.perf_counter()
    train(work, indexes["earlier"], words, recipe)
    seconds = time.perf_counter() - begin
    found = {
        name: found_in_the_complete_shop(name, work, indexes[name], new_I, words, recipe) for name in (GROWN, RANDOM)
    }
    return {
        "items": len(new_I),
        "new": int(new_I.sum()),
        "reached": {name: one.listed for name, one in found.items()},
        "new_of_ten": {name: rounded(one.new_of_ten) for name, one in found.items()},
        "invalid_rate": {name: one.invalid_rate for name, one in found.items()},
        "rows": lines(found),
        "differences": differences(found),
        "sft_seconds": round(seconds),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=Path("runs/new_items"), help="folder of everything that is made")
    options.add_argument("--share", type=float, default=0.05, help="of the items that are new")
    options.add_argument("--seed", type=int, default=1, help="of the choice of new items, of the codes and of SFT")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file, too")
    options.add_argument("keys", nargs="*", help="recipe keys, e.g. semantic_ids.method=constrained sft.epochs=2")
    given = options.parse_args()
    work = given.work.resolve()
    source = shared_folder("amazon18_industrial")
    prepare("inter", source, work / "all", prepare=PrepareConfig(), data=DataConfig(), seed=0)
    new_I = held_out(len(load_dataset(work / "all").items), given.share, given.seed)
    budget = [as_override(key, value) for key, value in read_study(STUDY).keys.items()]
    words = [*budget, "trainer.threads=1", f"seed={given.seed}", *given.keys]
    result = compare(work, new_I, words, RECIPE)
    print(table(result["rows"]), file=sys.stderr)
    options_given = [
        f"--{name} {getattr(given, name)}"
        for name in ("share", "seed")
        if getattr(given, name) != options.get_default(name)
    ]
    result |= {
        "command": " ".join(["python -m tests.benchmarks.new_items", *options_given, *given.keys]),
        "settings": {"share": given.share, "seed": given.seed, "sft": budget,
                     "semantic_ids": asdict(load_recipe(RECIPE, words).semantic_ids)},
        "commit": code_version(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
    }  # fmt: skip
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
