"""Reads the files of a run directory into records, on which the report and other readers work."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tawin_nemo.eval.result import EvalResult
from tawin_nemo.util.errors import DataError

#: Stages in the order in which a report lists them; other stage directories follow before rl.
STAGES = ("zero_shot", "sft", "sft_continued", "sft_all")
LAST_STAGE = "rl"
#: Evaluations that a report may show, the first one that exists.
SPLITS = ("test", "valid")


@dataclass(frozen=True, eq=False)
class Series:
    """One scalar over the optimizer steps at which it was logged."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, eq=False)
class StageRecord:
    """One stage directory: its logged scalars, its time, and its evaluation on the report's split if it has one."""

    name: str
    series: dict[str, Series]
    seconds: float  # sum of timings.jsonl, evaluation not included
    steps: int
    result: EvalResult | None


@dataclass(frozen=True, eq=False)
class ReportInput:
    """Everything a report shows. Missing files give empty dicts, missing stages are omitted."""

    run_dir: Path
    recipe: dict[str, Any]  # resolved
    recipe_text: str
    summary: dict[str, Any]
    catalog: dict[str, Any]
    stages: tuple[StageRecord, ...]
    split: str = "test"  # whose results are shown: test, or valid where no stage was evaluated on test

    def setting(self, key: str, default: Any = None) -> Any:
        """The recipe's value of a dotted key, ``default`` where the recipe does not name it."""
        node: Any = self.recipe
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return node

    def stage(self, name: str) -> StageRecord | None:
        """The stage called ``name``, or None if the run has none of that name yet."""
        return next((stage for stage in self.stages if stage.name == name), None)


def load_report(run_dir: Path) -> ReportInput:
    """Read recipe.yaml, summary.json, catalogue.json and every stage directory of a run, finished or not.

    Raises DataError when ``run_dir`` is not a run directory or a file in it is malformed.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise DataError(f"{run_dir} has no recipe.yaml, so it is not a run directory; name one that `train` has made")
    text = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    if not isinstance(recipe, dict):
        raise DataError(f"{run_dir / 'recipe.yaml'} holds {type(recipe).__name__} instead of a mapping")
    stage_names = {
        path.name
        for path in run_dir.iterdir()
        if (path / "metrics.jsonl").is_file() or any(_has_result(path, s) for s in SPLITS)
    }
    others = sorted(stage_names - {*STAGES, LAST_STAGE})
    names = [name for name in (*STAGES, *others, LAST_STAGE) if name in stage_names]
    split = next((s for s in SPLITS if any(_has_result(run_dir / name, s) for name in names)), SPLITS[0])
    return ReportInput(
        run_dir=run_dir,
        recipe=recipe,
        recipe_text=text,
        summary=_read_json(run_dir / "summary.json"),
        catalog=_read_json(run_dir / "catalogue.json"),
        stages=tuple(_load_stage(run_dir / name, split) for name in names),
        split=split,
    )


def _has_result(stage: Path, split: str) -> bool:
    return (stage / "eval" / f"{split}.json").is_file()


def _load_stage(directory: Path, split: str) -> StageRecord:
    metrics = _read_lines(directory / "metrics.jsonl")
    timings = _read_lines(directory / "timings.jsonl")
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(int(line["step"]))
                values.append(float(value))
    return StageRecord(
        name=directory.name,
        series={name: Series(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()},
        seconds=sum(float(line.get("seconds", 0.0)) for line in timings),
        steps=max((int(line["step"]) for line in metrics), default=0),
        result=EvalResult.read(directory / "eval", split) if _has_result(directory, split) else None,
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines with a ``step`` each; a last line that a kill cut off is ignored."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is not a JSON object with a step: {line[:80]!r}") from error
        records.append(record)
    return records


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{path} is not a JSON object: {error}") from error
