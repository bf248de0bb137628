"""Raw reviews inside a time window: the periods of the paper's data sets, and the records that readers return.

The window comes from ``prepare.start`` and ``prepare.end``, or from the published periods.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION
from tawin_nemo.data_prep.ndjson import Problems
from tawin_nemo.types import EXTERNAL_ID, ITEM, TIME, TITLE, USER
from tawin_nemo.util.errors import ConfigError

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
    first = _seconds("prepare.start", start, after=False)
    stop = _seconds("prepare.end", end, after=True)
    if first is not None and stop is not None and stop <= first:
        raise ConfigError(f"prepare.end={end} lies before prepare.start={start}; exchange them")
    return Period(start, end, first, stop)


def _seconds(key: str, text: str, *, after: bool) -> int | None:
    """UTC seconds of the beginning of the day or month, or (``after``) of the moment when it is over."""
    if not text:
        return None
    match = re.fullmatch(r"(\d{4})-(\d{2})(?:-(\d{2}))?", text)
    try:
        if match is None:
            raise ValueError("format")
        year, month, day = int(match[1]), int(match[2]), int(match[3] or 1)
        moment = datetime(year, month, day, tzinfo=UTC)
    except ValueError as error:
        raise ConfigError(f"{key}={text!r} is not a date; write YYYY-MM-DD or YYYY-MM") from error
    days = 0 if not after else 1 if match[3] else calendar.monthrange(year, month)[1]
    return int(moment.timestamp()) + days * 86_400


ITEM_TEXTS = (TITLE, DESCRIPTION, BRAND, CATEGORY)
ITEM_SCHEMA = dict.fromkeys((EXTERNAL_ID, *ITEM_TEXTS), pl.String)
REVIEW_SCHEMA = {USER: pl.String, ITEM: pl.String, TIME: pl.Int64}


@dataclass(frozen=True)
class Reviews:
    """Reviews inside the time window (REVIEW_SCHEMA, in file order), and the counts before the window is applied."""

    inside: pl.DataFrame
    readable: int
    first_time: int
    last_time: int


@dataclass(frozen=True)
class RawData:
    """Reviews and the cleaned texts of reviewed items (ITEM_SCHEMA; an item may occur twice, its first row counts)."""

    name: str
    source: str
    period: Period
    reviews: Reviews
    items: pl.DataFrame
    problems: list[Problems]


def collect_reviews(frames: Iterable[pl.DataFrame], period: Period) -> Reviews:
    """Gather frames of REVIEW_SCHEMA; rows outside of the period are counted and dropped at once."""
    parts = [pl.DataFrame(schema=REVIEW_SCHEMA)]
    readable, first, last = 0, None, None
    for frame in frames:
        if frame.height == 0:
            continue
        readable += frame.height
        low, high = frame.select(pl.col(TIME).min(), pl.col(TIME).max().alias("last")).row(0)
        first = low if first is None else min(first, low)
        last = high if last is None else max(last, high)
        inside = pl.lit(True)
        if period.first is not None:
            inside &= pl.col(TIME) >= period.first
        if period.stop is not None:
            inside &= pl.col(TIME) < period.stop
        parts.append(frame.filter(inside))
    return Reviews(pl.concat(parts), readable, first or 0, last or 0)


def frequent_items(reviews: Reviews, k: int) -> pl.Series:
    """Items with at least k reviews inside the window: a superset of every k-core."""
    return reviews.inside.group_by(ITEM).len("reviews").filter(pl.col("reviews") >= k)[ITEM]
