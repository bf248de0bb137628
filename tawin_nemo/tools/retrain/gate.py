"""May the candidate replace the published model? Paired comparison on the same rows of valid.

The candidate passes when it is not worse than the published model by more than a margin (a non-inferiority test): for
every metric the lower end of the 95 % interval of the paired difference must lie above minus ``margin`` times the
published value. Too few rows to tell give a wide interval, and the published model stays. The first candidate has
nothing to be compared with and passes if all its answers are catalog items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tawin_nemo.eval.intervals import Interval
from tawin_nemo.eval.result import EvalResult, compare


@dataclass(frozen=True)
class Verdict:
    """One metric: both models with 95 % intervals, and the paired difference (candidate - published)."""

    metric: str
    candidate: Interval
    published: Interval | None
    difference: Interval | None
    lowest_allowed: float  # the difference's lower end must not lie below it
    passed: bool


@dataclass(frozen=True)
class Decision:
    """What ``gate.json`` holds. ``against`` names the published version; empty = there was none."""

    date: str
    against: str
    margin: float
    rows: int
    invalid_rate: float
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        return self.invalid_rate == 0.0 and all(verdict.passed for verdict in self.verdicts)

    @property
    def reasons(self) -> list[str]:
        """Why it did not pass, in words; empty = it passed."""
        found = [f"{self.invalid_rate:.2%} of the answers are no catalog items"] if self.invalid_rate else []
        return found + [
            f"{verdict.metric}: {verdict.candidate.mean:.4f} against {verdict.published.mean:.4f} of {self.against}, "
            f"difference {verdict.difference.mean:+.4f} [{verdict.difference.low:+.4f}, {verdict.difference.high:+.4f}]"
            f", its lower end may be {verdict.lowest_allowed:+.4f}"
            for verdict in self.verdicts
            if not verdict.passed and verdict.published and verdict.difference
        ]


def decide(
    candidate: EvalResult,
    published: EvalResult | None,
    metrics: Sequence[str],
    *,
    date: str,
    against: str,
    margin: float,
    seed: int = 0,
) -> Decision:
    """Judge every metric. Raises DataError when the two were not evaluated on the same rows."""
    verdicts = tuple(_verdict(candidate, published, metric, margin, seed) for metric in metrics)
    return Decision(date, against, margin, candidate.rows, candidate.invalid_rate, verdicts)


def _verdict(candidate: EvalResult, published: EvalResult | None, metric: str, margin: float, seed: int) -> Verdict:
    ours = _interval(candidate, metric)
    if published is None:
        return Verdict(metric, ours, None, None, 0.0, passed=True)
    theirs = _interval(published, metric)
    difference = compare(candidate, published, metric, seed=seed).difference
    lowest = -margin * theirs.mean
    return Verdict(metric, ours, theirs, difference, lowest, passed=difference.low >= lowest)


def _interval(result: EvalResult, metric: str) -> Interval:
    return Interval(result.means[metric], *result.intervals[metric])
