"""The steps of a raw log on its way to samples: their counts, and the error where one leaves nothing."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tawin_nemo.config.schema import PrepareConfig
from tawin_nemo.data_prep.dataset import Step
from tawin_nemo.data_prep.raw import RawData
from tawin_nemo.util.errors import DataError

#: The smallest log that can be split 8:1:1.
FEWEST_SAMPLES = 10


class LogSteps:
    """``steps`` grows by one with each call, in the order of the methods; counts are interactions, users, items.

    All methods raise DataError, with the counts of every step so far and a remedy, when nothing is left.
    """

    def __init__(self, raw: RawData, prepare: PrepareConfig) -> None:
        """Begin with the readable rows and those inside prepare.events and prepare.min_rating."""
        self._raw, self._prepare = raw, prepare
        counts = raw.reviews.counts
        self.steps = [Step("readable reviews", counts.readable, None, None)]
        self._check(f"is {raw.problems[0].path} the raw review file?")
        for name, rows in counts.selected:
            self.steps.append(Step(name, rows, None, None))
            kinds = sorted(counts.kinds.items(), key=lambda kind: -kind[1])[:8]
            seen = ", ".join(f"{kind} ({count:,})" for kind, count in kinds)
            events = name.startswith("events")
            self._check(f"the log has the events {seen}" if events else "lower prepare.min_rating")

    def add_window(self, interactions: int, users: int, items: int) -> None:
        """Add the time window."""
        counts = self._raw.reviews.counts
        seen = f"{_day(counts.first_time)} and {_day(counts.last_time)}"
        remedy = f"the reviews lie between {seen}: set prepare.start and prepare.end"
        self._add(f"time window {self._raw.period}", interactions, users, items, remedy)

    def add_unique(self, interactions: int, users: int, items: int) -> None:
        """Add the removal of exact duplicates."""
        self._add("exact duplicates removed", interactions, users, items, "")

    def add_titled(self, faults: dict[str, Any], interactions: int, users: int, items: int) -> None:
        """Add the removal of items without a valid title; ``faults`` as ``item_texts.valid_items`` returns them."""
        reasons = ", ".join(f"{reason}: {count['items']}" for reason, count in faults.items())
        remedy = f"items rejected ({reasons}); does the metadata belong to the reviews?"
        name = "no item file" if self._raw.items is None else "valid titles"
        self._add(name, interactions, users, items, remedy)

    def add_core(self, interactions: int, users: int, items: int) -> None:
        """Add the k-core."""
        k = self._prepare.k_core
        self._add(f"{k}-core", interactions, users, items, f"lower prepare.k_core (now {k}) or widen the time window")

    def add_samples(self, max_history: int, samples: int, users: int, items: int) -> None:
        """Add the sliding windows. Raises DataError for fewer than FEWEST_SAMPLES."""
        self.steps.append(Step(f"samples (history <= {max_history})", samples, users, items))
        if samples < FEWEST_SAMPLES:
            raise DataError(
                f"{self._summary()} Only {samples} samples are left; a split of 8:1:1 needs {FEWEST_SAMPLES}."
            )

    def _add(self, name: str, interactions: int, users: int, items: int, remedy: str) -> None:
        self.steps.append(Step(name, interactions, users, items))
        self._check(remedy)

    def _check(self, remedy: str) -> None:
        if self.steps[-1].interactions == 0:
            raise DataError(f"{self._summary()} The step '{self.steps[-1].name}' removed everything: {remedy}")

    def _summary(self) -> str:
        summary = " -> ".join(f"{step.name}: {step.interactions:,}" for step in self.steps)
        skipped = sum(problem.total for problem in self._raw.problems)
        return f"data set {self._raw.name} is empty after filtering. {summary} ({skipped} unusable lines skipped)."


def _day(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        return f"{seconds} (not UTC seconds)"
