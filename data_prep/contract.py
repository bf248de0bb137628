"""The data contract of ``data.dataset=parquet``: folders ``interactions/`` and ``items/`` of Parquet files.

Columns have fixed names and types, so that any warehouse can write them. The files of a folder, at any depth, are read
in the order of their paths; names that begin with a dot or an underscore (Spark's ``_SUCCESS``) do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from tawin_nemo.config.schema import ColumnsConfig, PrepareConfig
from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION, PRICE
from tawin_nemo.data_prep.ndjson import LINE, Problems
from tawin_nemo.data_prep.raw import EVENT, RATING, Collect, Period, RawData, Selection, collect_reviews
from tawin_nemo.data_prep.table import check_share, usable_frame
from tawin_nemo.data_prep.table_items import items_of
from tawin_nemo.data_prep.tables import Table, frames, parquet_schema
from tawin_nemo.types import ITEM, TIME, TITLE, USER
from tawin_nemo.util.errors import ConfigError, DataError
from tawin_nemo.util.log import say

INTERACTIONS, ITEMS = "interactions", "items"


@dataclass(frozen=True)
class Column:
    """A column of the contract: its role in this package, what it may hold, and whether it may be absent."""

    role: str
    kind: str
    fits: Callable[[pa.DataType], bool]
    optional: bool = False


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain))


def _is_id(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind))


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _is_texts(kind: pa.DataType) -> bool:
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return _is_text(kind.value_type) if nested else _is_text(kind)


_ID = ("text or an integer", _is_id)
COLUMNS = {
    INTERACTIONS: {
        "user_id": Column(USER, *_ID),
        "item_id": Column(ITEM, *_ID),
        "timestamp": Column(TIME, "an integer (seconds to nanoseconds since 1970), a timestamp or a date", _is_time),
        "event": Column(EVENT, "text", _is_text, optional=True),
        "weight": Column(RATING, "a number", _is_number, optional=True),
    },
    ITEMS: {
        "item_id": Column(ITEM, *_ID),
        "title": Column(TITLE, "text", _is_text),
    } | {
        role: Column(role, "text or a list of texts", _is_texts, optional=True)
        for role in (DESCRIPTION, BRAND, CATEGORY, PRICE)
    },
}  # fmt: skip
#: The contract's names, for readers of tables.
_NAMES = ColumnsConfig(
    user="user_id", item="item_id", time="timestamp", event="event", rating="weight", title="title",
    description=DESCRIPTION, brand=BRAND, category=CATEGORY, price=PRICE,
)  # fmt: skip


def found_in(root: Path) -> bool:
    """Whether ``root`` has a folder of interactions with a Parquet file in it."""
    return (root / INTERACTIONS).is_dir() and bool(_parts(root, INTERACTIONS))


def _parts(root: Path, folder: str) -> list[Path]:
    below = root / folder
    paths = (path for path in below.rglob("*.parquet") if path.is_file())
    return sorted(path for path in paths if not any(part[0] in "._" for part in path.relative_to(below).parts))


def source_files(root: Path) -> list[Path]:
    """All files of both folders. Raises DataError without interactions."""
    files = _parts(root, INTERACTIONS)
    if not files:
        raise DataError(
            f"{root / INTERACTIONS} has no Parquet file; data.dataset=parquet reads {INTERACTIONS}/*.parquet"
        )
    return files + _parts(root, ITEMS)


def _table(path: Path, folder: str, needed: tuple[str, ...] = ()) -> Table:
    """One file. Raises DataError when a column is missing or has another type than the contract says.

    ``needed``: roles of optional columns that a recipe key asks for.
    """
    schema = parquet_schema(path)
    for name, column in COLUMNS[folder].items():
        if name not in schema.names:
            if column.optional and column.role not in needed:
                continue
            raise DataError(
                f"{path} has no column {name!r} ({column.kind}); it has {', '.join(schema.names[:30])}. "
                "data.dataset=table with prepare.columns reads other names"
            )
        kind = schema.field(name).type
        if not column.fits(kind):
            raise DataError(f"{path}: column {name!r} is {kind}; it must be {column.kind}, write it as that")
    return Table(path, "parquet", tuple(schema.names))


def read(
    name: str, root: Path, prepare: PrepareConfig, period: Period, collect: Collect = collect_reviews
) -> RawData:  # fmt: skip
    """The interactions inside ``period`` and their items; without items their ids are the titles.

    Raises ConfigError for keys that name files or columns, DataError for files that break the contract and when more
    than 10 % of the interactions lack a user, an item or a time.
    """
    _check_keys(prepare)
    selection = Selection(tuple(prepare.events), prepare.min_rating)
    extra = tuple(role for role, used in ((EVENT, selection.events), (RATING, selection.min_rating > 0)) if used)
    logs = [_table(path, INTERACTIONS, extra) for path in _parts(root, INTERACTIONS)]
    catalogs = [_table(path, ITEMS) for path in _parts(root, ITEMS)]
    problems = Problems(root / INTERACTIONS)
    say(f"{INTERACTIONS}/: {len(logs):,} Parquet files; {ITEMS}/: {len(catalogs):,}")
    reviews = collect(_log_frames(logs, extra, problems), period, selection)
    problems.report()
    check_share(problems)
    if not catalogs:
        say(f"no Parquet file in {root / ITEMS}: titles are the item ids, enough for classic baselines")
        return RawData(name, "parquet", period, reviews, None, [problems])
    item_problems = Problems(root / ITEMS)
    texts = items_of(catalogs, _NAMES, reviews.items(), [item_problems] * len(catalogs))
    item_problems.report()
    return RawData(name, "parquet", period, reviews, texts, [problems, item_problems])


def _check_keys(prepare: PrepareConfig) -> None:
    given = {f"prepare.columns.{role}": name for role, name in asdict(prepare.columns).items()}
    given |= {"prepare.reviews": prepare.reviews, "prepare.metadata": prepare.metadata}
    for key, value in given.items():
        if value:
            raise ConfigError(
                f"{key}={value}, but data.dataset=parquet has fixed folders and columns; empty the key, or use "
                "data.dataset=table"
            )


def _log_frames(logs: list[Table], extra: tuple[str, ...], problems: Problems) -> Iterator[pl.DataFrame]:
    """The rows of all files; line numbers in ``problems`` count through the files."""
    roles = {
        column.role: name
        for name, column in COLUMNS[INTERACTIONS].items()
        if not column.optional or column.role in extra
    }
    for log in logs:
        before = problems.lines
        for raw in frames(log, roles, problems):
            yield usable_frame(raw.with_columns(pl.col(LINE) + before), extra, problems)
