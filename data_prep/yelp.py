"""Yelp Open Dataset: reviews and businesses, JSON lines, plain or gzipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION, PRICE
from tawin_nemo.data_prep.ndjson import LINE, Field, Problems, read_frames
from tawin_nemo.data_prep.raw import ITEM_SCHEMA, RATING, Collect, Period, RawData, Reviews, Selection, collect_reviews
from tawin_nemo.data_prep.titles import clean_column
from tawin_nemo.types import EXTERNAL_ID, ITEM, TIME, TITLE, USER

REVIEW_FIELDS = [Field("user_id", "id"), Field("business_id", "id"), Field("date", "id")]
ITEM_FIELDS = [Field("business_id", "id"), *(Field(name, "text") for name in ("name", "city", "categories"))]
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


def read(
    name: str, reviews: Path, businesses: Path, period: Period, selection: Selection | None = None,
    collect: Collect = collect_reviews,
) -> RawData:  # fmt: skip
    """Read both files. The title is the business's name, the description its city; dates are taken as UTC.

    Raises DataError if a file cannot be opened or decompressed; unusable lines are counted in ``problems``.
    """
    review_problems, item_problems = Problems(reviews), Problems(businesses)
    selection = selection or Selection()
    log = collect(_review_frames(reviews, selection, review_problems), period, selection)
    review_problems.report()
    items = _read_items(businesses, log, item_problems)
    item_problems.report()
    return RawData(name, "yelp", period, log, items, [review_problems, item_problems])


def _review_frames(path: Path, selection: Selection, problems: Problems) -> Iterator[pl.DataFrame]:
    seconds = pl.col("date").str.to_datetime(DATE_FORMAT, strict=False, time_unit="us").dt.epoch("s")
    fields, columns = list(REVIEW_FIELDS), [pl.col("user_id").alias(USER), pl.col("business_id").alias(ITEM)]
    if selection.min_rating > 0:
        fields.append(Field("stars", "scalar"))
        columns.append(pl.col("stars").cast(pl.Float64, strict=False).alias(RATING))
    for frame in read_frames(path, fields, problems):
        frame = frame.select(*columns, seconds.alias(TIME), LINE)
        for line in frame.filter(pl.col(TIME).is_null())[LINE]:
            problems.add("date is not YYYY-MM-DD HH:MM:SS", line)
        yield frame.filter(pl.col(TIME).is_not_null()).drop(LINE)


def _read_items(path: Path, reviews: Reviews, problems: Problems) -> pl.DataFrame:
    reviewed = reviews.items()
    parts = [pl.DataFrame(schema=ITEM_SCHEMA)]
    for frame in read_frames(path, ITEM_FIELDS, problems):
        frame = frame.filter(pl.col("business_id").is_in(reviewed.implode()))
        parts.append(
            pl.DataFrame(
                {
                    EXTERNAL_ID: frame["business_id"],
                    TITLE: clean_column(frame["name"]),
                    DESCRIPTION: clean_column(frame["city"]),
                    BRAND: pl.Series([""] * frame.height, dtype=pl.String),
                    CATEGORY: clean_column(frame["categories"]),
                    PRICE: pl.Series([""] * frame.height, dtype=pl.String),
                },
                schema=ITEM_SCHEMA,
            )
        )
    return pl.concat(parts)
