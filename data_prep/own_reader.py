"""Data sets read by a function of one's own: ``data.dataset=package.module:function``.

The function gets the folder ``data.root`` and section ``prepare``, and returns two polars frames: the interactions with
the columns user, item (texts) and time (integers, seconds to nanoseconds), and the items with external_id and title,
and, where they are known, description, brand and category. Filters, windows and splits follow as for every raw log.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from tawin_nemo.config.schema import PrepareConfig
from tawin_nemo.config.seams import made
from tawin_nemo.data_prep.ndjson import Problems
from tawin_nemo.data_prep.raw import ITEM_SCHEMA, REVIEW_SCHEMA, Collect, Period, RawData, collect_reviews
from tawin_nemo.data_prep.titles import clean_column
from tawin_nemo.types import EXTERNAL_ID, TITLE
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.imports import described


def source_files(root: Path) -> list[Path]:
    """All files below ``root``: which of them the function reads is its own matter."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def read(
    path: str, name: str, root: Path, prepare: PrepareConfig, window: Period, collect: Collect = collect_reviews
) -> RawData:  # fmt: skip
    """The reviews inside ``window`` and the items that the function at import path ``path`` returns.

    Raises ConfigError for code that cannot be imported, DataError when it fails or returns anything else.
    """
    function = made("data.dataset", path)
    try:
        result = function(root, prepare)
    except Exception as error:
        raise DataError(f"data.dataset={path} failed on {root}: {described(error)}") from error
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, pl.DataFrame) for part in result)):
        raise DataError(
            f"data.dataset={path} returned {type(result).__name__}; expected two polars frames, log and items"
        )
    log, items = result
    for frame, columns, what in ((log, REVIEW_SCHEMA, "the log"), (items, (EXTERNAL_ID, TITLE), "the items")):
        if lacking := [column for column in columns if column not in frame.columns]:
            raise DataError(
                f"data.dataset={path}: {what} has the columns {', '.join(frame.columns)}, not {', '.join(lacking)}"
            )
    try:
        log = log.select(pl.col(column).cast(kind) for column, kind in REVIEW_SCHEMA.items())
        items = items.select(
            (pl.col(column).cast(kind).fill_null("") if column in items.columns else pl.lit("", kind)).alias(column)
            for column, kind in ITEM_SCHEMA.items()
        )
    except pl.exceptions.PolarsError as error:
        raise DataError(f"data.dataset={path}: {str(error).splitlines()[0]}") from error
    items = items.with_columns(clean_column(items[TITLE]).alias(TITLE))
    return RawData(name, path, window, collect([log], window, None), items, [Problems(root, lines=log.height)])
