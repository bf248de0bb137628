"""Texts of items from tables: an item file, or the log's own columns."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from tawin_nemo.config.schema import ColumnsConfig
from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION, PRICE
from tawin_nemo.data_prep import columns as roles_
from tawin_nemo.data_prep.ndjson import Problems
from tawin_nemo.data_prep.raw import ITEM_SCHEMA, ITEM_TEXTS
from tawin_nemo.data_prep.tables import Table, frames
from tawin_nemo.data_prep.titles import clean_column, join_json_list, join_list
from tawin_nemo.types import EXTERNAL_ID, ITEM, TITLE
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.log import say

DESCRIPTION_LIMIT = 4000
#: Titles per item of a log's own title column beyond which the column says something about rows, not items.
DIFFERING_TITLES = 1.2


def own_items(logs: Sequence[Table], given: ColumnsConfig, wanted: pl.Series) -> pl.DataFrame | None:
    """The items' texts from the log's own columns; None without a title column.

    A column that is called title and differs between the rows of an item (a review's title), as the first batch of rows
    shows, is no item title, unless ``prepare.columns.title`` names it.
    """
    log, roles = logs[0], roles_.match(logs[0].columns, given)
    if TITLE not in roles:
        return None
    if not given.title:
        batch = next(frames(log, {role: roles[role] for role in (ITEM, TITLE)}, Problems(log.path)), None)
        if batch is not None and batch.select(ITEM, TITLE).n_unique() > DIFFERING_TITLES * batch[ITEM].n_unique():
            say(f"the column {roles[TITLE]} of {log.path.name} differs between rows of one item: it is no item title")
            return None
    return items_of(logs, given, wanted, [Problems(table.path) for table in logs])


def as_ids(column: pl.Series) -> pl.Series:
    """External ids as text, null where there is none; a whole float (5.0, pandas' integer beside missing ones) is "5".

    Raises DataError for columns of lists and other nested types.
    """
    if column.dtype.is_nested():
        raise DataError(f"the {column.name} column holds lists or records; an id is a text or a number")
    if column.dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        column = whole.to_frame("w").select(pl.when(pl.col("w") == column).then(pl.col("w")))["w"].alias(column.name)
    text = column.cast(pl.String)
    return text.to_frame("t").select(pl.when(pl.col("t") != "").then(pl.col("t")).alias(column.name))[column.name]


def read_items(table: Table) -> pl.DataFrame:
    """Cleaned texts (ITEM_SCHEMA) of all items of a table. Raises ConfigError without an item and a title column."""
    return items_of([table], ColumnsConfig(), None, [Problems(table.path)])


def items_of(
    tables: Sequence[Table], given: ColumnsConfig, wanted: pl.Series | None, problems: Sequence[Problems]
) -> pl.DataFrame:  # fmt: skip
    """Cleaned texts (ITEM_SCHEMA) of the items in ``wanted`` (None = all), each once."""
    parts = [pl.DataFrame(schema=ITEM_SCHEMA)]
    for table, problem in zip(tables, problems, strict=True):
        found = roles_.roles_of(table.path, table.columns, (ITEM, TITLE), given)
        roles = {role: found[role] for role in (ITEM, *ITEM_TEXTS) if role in found}
        for raw in frames(table, roles, problem):
            frame = raw.with_columns(as_ids(raw[ITEM]))
            known = pl.col(ITEM).is_not_null() if wanted is None else pl.col(ITEM).is_in(wanted.implode())
            parts.append(_texts(frame.filter(known).unique(ITEM, keep="first", maintain_order=True)))
    return pl.concat(parts).unique(EXTERNAL_ID, keep="first", maintain_order=True)


def _texts(frame: pl.DataFrame) -> pl.DataFrame:
    empty = pl.Series([""] * frame.height, dtype=pl.String)

    def column(role: str, separator: str) -> pl.Series:
        values = frame[role] if role in frame.columns else empty
        if values.dtype.is_nested():
            return pl.Series([join_list(value, separator) for value in values.to_list()], dtype=pl.String)
        return pl.Series([join_json_list(text, separator) for text in values.cast(pl.String)], dtype=pl.String)

    return pl.DataFrame(
        {
            EXTERNAL_ID: frame[ITEM],
            TITLE: clean_column(frame[TITLE].cast(pl.String)),
            DESCRIPTION: column(DESCRIPTION, " ").str.slice(0, DESCRIPTION_LIMIT),
            BRAND: column(BRAND, " "),
            CATEGORY: column(CATEGORY, " > "),
            PRICE: column(PRICE, " "),
        },
        schema=ITEM_SCHEMA,
    )
