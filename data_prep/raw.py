"""Raw reviews inside a time window: the periods of the paper's data sets, and the records that readers return.

The window comes from ``prepare.start`` and ``prepare.end``, or from the published periods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION, PRICE
from tawin_nemo.data_prep.ndjson import Problems
from tawin_nemo.types import EXTERNAL_ID, ITEM, TIME, TITLE, USER
from tawin_nemo.util import times
from tawin_nemo.util.errors import ConfigError, DataError
from tawin_nemo.util.log import say

#: Name in a file name -> first and last month, inclusive (arXiv 2604.22504, Appendix G.1).
PUBLISHED = {
    "Toys_and_Games": ("2016-10", "2018-11"),
    "Office_Products": ("2016-10", "2018-11"),
    "Industrial_and_Scientific": ("1996-10", "2018-11"),
    "yelp": ("2021-01", "2021-12"),
    "Synthetic": ("2016-10", "2018-11"),
}


@dataclass(frozen=True)
class Period:
    """A time window in UTC seconds, ``first <= time < stop``; None is no limit."""

    start: str
    end: str
    first: int | None
    stop: int | None

    def __str__(self) -> str:
        return f"{self.start or 'the beginning'}..{self.end or 'the end'}"


def period(name: str, start: str = "", end: str = "") -> Period:
    """The window for a data set. Empty limits are the published ones if ``name`` contains a published name, else open.

    ``start`` and ``end`` are YYYY-MM-DD or YYYY-MM; a month or day as ``end`` is included whole. Raises ConfigError for
    other formats, or if the window ends before it begins.
    """
    known = next((limits for key, limits in PUBLISHED.items() if key.lower() in name.lower()), ("", ""))
    start, end = start or known[0], end or known[1]
    first = _seconds("prepare.start", start, times.first_second)
    stop = _seconds("prepare.end", end, times.last_second)
    if first is not None and stop is not None and stop <= first:
        raise ConfigError(f"prepare.end={end} lies before prepare.start={start}; exchange them")
    return Period(start, end, first, stop)


def _seconds(key: str, text: str, parse: Callable[[str], int | None]) -> int | None:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{key}={text!r} {error}") from None


ITEM_TEXTS = (TITLE, DESCRIPTION, BRAND, CATEGORY, PRICE)
ITEM_SCHEMA = dict.fromkeys((EXTERNAL_ID, *ITEM_TEXTS), pl.String)
REVIEW_SCHEMA = {USER: pl.String, ITEM: pl.String, TIME: pl.Int64}
#: Columns that a reader may add to REVIEW_SCHEMA: kind of event (String), rating (Float64), part of a second (Float64).
EVENT, RATING, FRACTION = "event", "rating", "fraction"


@dataclass(frozen=True)
class Selection:
    """The rows of a log that count: kinds of events (empty = all) and the lowest rating (0 = all)."""

    events: tuple[str, ...] = ()
    min_rating: float = 0.0


@dataclass(frozen=True)
class LogCounts:
    """Counts of a log before the time window is applied, and its first and last time in seconds.

    ``selected``: name and rows of each filter by event or rating, in order; ``kinds``: rows of each kind of event.
    """

    readable: int
    first_time: int
    last_time: int
    selected: tuple[tuple[str, int], ...] = ()
    kinds: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Reviews(ABC):
    """The reviews inside the time window, wherever they lie, and the counts before it."""

    counts: LogCounts

    @abstractmethod
    def items(self, at_least: int = 1) -> pl.Series:
        """The items with at least so many reviews inside the window, in no order. For k: a superset of every k-core."""


@dataclass(frozen=True)
class GatheredReviews(Reviews):
    """Reviews in memory: ``inside`` has REVIEW_SCHEMA, in file order."""

    inside: pl.DataFrame

    def items(self, at_least: int = 1) -> pl.Series:
        """The items with at least so many reviews, see Reviews."""
        if at_least == 1:
            return self.inside[ITEM].unique()
        return self.inside.group_by(ITEM).len("reviews").filter(pl.col("reviews") >= at_least)[ITEM]


@dataclass(frozen=True)
class RawData:
    """Reviews and the cleaned texts of reviewed items (ITEM_SCHEMA; an item may occur twice, its first row counts).

    ``items`` is None where there is no item file: titles are then the external ids.
    """

    name: str
    source: str
    period: Period
    reviews: Reviews
    items: pl.DataFrame | None
    problems: list[Problems]

    def report(self) -> dict[str, Any]:
        """The unusable lines of each file, for the manifest."""
        return {problem.path.name: problem.as_dict() for problem in self.problems}


#: Ticks per second of the units that logs use.
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
#: Times of reviews lie between 1990 and 2100; the ranges of the units do not overlap.
PLAUSIBLE = (631_152_000, 4_102_444_800)
#: Share of rows with a time outside these years that is dropped and counted; more of them is an error.
IMPLAUSIBLE_SHARE = 0.01


class Clock:
    """Brings the times of one log to seconds, whatever their unit is, and watches that all rows have the same one."""

    def __init__(self) -> None:
        self.rows = dict.fromkeys(UNITS, 0)
        self.examples: dict[str, int] = {}
        self.implausible = 0

    def seconds(self, frame: pl.DataFrame) -> pl.DataFrame:
        """``frame`` with TIME in seconds and FRACTION, without rows whose time is in no unit between 1990 and 2100.

        Raises DataError when rows of this or an earlier frame have another unit.
        """
        low, high = PLAUSIBLE
        known = pl.lit(False)
        for unit, ticks in UNITS.items():
            inside = (pl.col(TIME) >= low * ticks) & (pl.col(TIME) < high * ticks)
            matching = frame.filter(inside)[TIME]
            self.rows[unit] += len(matching)
            if len(matching):
                self.examples.setdefault(unit, int(matching[0]))
            known |= inside
        bad = frame.filter(~known)[TIME]
        self.implausible += len(bad)
        if len(bad):
            self.examples.setdefault("no unit", int(bad[0]))
        units = [unit for unit, rows in self.rows.items() if rows]
        if len(units) > 1:
            counts = ", ".join(f"{self.rows[unit]} in {unit} (such as {self.examples[unit]})" for unit in units)
            raise DataError(f"times of mixed units: {counts}; write all of them in the same one")
        ticks = UNITS[units[0]] if units else 1
        own = pl.col(FRACTION) if FRACTION in frame.columns else pl.lit(0.0)
        rest = ((pl.col(TIME) % ticks).cast(pl.Float64) + own) / ticks
        return frame.filter(known).with_columns(rest.alias(FRACTION), pl.col(TIME) // ticks)

    def report(self) -> None:
        """Say the unit where it is not seconds, and dropped rows. Raises DataError when those are more than 1 %."""
        total = sum(self.rows.values()) + self.implausible
        for unit, rows in self.rows.items():
            if rows and unit != "seconds":
                say(f"times are in {unit} (such as {self.examples[unit]})")
        if not self.implausible:
            return
        message = (
            f"{self.implausible} of {total} rows have a time that is not between 1990 and 2100 in any unit "
            f"(such as {self.examples['no unit']})"
        )
        if self.implausible > IMPLAUSIBLE_SHARE * total:
            raise DataError(f"{message}; write UTC seconds, milliseconds, microseconds or nanoseconds since 1970")
        say(f"{message}: skipped")


class _Selecting:
    """Applies a Selection to frames and counts what is left."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.kinds: dict[str, int] = {}
        self.rows = {"events": 0, "rating": 0}

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        wanted = self.selection
        if wanted.events:
            for kind, rows in frame.group_by(EVENT).len().iter_rows():
                self.kinds[str(kind)] = self.kinds.get(str(kind), 0) + rows
            frame = frame.filter(pl.col(EVENT).is_in(list(wanted.events)))
            self.rows["events"] += frame.height
        if wanted.min_rating > 0:
            frame = frame.filter(pl.col(RATING) >= wanted.min_rating)
            self.rows["rating"] += frame.height
        return frame

    def steps(self) -> tuple[tuple[str, int], ...]:
        """Name and rows of each filter that was applied."""
        wanted, steps = self.selection, []
        if wanted.events:
            steps.append((f"events {', '.join(wanted.events)}", self.rows["events"]))
        if wanted.min_rating > 0:
            steps.append((f"rating >= {wanted.min_rating:g}", self.rows["rating"]))
        return tuple(steps)


