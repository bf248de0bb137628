"""Amazon reviews, releases of 2014, 2018 and 2023: raw reviews and item metadata, JSON lines, plain or gzipped.

2014 (McAuley et al.): metadata in Python's notation. 2018 (Ni et al., 2019). 2023 (Hou et al., 2024): other names of
fields, times in milliseconds, items by ``parent_asin``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from tawin_nemo.config.schema import ColumnsConfig
from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION, PRICE
from tawin_nemo.data_prep.ndjson import Field, Problems, read_frames
from tawin_nemo.data_prep.raw import (
    ITEM_SCHEMA,
    RATING,
    Collect,
    Period,
    RawData,
    Reviews,
    Selection,
    collect_reviews,
)
from tawin_nemo.data_prep.tables import open_table
from tawin_nemo.data_prep.titles import clean_column, join_json_list
from tawin_nemo.types import EXTERNAL_ID, ITEM, TIME, TITLE, USER
from tawin_nemo.util.errors import DataError


@dataclass(frozen=True)
class Release:
    """Names of the fields in one release of the data."""

    year: int
    user: str = "reviewerID"
    item: str = "asin"
    time: str = "unixReviewTime"
    rating: str = "overall"
    brand: str = "brand"
    category: str = "category"


RELEASE_2014 = Release(2014, category="categories")
RELEASE_2018 = Release(2018)
RELEASE_2023 = Release(2023, "user_id", "parent_asin", "timestamp", "rating", "store", "categories")
#: Characters of a description that are kept; the longest raw ones are whole web pages.
DESCRIPTION_LIMIT = 4000


def release(reviews: Path, metadata: Path) -> Release:
    """The release whose fields the first lines have; 2018 where they do not tell."""
    if RELEASE_2023.item in _fields(reviews):
        return RELEASE_2023
    fields = _fields(metadata)
    return RELEASE_2014 if "categories" in fields and "category" not in fields else RELEASE_2018


def _fields(path: Path) -> tuple[str, ...]:
    try:
        table = open_table(path, ColumnsConfig())
    except DataError:
        return ()  # reading the file names the fault
    return table.columns if table is not None else ()


def read(
    name: str, reviews: Path, metadata: Path, period: Period, k: int, selection: Selection | None = None,
    collect: Collect = collect_reviews,
) -> RawData:  # fmt: skip
    """Read both files. Descriptions and categories are kept only for items with at least k reviews.

    Raises DataError if a file cannot be opened or decompressed; unusable lines are counted in ``problems``.
    """
    fields, selection = release(reviews, metadata), selection or Selection()
    review_problems, item_problems = Problems(reviews), Problems(metadata)
    log = _read_reviews(reviews, fields, period, selection, review_problems, collect)
    review_problems.report()
    items = _read_items(metadata, fields, log, k, item_problems)
    item_problems.report()
    return RawData(name, "amazon", period, log, items, [review_problems, item_problems])


def _read_reviews(
    path: Path, names: Release, period: Period, selection: Selection, problems: Problems, collect: Collect
) -> Reviews:  # fmt: skip
    fields = [Field(names.user, "id"), Field(names.item, "id"), Field(names.time, "int")]
    columns = [pl.col(names.user).alias(USER), pl.col(names.item).alias(ITEM), pl.col(names.time).alias(TIME)]
    if selection.min_rating > 0:
        fields.append(Field(names.rating, "scalar"))
        columns.append(pl.col(names.rating).cast(pl.Float64, strict=False).alias(RATING))
    frames = (frame.select(columns) for frame in read_frames(path, fields, problems))
    return collect(frames, period, selection)


def _read_items(path: Path, names: Release, reviews: Reviews, k: int, problems: Problems) -> pl.DataFrame:
    texts = (TITLE, DESCRIPTION, names.brand, names.category)
    fields = [Field(names.item, "id"), *(Field(text, "text") for text in texts), Field(PRICE, "text")]
    reviewed = reviews.items()
    frequent = reviews.items(k)
    parts = [pl.DataFrame(schema=ITEM_SCHEMA)]
    for frame in read_frames(path, fields, problems):
        frame = frame.filter(pl.col(names.item).is_in(reviewed.implode()))
        long_texts = pl.col(names.item).is_in(frequent.implode())
        frame = frame.with_columns(pl.when(long_texts).then(pl.col(n)).alias(n) for n in (DESCRIPTION, names.category))
        parts.append(
            pl.DataFrame(
                {
                    EXTERNAL_ID: frame[names.item],
                    TITLE: clean_column(frame[TITLE]),
                    DESCRIPTION: _joined(frame[DESCRIPTION], " ").str.slice(0, DESCRIPTION_LIMIT),
                    BRAND: clean_column(frame[names.brand]),
                    CATEGORY: _joined(frame[names.category], " > "),
                    PRICE: clean_column(frame[PRICE]),
                },
                schema=ITEM_SCHEMA,
            )
        )
    return pl.concat(parts)


def _joined(texts: pl.Series, separator: str) -> pl.Series:
    return pl.Series([join_json_list(text, separator) for text in texts], dtype=pl.String)
