"""A raw log in a DuckDB database that spills into a temporary folder, and so may be larger than memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from tawin_nemo.data_prep.raw import FRACTION, LogFilter, Period, Reviews, Selection
from tawin_nemo.types import ITEM, TIME, USER
from tawin_nemo.util.errors import ConfigError, DataError

#: Rows of a result that are in memory at once.
BATCH_ROWS = 1 << 17
#: Memory that each of DuckDB's threads needs for its buffers.
THREAD_GB = 0.25


class LogStore:
    """One connection to a database that spills into ``folder``, which also takes other temporary files.

    The log is table ``log``: seq (order of the file), user_id, item_id, time in seconds and fraction of a second.
    """

    def __init__(self, folder: Path, memory_gb: float) -> None:
        import duckdb

        self.folder = folder
        threads = max(1, min(len(os.sched_getaffinity(0)), int(memory_gb / THREAD_GB)))
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{int(memory_gb * 1024)}MiB", "threads": threads, "temp_directory": str(folder / "spill"),
            "preserve_insertion_order": True, "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }  # fmt: skip
        self._connection = duckdb.connect(":memory:", config=settings)
        self.run("CREATE TABLE log (seq BIGINT, user_id VARCHAR, item_id VARCHAR, time BIGINT, fraction DOUBLE)")

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def run(self, *statements: str) -> None:
        """Execute the statements one after the other."""
        for statement in statements:
            self._connection.execute(statement)

    def row(self, query: str) -> tuple[Any, ...]:
        """The only row of a result."""
        (row,) = self._connection.execute(query).fetchall()  # fetchone would leave the result open
        return tuple(row)

    def frame(self, query: str) -> pl.DataFrame:
        """A whole result: for results that grow with the items at most."""
        frame = pl.from_arrow(self._connection.sql(query).to_arrow_table())
        assert isinstance(frame, pl.DataFrame)
        return frame

    def batches(self, query: str) -> Iterator[pa.RecordBatch]:
        """A result of any size, BATCH_ROWS rows at a time; no other query may run meanwhile."""
        yield from self._connection.sql(query).to_arrow_reader(BATCH_ROWS)

    def insert(self, table: str, rows: pl.DataFrame) -> None:
        """Append a frame that has the columns of ``table`` in their order."""
        self._connection.register("new_rows", rows.to_arrow())
        self.run(f"INSERT INTO {table} SELECT * FROM new_rows")
        self._connection.unregister("new_rows")

    def rewrite(self, table: str, query: str) -> None:
        """Replace ``table`` by the result of a query on it."""
        self.run(
            f"CREATE TABLE rewritten AS {query}", f"DROP TABLE {table}", f"ALTER TABLE rewritten RENAME TO {table}"
        )

    def collect(self, frames: Iterable[pl.DataFrame], period: Period, selection: Selection | None = None) -> Reviews:
        """``raw.collect_reviews`` into table ``log``. Raises what it raises."""
        reader, rows = LogFilter(period, selection), 0
        for frame in reader.frames(frames):
            numbered = frame.with_row_index("seq", offset=rows).with_columns(pl.col("seq").cast(pl.Int64))
            self.insert("log", numbered.select("seq", USER, ITEM, TIME, FRACTION))
            rows += frame.height
        return StoredReviews(reader.counts(), self)


@dataclass(frozen=True)
class StoredReviews(Reviews):
    """Reviews in table ``log`` of a store."""

    store: LogStore

    def items(self, at_least: int = 1) -> pl.Series:
        """The items with at least so many reviews, see Reviews."""
        query = f"SELECT item_id FROM log GROUP BY item_id HAVING count(*) >= {at_least}"
        return self.store.frame(query)["item_id"].cast(pl.String)


@contextmanager
def open_store(out: Path, memory_gb: float) -> Iterator[LogStore]:
    """A store in a temporary folder beside ``out``, which is removed at the end.

    Raises ConfigError where DuckDB is missing or has too little memory, DataError when its files cannot be written.
    """
    try:
        import duckdb
    except ImportError as error:
        raise ConfigError(
            f"prepare.engine=duckdb needs the package duckdb ({error}); pip install duckdb, or prepare.engine=polars"
        ) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.tmp", dir=out.parent) as folder:
        store = None
        try:
            store = LogStore(Path(folder), memory_gb)
            yield store
        except duckdb.OutOfMemoryException as error:
            raise ConfigError(
                f"prepare.memory_limit_gb={memory_gb:g} is too little for DuckDB ({_first_line(error)}); raise it, or "
                f"free disk space in {out.parent}, where it spills"
            ) from error
        except duckdb.IOException as error:
            raise DataError(
                f"DuckDB cannot write its temporary files in {out.parent} ({_first_line(error)}); free disk space there"
            ) from error
        finally:
            if store is not None:
                store.close()


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]
