"""The numbers of a results page, from run files alone: means with intervals, paired tests, sweeps.

Axis letters: S seeds, B users. A metric of one arm is a dict from seed to ``values_B``, the metric of every user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

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
Values = Mapping[int, np.ndarray]
Records = Mapping[tuple[str, int], RunRecord]


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
    best: tuple[float, ...]  # share of resamples in which each x has the highest mean; empty without a common seed


@dataclass(frozen=True, eq=False)
class Results:
    """Run files of a study, and of other studies where a comparison names one."""

    study: Study
    records: Records
    failed: Mapping[tuple[str, int], FailedRun]
    others: Mapping[str, Records]

    @property
    def splits(self) -> list[str]:
        """Those that a run was evaluated on, in the recipe's order, and the pooled one when the study has ``pool``."""
        evaluated = {name for record in self.records.values() for name in record.splits}
        names: list[str] = [name for name in ("valid", "test") if name in evaluated]
        return [*names, POOLED] if self.study.file.pool and len(names) == 2 else names

    def runs(self, name: str) -> dict[int, RunRecord]:
        """The finished runs of an arm by seed; ``STUDY/ARM`` is looked up in the other study's files."""
        study, _, arm = name.rpartition("/")
        records = self.others[study] if study else self.records
        return {seed: record for (other, seed), record in sorted(records.items()) if other == arm}

    def evaluated(self, name: str, split: str) -> dict[int, list[SplitResult]]:
        """Evaluations of an arm by seed, two of them on the pooled split; without seeds that have none."""
        parts = split.split("+")
        runs = self.runs(name).items()
        return {seed: [run.splits[part] for part in parts] for seed, run in runs if run.splits.keys() >= set(parts)}

    def values(self, name: str, split: str, metric: str, count: Count = SplitResult.values) -> Values:
        """Empty when no run of the arm was evaluated on the split. Raises DataError when its seeds differ in rows."""
        evaluated = self.evaluated(name, split)
        if len({_rows(parts) for parts in evaluated.values()}) > 1:
            raise DataError(f"the seeds of {name} were evaluated on different {split} rows; delete the odd run files")
        return {seed: np.concatenate([count(part, metric) for part in parts]) for seed, parts in evaluated.items()}

    def mean(self, name: str, split: str, metric: str, count: Count = SplitResult.values) -> Interval | None:
        values = self.values(name, split, metric, count)
        return hierarchical_interval(stacked(values)) if values else None

    def shares_credit(self, name: str, split: str) -> bool:
        """Whether some hit of the arm is worth less than 1, so that counting in full makes a difference."""
        return any(part.shares_credit for parts in self.evaluated(name, split).values() for part in parts)

    def fact(self, name: str, split: str, fact: str) -> float | None:
        """Mean over seeds of another number of the evaluation files; None on the pooled split."""
        values = [parts[0].facts.get(fact) for parts in self.evaluated(name, split).values() if len(parts) == 1]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    def trend(self, name: str, scalar: str) -> tuple[float, float] | None:
        """A logged scalar in the first and the last tenth of training, mean over seeds; None where nobody logged it."""
        logged = [parts for record in self.runs(name).values() if (parts := record.trends.get(scalar))]
        return (fmean(parts[0] for parts in logged), fmean(parts[-1] for parts in logged)) if logged else None

    def curve(self, name: str, scalar: str) -> dict[int, np.ndarray]:
        """A logged scalar of an arm by seed, [step, value] rows; without seeds that logged less than two."""
        rows = {seed: np.asarray(run.curves.get(scalar, []), dtype=float) for seed, run in self.runs(name).items()}
        return {seed: array for seed, array in rows.items() if len(array) > 1}

    def paired(self, ours: str, theirs: str, split: str, metric: str) -> tuple[Values, Values]:
        """Both arms under the seeds that both have, which may be none. Raises DataError when their rows differ."""
        a, b = self.evaluated(ours, split), self.evaluated(theirs, split)
        seeds = [seed for seed in a if seed in b]
        if len({_rows(parts[seed]) for parts in (a, b) for seed in seeds}) > 1:
            raise DataError(f"{ours} and {theirs} were evaluated on different {split} rows; they cannot be paired")
        first, second = (self.values(name, split, metric) for name in (ours, theirs))
        return {seed: first[seed] for seed in seeds}, {seed: second[seed] for seed in seeds}


