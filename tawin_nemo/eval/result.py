"""The result of an evaluation and its files: ``SPLIT.json`` (means) and ``SPLIT.per_user.parquet`` (one row each)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.eval.intervals import Interval, minimal_detectable_effect, paired_difference
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import atomic_path, write_json

# -- The results as a table for the terminal, with intervals and paired differences beside every claim.


#: Rows that RL and preference optimisation are compared with, as far as the run has them.
BASELINES = ("sft", "sft_continued", "sft_all")


def headline_metrics(ks: Sequence[int]) -> list[str]:
    """Names of the metrics that the papers print: Recall at the two smallest cut-offs, NDCG at the second."""
    first = sorted(ks)[:2]
    return [*(f"recall@{k}" for k in first), f"ndcg@{first[-1]}"]


def results_table(results: Mapping[str, EvalResult], ks: Sequence[int], split: str = "test") -> str:
    """One line per stage (mean and 95 % interval on ``split``), then RL and preference minus each
    baseline (paired bootstrap)."""
    metrics = headline_metrics(ks)
    lines = [f"{split:24}" + "".join(f"{name:>28}" for name in metrics)]
    for stage, result in results.items():
        cells = (f"{result.means[m]:.4f} [{result.intervals[m][0]:.4f}, {result.intervals[m][1]:.4f}]" for m in metrics)
        lines.append(f"{stage:24}" + "".join(f"{cell:>28}" for cell in cells))
        if result.collision == "optimistic" and result.collisions:
            shared = result.fractional_means()
            lines.append(f"{'  1 / items on the path':24}" + "".join(f"{f'{shared[m]:.4f}':>28}" for m in metrics))
    for ours in (stage for stage in ("preference", "rl") if stage in results):
        baselines = (*BASELINES, "preference") if ours == "rl" else BASELINES
        lines += [_difference(results, ours, baseline, metrics) for baseline in baselines if baseline in results]
    return "\n".join(lines)


def _difference(results: Mapping[str, EvalResult], ours: str, baseline: str, metrics: Sequence[str]) -> str:
    cells = []
    for metric in metrics:
        difference = compare(results[ours], results[baseline], metric).difference
        cells.append(f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]")
    return f"{f'{ours} - {baseline} (paired)':24}" + "".join(f"{cell:>28}" for cell in cells)


@dataclass(frozen=True, eq=False)
class EvalResult:
    """Means over all rows of a split with 95 % intervals, and the per-user table they come from."""

    means: dict[str, float]  # recall@K and ndcg@K
    intervals: dict[str, tuple[float, float]]  # 95 %, normal approximation
    rows: int
    invalid_rate: float  # share of the returned candidates that are not the path of a catalog item
    collisions: int  # rows whose target shares its token path with another item
    short_rows: float  # share of rows with fewer candidates than beams (or than the catalog has paths)
    coverage: float  # share of the catalog's paths that some row has among its first 10
    beams: int
    collision: str  # eval.collision: what a hit on a shared path is worth
    per_user: pl.DataFrame  # row, user, target, rank (-1 = not listed), sharing, candidates, one column per metric
    beyond: dict[str, float] = field(default_factory=dict)  # popularity_bias@K, coverage@K, first_codes@10 (bias.py)

    def fractional_means(self) -> dict[str, float]:
        """``means`` with the credit of ``eval.collision=fractional``, whatever these have: a hit on a path that s items
        share counts 1/s."""
        if self.collision == "fractional":
            return dict(self.means)
        share_B = 1.0 / self.per_user["sharing"].to_numpy()
        return {name: float((self.per_user[name].to_numpy() * share_B).mean()) for name in self.means}

    def write(self, directory: Path, split: str) -> None:
        """Write both files, the table first, so that a JSON file is never without its table."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "per_user"}
        with atomic_path(directory / f"{split}.per_user.parquet") as temporary:
            self.per_user.write_parquet(temporary)
        write_json(directory / f"{split}.json", content)

    @classmethod
    def read(cls, directory: Path, split: str) -> EvalResult:
        """Read the two files that ``write`` wrote. Raises DataError when one is missing or malformed."""
        path, table = directory / f"{split}.json", directory / f"{split}.per_user.parquet"
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            per_user = pl.read_parquet(table)
            means, intervals = content["means"], content["intervals"]
            names = [name for name in per_user.columns if name in means]  # JSON files are sorted, tables keep the order
            content["means"] = {name: means[name] for name in names}
            content["intervals"] = {name: (intervals[name][0], intervals[name][1]) for name in names}
            return cls(**content, per_user=per_user)
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
            raise DataError(f"cannot read the evaluation {path} with {table.name}: {error}; evaluate again") from error


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of one metric of two evaluations of the same rows."""

    metric: str
    difference: Interval  # ours - theirs, 95 % bootstrap
    detectable: float  # smallest true difference that this test finds with a power of 80 %


def compare(ours: EvalResult, theirs: EvalResult, metric: str, *, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Paired difference of ``metric`` with a 95 % bootstrap interval of ``resamples`` resamples.

    Raises DataError when the two tables do not hold the same users and targets in the same order, or lack the metric.
    """
    keys = ["row", "user", "target"]
    if not ours.per_user.select(keys).equals(theirs.per_user.select(keys)):
        raise DataError(
            f"a paired comparison needs the same rows, but the tables differ in {', '.join(keys)} "
            f"({ours.rows} rows against {theirs.rows}); evaluate both on the same split and limits"
        )
    if metric not in ours.means or metric not in theirs.means:
        raise DataError(f"metric {metric} is not in both evaluations: {sorted(ours.means)} and {sorted(theirs.means)}")
    ours_B, theirs_B = ours.per_user[metric].to_numpy(), theirs.per_user[metric].to_numpy()
    detectable = minimal_detectable_effect(ours_B - theirs_B) if ours.rows > 1 else float(np.inf)
    return Comparison(metric, paired_difference(ours_B, theirs_B, resamples=resamples, seed=seed), detectable)
