"""The records that readers of raw files return and the filters read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION
from tawin_nemo.data_prep.ndjson import Problems
from tawin_nemo.data_prep.periods import Period
from tawin_nemo.types import EXTERNAL_ID, ITEM, TIME, TITLE, USER

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
