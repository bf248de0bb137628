"""Study files, run directories and processes for tests: a run is a copied directory, so nothing is trained."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import yaml

from tawin_nemo.eval.evaluate import metric_names
from tawin_nemo.eval.intervals import normal_interval
from tawin_nemo.eval.paired import metric_values
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.tools.study.arms import Study, read_study
from tawin_nemo.tools.study.plan import Plan, Run, make_plan
from tawin_nemo.tools.study.runner import Outcome, Runner
from tawin_nemo.util.files import write_json

#: One arm that two grid points and a plain arm start from.
ARMS = {
    "sft": {"rl.enabled": False},
    "more": {"after": "sft", "rl.enabled": False, "sft.rows": "fresh"},
    "tawin": {
        "after": "sft", "sft.enabled": False, "rl": {"init": "base"},
        "grid": {"rl.tawin.anchor": [0, 1, 2], "rl.tawin.window": ["centred", "start"]},
    },
}  # fmt: skip
KS = (1, 3, 10)
BEAMS = 20


def write_study(folder: Path, **keys: object) -> Path:
    """A study file over a recipe of synthetic data, with results and run directories below ``folder``."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    recipe = {"data": {"dataset": "synthetic"}, "eval": {"beams": BEAMS, "ks": list(KS)}, "rl": {"beta": 0.0}}
    recipe |= {"reference": {"mode": "off"}}
    (folder / "recipes" / "base.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    content = {
        "study": "probe", "recipe": "base.yaml", "seeds": [1, 2], "arms": ARMS,
        "results": str(folder / "results" / "probe"), "run_root": str(folder / "runs" / "probe"), **keys,
    }  # fmt: skip
    path = folder / "recipes" / "probe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def study_of(folder: Path, *overrides: str, **keys: object) -> Study:
    return read_study(write_study(folder, **keys), overrides)


def evaluation(ranks: np.ndarray, sharing: np.ndarray | None = None, *, beams: int = BEAMS) -> EvalResult:
    """The evaluation that these ranks give."""
    users = np.arange(len(ranks))
    sharing_B = np.ones(len(ranks), np.int64) if sharing is None else sharing
    facts = {"row": users, "user": users + 7, "target": users % 5, "rank": ranks, "sharing": sharing_B}
    columns = {name: np.asarray(values, np.int64) for name, values in facts.items()}
    columns["candidates"] = np.full(len(ranks), beams)
    values = {name: metric_values(name, ranks, sharing_B) for name in metric_names(KS)}
    intervals = {name: normal_interval(values_B) for name, values_B in values.items()}
    return EvalResult(
        means={name: interval.mean for name, interval in intervals.items()},
        intervals={name: (interval.low, interval.high) for name, interval in intervals.items()},
        rows=len(ranks), invalid_rate=0.0, collisions=int((sharing_B > 1).sum()), short_rows=0.0, coverage=0.5,
        beams=beams, collision="fractional", per_user=pl.DataFrame({**columns, **values}),
    )  # fmt: skip


def some_ranks(*words: object, rows: int = 200, lift: float = 0.0) -> np.ndarray:
    """Ranks of a policy, the same for the same words; ``lift`` of the rows are hits in addition."""
    rng = np.random.default_rng(zlib.crc32(repr(words).encode()))
    ranks = np.where(rng.random(rows) < 0.3, rng.integers(0, BEAMS, rows), -1)
    return np.where(rng.random(rows) < lift, 0, ranks)


def write_run(folder: Path, stage: str, splits: dict[str, EvalResult], *, wall_s: float = 30.0) -> Path:
    """A finished run directory of one stage."""
    for name, result in splits.items():
        result.write(folder / stage / "eval", name)
    lines = [
        {"step": 0, "valid/loss": 3.0},
        {"step": 1, "train/loss": 2.0, "epoch": 0.5},
        {"step": 2, "train/loss": 1.0},
    ]
    lines += [{"step": 2, "valid/loss": 1.5}]
    (folder / stage / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    write_json(folder / stage / "done.json", {"step": 2, "chosen_step": 2})
    write_json(folder / "summary.json", {"final_stage": stage, "wall_s": wall_s})
    return folder


class FakeTraining:
    """Commands that copy a prepared run directory, or fail, or sleep; remembers what each was started with."""

    def __init__(self, folder: Path, *, rows: int = 200, lift: dict[str, float] | None = None) -> None:
        self.folder, self.rows, self.lift = folder, rows, lift or {}
        self.started: list[tuple[str, str]] = []  # (run, stage it starts from)
        self.failing: set[str] = set()
        self.sleeping: set[str] = set()

    def command(self, run: Run, data: Path, start: Path | None) -> list[str]:
        self.started.append((run.name, "/".join(start.parts[-2:]) if start else ""))
        if run.name in self.failing:
            return ["sh", "-c", f"echo line one; echo 'tawin-nemo train: {run.name} is broken' >&2; exit 2"]
        if run.name in self.sleeping:
            return ["sh", "-c", "trap '' TERM; sleep 30 & wait; sleep 30"]
        stage = "rl" if run.recipe.rl.enabled else "sft"
        lift = self.lift.get(run.arm.base, 0.0)
        splits = {
            split: evaluation(some_ranks(run.name, split, rows=self.rows, lift=lift))
            for split in run.recipe.eval.splits
        }
        made = write_run(self.folder / run.arm.slug / str(run.seed), stage, splits)
        return ["cp", "-r", f"{made}/.", str(run.run_dir)]

    def run(self, study: Study, *, workers: int = 2, plan: Plan | None = None) -> Outcome:
        plan = plan or make_plan(study)
        return Runner(plan, self.command, lambda run: Path("data"), workers=workers, poll=0.01).run()
