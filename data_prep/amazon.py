"""Amazon Review Data 2018 (Ni et al., 2019): raw reviews and item metadata, JSON lines, plain or gzipped."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION
from tawin_nemo.data_prep.ndjson import Field, Problems, read_frames
from tawin_nemo.data_prep.raw import ITEM_SCHEMA, Period, RawData, Reviews, collect_reviews, frequent_items
from tawin_nemo.data_prep.titles import clean_column, join_json_list
from tawin_nemo.types import EXTERNAL_ID, ITEM, TIME, TITLE, USER

REVIEW_FIELDS = [Field("reviewerID", "id"), Field("asin", "id"), Field("unixReviewTime", "int")]
ITEM_FIELDS = [Field("asin", "id"), *(Field(name, "text") for name in ("title", "description", "brand", "category"))]
#: Characters of a description that are kept; the longest raw ones are whole web pages.
DESCRIPTION_LIMIT = 4000


def read(name: str, reviews: Path, metadata: Path, period: Period, k: int) -> RawData:
    """Read both files. Descriptions and categories are kept only for items with at least k reviews.

    Raises DataError if a file cannot be opened or decompressed; unusable lines are counted in ``problems``.
    """
    review_problems, item_problems = Problems(reviews), Problems(metadata)
    log = _read_reviews(reviews, period, review_problems)
    review_problems.report()
    items = _read_items(metadata, log, k, item_problems)
    item_problems.report()
    return RawData(name, "amazon", period, log, items, [review_problems, item_problems])


def _read_reviews(path: Path, period: Period, problems: Problems) -> Reviews:
    columns = [pl.col("reviewerID").alias(USER), pl.col("asin").alias(ITEM), pl.col("unixReviewTime").alias(TIME)]
    return collect_reviews((frame.select(columns) for frame in read_frames(path, REVIEW_FIELDS, problems)), period)


def _read_items(path: Path, reviews: Reviews, k: int, problems: Problems) -> pl.DataFrame:
    reviewed = reviews.inside[ITEM].unique()
    frequent = frequent_items(reviews, k)
    parts = [pl.DataFrame(schema=ITEM_SCHEMA)]
    for frame in read_frames(path, ITEM_FIELDS, problems):
        frame = frame.filter(pl.col("asin").is_in(reviewed.implode()))
        long_texts = pl.col("asin").is_in(frequent.implode())
        frame = frame.with_columns(pl.when(long_texts).then(pl.col(n)).alias(n) for n in ("description", "category"))
        parts.append(
            pl.DataFrame(
                {
                    EXTERNAL_ID: frame["asin"],
                    TITLE: clean_column(frame["title"]),
                    DESCRIPTION: _joined(frame["description"], " ").str.slice(0, DESCRIPTION_LIMIT),
                    BRAND: clean_column(frame["brand"]),
                    CATEGORY: _joined(frame["category"], " > "),
                },
                schema=ITEM_SCHEMA,
            )
        )
    return pl.concat(parts)


def _joined(texts: pl.Series, separator: str) -> pl.Series:
    return pl.Series([join_json_list(text, separator) for text in texts], dtype=pl.String)
