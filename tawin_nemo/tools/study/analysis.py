"""What the run files of a study say: means with intervals, paired tests, sweeps. Numbers, before tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from tawin_nemo.eval.intervals import Interval
from tawin_nemo.eval.paired import PairedTest, best_shares, hierarchical_interval, holm, paired_test
from tawin_nemo.tools.study.arms import Study, label_of
from tawin_nemo.tools.study.config import Sweep
from tawin_nemo.tools.study.record import FailedRun, RunRecord, SplitResult, read_folder
from tawin_nemo.util.errors import DataError

#: The rows of both splits, for claims on which nothing was selected.
POOLED = "valid+test"
#: How hits on shared paths count: ``SplitResult.values`` or ``SplitResult.matches``.
Count = Callable[[SplitResult, str], np.ndarray]


@dataclass(frozen=True, eq=False)
class Values:
    """A metric of every user under every seed of one arm."""

    seeds: tuple[int, ...]
    values_SB: np.ndarray

    def of(self, seeds: Sequence[int]) -> np.ndarray:
        return self.values_SB[[self.seeds.index(seed) for seed in seeds]]


@dataclass(frozen=True)
class PairRow:
    """One paired test of a table."""

    ours: str
    theirs: str
    metric: str
    seeds: tuple[int, ...]
    test: PairedTest
    p_holm: float  # over the pairs of this table's metric


@dataclass(frozen=True)
class Line:
    """A metric along the x of a sweep, one line for each choice of the grid's other keys."""

    label: str
    x: tuple[float, ...]
    means: tuple[Interval, ...]
    best: tuple[float, ...]  # share of resamples in which each x has the highest mean


@dataclass(frozen=True, eq=False)
class Results:
    """Run files of a study, and of other studies where a comparison names one."""

    study: Study
    records: Mapping[tuple[str, int], RunRecord]
    failed: Mapping[tuple[str, int], FailedRun]
    others: Mapping[str, Mapping[tuple[str, int], RunRecord]]

    @property
    def splits(self) -> list[str]:
        """Those that a run was evaluated on, in the recipe's order, and the pooled one when it is asked for."""
        found = {name for record in self.records.values() for name in record.splits}
        names: list[str] = [name for name in ("valid", "test") if name in found]
        return [*names, POOLED] if self.study.file.pool and len(names) == 2 else names

    def runs(self, name: str) -> dict[int, RunRecord]:
        """The finished runs of an arm by seed; ``STUDY/ARM`` is looked up in the other study's files."""
        study, _, arm = name.rpartition("/")
        records = self.others[study] if study else self.records
        return {seed: record for (other, seed), record in sorted(records.items()) if other == arm}

    def evaluated(self, name: str, split: str) -> dict[int, list[SplitResult]]:
        """Evaluations of an arm by seed, two of them on the pooled split; seeds without one are left out."""
        parts = split.split("+")
        return {
            seed: [record.splits[part] for part in parts]
            for seed, record in self.runs(name).items()
            if all(part in record.splits for part in parts)
        }

    def values(self, name: str, split: str, metric: str, count: Count = SplitResult.values) -> Values | None:
        """None when no run of the arm was evaluated on the split. Raises DataError when its seeds differ in rows."""
        found = self.evaluated(name, split)
        if not found:
            return None
        rows = {tuple(part.rows_sha256 for part in parts) for parts in found.values()}
        if len(rows) > 1:
            raise DataError(f"the seeds of {name} were evaluated on different {split} rows; delete the odd run files")
        values = [np.concatenate([count(part, metric) for part in parts]) for parts in found.values()]
        return Values(tuple(found), np.stack(values))

    def mean(self, name: str, split: str, metric: str, count: Count = SplitResult.values) -> Interval | None:
        values = self.values(name, split, metric, count)
        return hierarchical_interval(values.values_SB) if values else None

    def shares_credit(self, name: str, split: str) -> bool:
        """Whether some hit of the arm is worth less than 1, so that counting in full makes a difference."""
        return any(part.shares_credit for parts in self.evaluated(name, split).values() for part in parts)

    def fact(self, name: str, split: str, fact: str) -> float | None:
        """Mean over seeds of another number of the evaluation files; None on the pooled split."""
        found = [parts[0].facts.get(fact) for parts in self.evaluated(name, split).values() if len(parts) == 1]
        known = [value for value in found if value is not None]
        return fmean(known) if known else None

    def trend(self, name: str, scalar: str) -> tuple[float, float] | None:
        """A logged scalar in the first and the last tenth of training, mean over seeds; None where nobody logged it."""
        found = [parts for record in self.runs(name).values() if (parts := record.trends.get(scalar))]
        return (fmean(parts[0] for parts in found), fmean(parts[-1] for parts in found)) if found else None

    def paired(self, ours: str, theirs: str, split: str, metric: str) -> tuple[Values, Values] | None:
        """Both arms under the seeds that both have; None when there is none. Raises DataError for other rows."""
        a, b = self.evaluated(ours, split), self.evaluated(theirs, split)
        seeds = tuple(seed for seed in a if seed in b)
        if not seeds:
            return None
        hashes = [{part.rows_sha256 for part in parts[seed]} for parts in (a, b) for seed in seeds]
        if any(other != hashes[0] for other in hashes):
            raise DataError(f"{ours} and {theirs} were evaluated on different {split} rows; they cannot be paired")
        first, second = self.values(ours, split, metric), self.values(theirs, split, metric)
        assert first is not None
        assert second is not None
        return Values(seeds, first.of(seeds)), Values(seeds, second.of(seeds))


