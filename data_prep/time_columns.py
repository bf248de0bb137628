"""Columns of times as files have them: numbers, dates, ISO 8601 texts."""

from __future__ import annotations

import polars as pl

from tawin_nemo.data_prep.raw import FRACTION
from tawin_nemo.types import TIME

UNREADABLE = "time is neither a number nor a date such as 2021-03-01 12:30:00"
_MICROSECONDS = 10**6
_NUMBER = r"^[+-]?\d+(\.\d*)?([eE][+-]?\d+)?$"
_FORMAT = "%Y-%m-%dT%H:%M:%S%.f%z"


def parsed_times(column: pl.Series) -> pl.DataFrame:
    """TIME (Int64, null = unreadable) and FRACTION (of TIME's unit) of each cell.

    Dates and ISO texts come out in seconds, UTC unless they name an offset; a day without a time is its midnight.
    Numbers stay in their own unit, which ``raw.Clock`` finds.
    """
    if column.dtype == pl.Date or isinstance(column.dtype, pl.Datetime):
        return _of_microseconds(column.cast(pl.Datetime("us", getattr(column.dtype, "time_zone", None))).dt.epoch("us"))
    if column.dtype.is_integer():
        return _parts(column.cast(pl.Int64, strict=False), None)
    if column.dtype.is_numeric():
        return _of_floats(column.cast(pl.Float64))
    text = column.cast(pl.String).str.strip_chars()
    whole = text.cast(pl.Int64, strict=False)
    if whole.null_count() == text.null_count():
        return _parts(whole, None)
    floats, dates = _of_floats(_floats(text)), _of_texts(text)
    return pl.DataFrame(
        {
            TIME: _first(whole, floats[TIME], dates[TIME]),
            FRACTION: _first(whole.cast(pl.Float64) * 0.0, floats[FRACTION], dates[FRACTION]),
        }
    )


def _first(*columns: pl.Series) -> pl.Series:
    """The first of the columns that is not null, cell by cell."""
    frame = pl.DataFrame({str(place): column for place, column in enumerate(columns)})
    return frame.select(pl.coalesce(pl.all()).alias("first"))["first"]


def _parts(ticks: pl.Series, fraction: pl.Series | None) -> pl.DataFrame:
    rest = ticks.cast(pl.Float64) * 0.0 if fraction is None else fraction
    return pl.DataFrame({TIME: ticks, FRACTION: rest})


def _floats(text: pl.Series) -> pl.Series:
    """Numbers among the texts; words that a cast would take for numbers (nan, inf) are none."""
    numbers = pl.DataFrame({"text": text}).select(pl.when(pl.col("text").str.contains(_NUMBER)).then(pl.col("text")))
    return numbers["text"].cast(pl.Float64, strict=False)


def _of_floats(values: pl.Series) -> pl.DataFrame:
    finite = values.to_frame("value").select(pl.when(pl.col("value").is_finite()).then(pl.col("value")))["value"]
    whole = finite.floor()
    return _parts(whole.cast(pl.Int64, strict=False), finite - whole)


def _of_microseconds(ticks: pl.Series) -> pl.DataFrame:
    return _parts(ticks // _MICROSECONDS, (ticks % _MICROSECONDS).cast(pl.Float64) / _MICROSECONDS)


def _of_texts(text: pl.Series) -> pl.DataFrame:
    """ISO 8601 with a space or T, slashes, missing seconds, Z, UTC or an offset; brought to one form and parsed."""
    steps = (
        (r"^(\d{4})[/-](\d{2})[/-](\d{2})", "${1}-${2}-${3}"),
        (r"^(\d{4}-\d{2}-\d{2})$", "${1}T00:00:00"),
        (r"^(\d{4}-\d{2}-\d{2})[ T]+", "${1}T"),
        (r"\s*(Z|UTC|GMT)$", "+00:00"),
        (r"T(\d{2}:\d{2})($|[+-])", "T${1}:00${2}"),
        (r"(T\S*?)\s*([+-]\d{2})$", "${1}${2}:00"),
        (r"(T[\d:.]+)$", "${1}+00:00"),
    )
    for pattern, form in steps:
        text = text.str.replace(pattern, form)
    return _of_microseconds(text.str.to_datetime(_FORMAT, time_unit="us", time_zone="UTC", strict=False).dt.epoch("us"))