#: How a reader hands on its frames: gathered in memory (``collect_reviews``), or written to a database.
Collect = Callable[[Iterable[pl.DataFrame], Period, Selection | None], Reviews]


class LogFilter:
    """Passes on the rows of a log inside ``selection`` and the period, with times in seconds, and counts the others."""

    def __init__(self, period: Period, selection: Selection | None = None) -> None:
        self._period = period
        self._clock, self._selecting = Clock(), _Selecting(selection or Selection())
        self._readable, self._first, self._last = 0, PLAUSIBLE[1], 0

    def frames(self, raw: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Frames of REVIEW_SCHEMA and FRACTION, in the order of the input, whose rows count.

        Raises DataError for times of mixed units, and at the end when more than 1 % are implausible.
        """
        for part in raw:
            frame = self._clock.seconds(part)
            self._readable += frame.height
            frame = self._selecting(frame)
            if frame.height == 0:
                continue
            low, high = frame.select(pl.col(TIME).min(), pl.col(TIME).max().alias("last")).row(0)
            self._first, self._last = min(self._first, low), max(self._last, high)
            yield frame.filter(self._inside()).select(*REVIEW_SCHEMA, FRACTION)
        self._clock.report()

    def _inside(self) -> pl.Expr:
        inside = pl.lit(True)
        if self._period.first is not None:
            inside &= pl.col(TIME) >= self._period.first
        if self._period.stop is not None:
            inside &= pl.col(TIME) < self._period.stop
        return inside

    def counts(self) -> LogCounts:
        """What was counted, after the last frame."""
        first = self._first if self._last else 0
        return LogCounts(self._readable, first, self._last, self._selecting.steps(), self._selecting.kinds)


def collect_reviews(
    frames: Iterable[pl.DataFrame], period: Period, selection: Selection | None = None
) -> GatheredReviews:
    """Gather frames of REVIEW_SCHEMA; rows outside of ``selection`` or the period are counted and dropped at once.

    Times come out in seconds, rows in file order, except that finer times order them where the log has them. Raises
    DataError for times of mixed units, and when more than 1 % are implausible.
    """
    reader = LogFilter(period, selection)
    log = pl.concat([pl.DataFrame(schema={**REVIEW_SCHEMA, FRACTION: pl.Float64}), *reader.frames(frames)])
    if (log[FRACTION] != 0).any():
        log = log.sort(TIME, FRACTION, maintain_order=True)
    return GatheredReviews(reader.counts(), log.drop(FRACTION))