def _rows(parts: Sequence[SplitResult]) -> tuple[str, ...]:
    return tuple(part.rows_sha256 for part in parts)


def stacked(values: Values) -> np.ndarray:
    """[S, B]."""
    return np.stack(list(values.values()))


def load_results(study: Study) -> Results:
    """Read the run files of the study and of those that its comparisons name."""
    records, failed = read_folder(study.results)
    names = [name for pair in study.pairs for name in pair]
    names += [name for sweep in study.file.sweeps for name in (*sweep.beside, sweep.minus)]
    others = {name.rpartition("/")[0] for name in names if "/" in name}
    return Results(study, records, failed, {other: read_folder(study.results.parent / other)[0] for other in others})


def pair_rows(results: Results, split: str, metric: str) -> list[PairRow]:
    """All comparisons of the study for one metric; they are the family of Holm's correction."""
    pairs = [(*pair, *results.paired(*pair, split, metric)) for pair in results.study.pairs]
    pairs = [pair for pair in pairs if pair[2]]
    tests = [paired_test(stacked(a), stacked(b)) for _, _, a, b in pairs]
    adjusted = holm([test.p for test in tests])
    return [
        PairRow(ours, theirs, metric, tuple(values), test, p)
        for (ours, theirs, values, _), test, p in zip(pairs, tests, adjusted, strict=True)
    ]


def sweep_lines(results: Results, sweep: Sweep, split: str, metric: str) -> list[Line]:
    """One line for each choice of the other grid keys, over the points of x that have finished runs.

    Of a sweep with ``minus``, the means are paired differences to that arm.
    """
    groups: dict[str, list[tuple[float, Values]]] = {}
    for arm in (arm for arm in results.study.arms if arm.base == sweep.arm):
        if sweep.minus:
            a, b = results.paired(arm.name, sweep.minus, split, metric)
            values: Values = {seed: a[seed] - b[seed] for seed in a}
        else:
            values = results.values(arm.name, split, metric)
        others = [f"{key.rsplit('.', 1)[-1]}={label_of(value)}" for key, value in arm.point.items() if key != sweep.x]
        if values:
            groups.setdefault(", ".join(others) or sweep.arm, []).append((float(arm.point[sweep.x]), values))
    return [line_of(label, sorted(points, key=lambda point: point[0])) for label, points in groups.items()]


def line_of(label: str, points: Sequence[tuple[float, Values]]) -> Line:
    """The means at each x, and how often each is the best over the seeds that all of them have."""
    common = [seed for seed in points[0][1] if all(seed in values for _, values in points)]
    best: tuple[float, ...] = ()
    if common:
        values_XSB = np.stack([np.stack([values[seed] for seed in common]) for _, values in points])
        best = tuple(best_shares(values_XSB).tolist())
    means = tuple(hierarchical_interval(stacked(values)) for _, values in points)
    return Line(label, tuple(x for x, _ in points), means, best)


def likely_best(line: Line, level: float = 0.95) -> tuple[float, float, float]:
    """The x with the highest mean, and the smallest range of x around it that holds ``level`` of the resamples."""
    low = high = top = int(np.argmax([interval.mean for interval in line.means]))
    while sum(line.best[low : high + 1]) < level and (low > 0 or high < len(line.x) - 1):
        left = line.best[low - 1] if low > 0 else -1.0
        right = line.best[high + 1] if high < len(line.x) - 1 else -1.0
        low, high = (low - 1, high) if left >= right else (low, high + 1)
    return line.x[top], line.x[low], line.x[high]