def load_results(study: Study) -> Results:
    """Read the run files of the study and of those that its comparisons name."""
    records, failed = read_folder(study.results)
    named = {name.rpartition("/")[0] for pair in study.pairs for name in pair}
    named |= {name.rpartition("/")[0] for sweep in study.file.sweeps for name in (*sweep.beside, sweep.minus)}
    others: dict[str, Any] = {other: read_folder(study.results.parent / other)[0] for other in named if other}
    return Results(study, records, failed, others)


def stray(results: Results) -> list[str]:
    """Run files that belong to no arm of the study file: their arms were renamed or taken out."""
    planned = {arm.name for arm in results.study.arms}
    return [f"{arm}.seed{seed}" for arm, seed in sorted({*results.records, *results.failed}) if arm not in planned]


def missing(results: Results) -> list[str]:
    """Runs of the study file that neither finished nor failed."""
    return [
        f"{arm.name}.seed{seed}"
        for arm in results.study.arms
        for seed in arm.seeds
        if (arm.name, seed) not in results.records and (arm.name, seed) not in results.failed
    ]


def pair_rows(results: Results, split: str, metric: str) -> list[PairRow]:
    """All comparisons of the study for one metric; they are the family of Holm's correction."""
    found = [(ours, theirs, results.paired(ours, theirs, split, metric)) for ours, theirs in results.study.pairs]
    known = [
        (ours, theirs, pair[0].seeds, paired_test(pair[0].values_SB, pair[1].values_SB))
        for ours, theirs, pair in found
        if pair is not None
    ]
    adjusted = holm([test.p for *_, test in known])
    return [
        PairRow(ours, theirs, metric, seeds, test, p)
        for (ours, theirs, seeds, test), p in zip(known, adjusted, strict=True)
    ]


def sweep_lines(results: Results, sweep: Sweep, split: str, metric: str) -> list[Line]:
    """One line for each choice of the other grid keys, over the points of x that have finished runs."""
    arms = [arm for arm in results.study.arms if arm.base == sweep.arm]
    groups: dict[str, list[tuple[float, Values]]] = {}
    for arm in arms:
        values = _sweep_values(results, sweep, arm.name, split, metric)
        others = {key: value for key, value in arm.point.items() if key != sweep.x}
        label = ", ".join(f"{key.rsplit('.', 1)[-1]}={label_of(value)}" for key, value in others.items())
        if values is not None:
            groups.setdefault(label or sweep.arm, []).append((float(arm.point[sweep.x]), values))
    return [_line(label, sorted(points, key=lambda point: point[0])) for label, points in groups.items()]


def has_points(results: Results, sweep: Sweep, split: str) -> bool:
    """Whether a sweep has anything to show yet."""
    arms = [arm.name for arm in results.study.arms if arm.base == sweep.arm]
    return any(_sweep_values(results, sweep, arm, split, "recall@1") is not None for arm in arms)


def _sweep_values(results: Results, sweep: Sweep, name: str, split: str, metric: str) -> Values | None:
    """The arm's values, or their paired differences to the arm `minus`."""
    if not sweep.minus:
        return results.values(name, split, metric)
    pair = results.paired(name, sweep.minus, split, metric)
    return Values(pair[0].seeds, pair[0].values_SB - pair[1].values_SB) if pair else None


def _line(label: str, points: Sequence[tuple[float, Values]]) -> Line:
    common = [seed for seed in points[0][1].seeds if all(seed in values.seeds for _, values in points)]
    best: tuple[float, ...] = ()
    if common:
        best = tuple(best_shares(np.stack([values.of(common) for _, values in points])).tolist())
    means = tuple(hierarchical_interval(values.values_SB) for _, values in points)
    return Line(label, tuple(x for x, _ in points), means, best)


def likely_best(line: Line, level: float = 0.95) -> tuple[float, float, float]:
    """The x with the highest mean, and the smallest range of x around it that holds ``level`` of the resamples."""
    top = int(np.argmax([interval.mean for interval in line.means]))
    low = high = top
    while sum(line.best[low : high + 1]) < level and (low > 0 or high < len(line.x) - 1):
        left = line.best[low - 1] if low > 0 else -1.0
        right = line.best[high + 1] if high < len(line.x) - 1 else -1.0
        low, high = (low - 1, high) if left >= right else (low, high + 1)
    return line.x[top], line.x[low], line.x[high]


def curve(results: Results, name: str, key: str) -> dict[int, np.ndarray]:
    """A logged scalar of an arm by seed, [step, value] rows."""
    found = {seed: record.curves.get(key, []) for seed, record in results.runs(name).items()}
    return {seed: np.asarray(rows, dtype=float) for seed, rows in found.items() if len(rows) > 1}
