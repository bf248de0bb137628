"""May the candidate replace the published model? Paired comparison on the same rows of valid.

The candidate passes when it is not worse than the published model by more than a margin (a non-inferiority test): for
every metric the lower end of the 95 % interval of the paired difference must lie above minus ``margin`` times the
published value. Too few rows to tell give a wide interval, and the published model stays. The first candidate has
nothing to be compared with and passes if all its answers are catalog items.

Among the metrics is Recall at ``retrain.tail_k``: a model may keep the top of its lists and lose the rest. ``Check``:
further figures of the candidate alone, with a limit that the operator sets.
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
class Check:
    """A figure of the candidate that must not lie on the wrong side of a limit; 0 as the limit: it is not judged."""

    name: str
    value: float | None
    limit: float
    published: float | None = None
    at_most: bool = False  # the limit is the largest value allowed, not the smallest

    @property
    def passed(self) -> bool:
        """Whether the figure is within its limit."""
        if not self.limit or self.value is None:
            return True
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def reason(self) -> str:
        """Why it did not pass, in words."""
        least = "at most" if self.at_most else "at least"
        return f"{self.name}: {self.value:.4f}, {least} {self.limit:.4f} is asked for"


@dataclass(frozen=True)
class Decision:
    """What ``gate.json`` holds. ``against`` names the published version; empty = there was none."""

    date: str
    against: str
    margin: float
    rows: int
    invalid_rate: float
    verdicts: tuple[Verdict, ...]
    checks: tuple[Check, ...] = ()

    @property
    def passed(self) -> bool:
        judged: tuple[Verdict | Check, ...] = (*self.verdicts, *self.checks)
        return self.invalid_rate == 0.0 and all(one.passed for one in judged)

    @property
    def reasons(self) -> list[str]:
        """Why it did not pass, in words; empty = it passed."""
        found = [f"{self.invalid_rate:.2%} of the answers are no catalog items"] if self.invalid_rate else []
        found += [
            f"{verdict.metric}: {verdict.candidate.mean:.4f} against {verdict.published.mean:.4f} of {self.against}, "
            f"difference {verdict.difference.mean:+.4f} [{verdict.difference.low:+.4f}, {verdict.difference.high:+.4f}]"
            f", its lower end may be {verdict.lowest_allowed:+.4f}"
            for verdict in self.verdicts
            if not verdict.passed and verdict.published and verdict.difference
        ]
        return found + [check.reason for check in self.checks if not check.passed]


def decide(
    candidate: EvalResult,
    published: EvalResult | None,
    metrics: Sequence[str],
    *,
    date: str,
    against: str,
    margin: float,
    checks: Sequence[Check] = (),
    seed: int = 0,
) -> Decision:
    """Judge every metric. Raises DataError when the two were not evaluated on the same rows."""
    verdicts = tuple(_verdict(candidate, published, metric, margin, seed) for metric in metrics)
    return Decision(date, against, margin, candidate.rows, candidate.invalid_rate, verdicts, tuple(checks))


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
