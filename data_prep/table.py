"""A log of one's own (``data.dataset=table``): one row per interaction, in any format that ``tables`` reads.

RecBole's atomic files (``NAME.inter``, ``NAME.item``) and MovieLens are tables with known columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from tawin_nemo.config.schema import ColumnsConfig, PrepareConfig
from tawin_nemo.data_prep import columns as roles_
from tawin_nemo.data_prep.ndjson import LINE, Problems
from tawin_nemo.data_prep.raw import (
    EVENT,
    FRACTION,
    RATING,
    REVIEW_SCHEMA,
    Collect,
    Period,
    RawData,
    Selection,
    collect_reviews,
)
from tawin_nemo.data_prep.table_items import as_ids, items_of, own_items
from tawin_nemo.data_prep.tables import Table, frames, is_hf, open_table
from tawin_nemo.data_prep.time_columns import UNREADABLE, parsed_times
from tawin_nemo.types import ITEM, TIME, USER
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.log import say

#: Endings of files that may be tables where ``prepare.reviews`` names none.
ENDINGS = {".csv", ".tsv", ".txt", ".dat", ".data", ".inter", ".item", ".parquet", ".json", ".jsonl", ".ndjson"}
#: Share of rows without user, item or readable time that is skipped; more of them is an error.
UNUSABLE_SHARE = 0.1


@dataclass(frozen=True)
class Sources:
    """The tables with the log (parts of one log, in the order of their names) and the table with the items, if any."""

    logs: list[Table]
    items: Table | None

    @property
    def files(self) -> list[Path]:
        """All files that the result depends on."""
        paths = [table.path for table in (*self.logs, *([self.items] if self.items else []))]
        return [file for path in paths for file in (_files_below(path) if path.is_dir() else [path])]

    @property
    def name(self) -> str:
        """A name for the data set: the log's file name up to its first dot."""
        return self.logs[0].path.name.split(".", 1)[0]


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def find(root: Path, prepare: PrepareConfig) -> Sources:
    """The log and the items in ``root``: the files that ``prepare`` names, or the only ones with fitting columns.

    Raises DataError, listing what the files hold, unless there is one log and at most one item table; a file that is
    recognised and unusable is named with the remedy.
    """
    given = prepare.columns
    tables, unusable = ([], []) if prepare.reviews and prepare.metadata else _tables(root, given)
    if prepare.reviews:
        logs = [_open(path, given) for path in _named(root, "prepare.reviews", prepare.reviews)]
    else:
        logs = _log(root, [table for table in tables if roles_.is_log(table.columns, given)], tables, unusable)
    if prepare.metadata:
        return Sources(logs, _open(_named(root, "prepare.metadata", prepare.metadata)[0], given))
    items = [table for table in tables if table not in logs and roles_.is_items(table.columns, given)]
    if len(items) > 1:
        names = ", ".join(table.path.name for table in items)
        raise DataError(f"set prepare.metadata to one item file in {root}; candidates: {names}")
    return Sources(logs, items[0] if items else None)


def finds_log(root: Path, prepare: PrepareConfig) -> bool:
    """Whether some file in ``root`` has the columns of a log. Raises DataError for several, or only unusable files."""
    if prepare.reviews:
        return True
    tables, unusable = _tables(root, prepare.columns)
    if not any(roles_.is_log(table.columns, prepare.columns) for table in tables) and not unusable:
        return False
    find(root, prepare)
    return True


def seen(root: Path) -> str:
    """The tables in ``root`` and their columns, to be added to a message; empty where there are none."""
    tables, _ = _tables(root, ColumnsConfig())
    shown = [f"; {table.path.name} has the columns {', '.join(table.columns[:12])}" for table in tables[:5]]
    return "".join(shown)


def _named(root: Path, key: str, name: str) -> list[Path]:
    paths = sorted(root.glob(name)) if any(mark in name for mark in "*?[") else [root / name]
    if not paths or not paths[0].exists():
        raise DataError(f"{key}={name!r}: there is no file {root / name}")
    return paths


def _open(path: Path, given: ColumnsConfig) -> Table:
    table = open_table(path, given)
    if table is None:
        raise DataError(f"{path} has no columns: its first line holds no tab, comma, semicolon or bar")
    return table


def _tables(root: Path, given: ColumnsConfig) -> tuple[list[Table], list[str]]:
    """The tables in ``root`` (or ``root`` itself as a folder of datasets), and why other files are unusable."""
    paths = [root] if is_hf(root) else sorted(path for path in root.iterdir() if _may_be_table(path))
    tables, unusable = [], []
    for path in paths:
        try:
            table = open_table(path, given)
        except DataError as error:
            unusable.append(str(error))
            continue
        if table is not None:
            tables.append(table)
    return tables, unusable


def _may_be_table(path: Path) -> bool:
    if path.is_dir():
        return is_hf(path)
    endings = [ending.lower() for ending in path.suffixes if ending.lower() != ".gz"]
    return not path.name.startswith(".") and bool(endings) and endings[-1] in ENDINGS


def _log(root: Path, logs: list[Table], tables: list[Table], unusable: list[str]) -> list[Table]:
    if len(logs) > 1 and len({(re.sub(r"\d+", "#", table.path.name), table.columns) for table in logs}) == 1:
        return logs  # parts of one table: log-00000.parquet, log-00001.parquet, ...
    if len(logs) > 1:  # MovieLens: ratings.csv beside tags.csv
        rated = [table for table in logs if {RATING, EVENT} & roles_.match(table.columns, ColumnsConfig()).keys()]
        logs = rated if len(rated) == 1 else logs
    if len(logs) == 1:
        return logs
    if logs:
        names = ", ".join(table.path.name for table in logs)
        raise DataError(f"set prepare.reviews to one file in {root}, or a pattern; candidates: {names}")
    shown = [f"{table.path.name} has the columns {', '.join(table.columns[:12])}" for table in tables[:5]]
    raise DataError(
        f"no log in {root}: a table with a user, an item and a time in each row. "
        + "; ".join([*unusable[:3], *shown] or ["it holds no CSV, TSV, JSON lines, Parquet or folder of datasets"])
        + ". Name the columns with prepare.columns.user, .item and .time, the file with prepare.reviews"
    )


def read(
    name: str, sources: Sources, prepare: PrepareConfig, period: Period, collect: Collect = collect_reviews
) -> RawData:  # fmt: skip
    """Log and items. Without an item table the log's own title column gives the titles, else there are none.

    Raises ConfigError for a missing column, DataError for files that cannot be read and when more than 10 % of the
    rows are unusable.
    """
    selection = Selection(tuple(prepare.events), prepare.min_rating)
    log_problems = [Problems(table.path) for table in sources.logs]
    parts = zip(sources.logs, log_problems, strict=True)
    reviews = collect(
        (frame for table, problems in parts for frame in _log_frames(table, prepare.columns, selection, problems)),
        period, selection,
    )  # fmt: skip
    for problems in log_problems:
        problems.report()
        check_share(problems)
    wanted = reviews.items()
    if sources.items is not None:
        problems = Problems(sources.items.path)
        texts = items_of([sources.items], prepare.columns, wanted, [problems])
        problems.report()
        return RawData(name, "table", period, reviews, texts, [*log_problems, problems])
    items = own_items(sources.logs, prepare.columns, wanted)
    if items is None:
        log = sources.logs[0].path.name
        say(f"no item file beside {log}: titles are the item ids, enough for classic baselines")
    return RawData(name, "table", period, reviews, items, log_problems)


def check_share(problems: Problems) -> None:
    """Raise DataError, with the reasons, when more than UNUSABLE_SHARE of a file's rows are unusable."""
    if problems.total > UNUSABLE_SHARE * problems.lines:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(problems.counts.items()))
        raise DataError(
            f"{problems.path}: {problems.total:,} of {problems.lines:,} rows are unusable ({reasons}), more than "
            f"{UNUSABLE_SHARE:.0%}; name the right columns with prepare.columns, or remove these rows"
        )


def _log_frames(
    table: Table, given: ColumnsConfig, selection: Selection, problems: Problems
) -> Iterator[pl.DataFrame]:  # fmt: skip
    extra = [role for role, used in ((EVENT, selection.events), (RATING, selection.min_rating > 0)) if used]
    needed = [*roles_.LOG_ROLES, *extra]
    found = roles_.roles_of(table.path, table.columns, needed, given)
    roles = {role: found[role] for role in needed}
    say(f"{table.path.name}: {table.format}, " + ", ".join(f"{role}={column}" for role, column in roles.items()))
    for raw in frames(table, roles, problems):
        yield usable_frame(raw, extra, problems)


def usable_frame(raw: pl.DataFrame, extra: Sequence[str], problems: Problems) -> pl.DataFrame:
    """Rows of a log (columns: the roles, and LINE) that have user, item and time, which become texts and ticks.

    The other rows are counted in ``problems``. ``extra``: which of EVENT and RATING are kept.
    """
    frame = raw.select(
        LINE,
        as_ids(raw[USER]).alias(USER),
        as_ids(raw[ITEM]).alias(ITEM),
        *([raw[EVENT].cast(pl.String)] if EVENT in raw.columns else []),
        *([raw[RATING].cast(pl.Float64, strict=False)] if RATING in raw.columns else []),
    ).hstack(parsed_times(raw[TIME]))
    return _usable(frame, problems).select(*REVIEW_SCHEMA, FRACTION, *extra)


def _usable(frame: pl.DataFrame, problems: Problems) -> pl.DataFrame:
    """Rows with user, item and time; the others are counted, each for its first reason."""
    reasons = {USER: "missing user", ITEM: "missing item", TIME: UNREADABLE}
    for column, reason in reasons.items():
        missing = frame[column].is_null()
        if missing.any():
            problems.add_all(reason, frame.filter(missing)[LINE])
            frame = frame.filter(~missing)
    return frame
