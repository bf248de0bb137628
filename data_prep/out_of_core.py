"""``prepare.engine=duckdb``: the steps of ``pipeline.build`` as SQL on a log that lies on disk.

The prepared folder is the same as that of the engine in memory, byte for byte. In memory are a batch of rows, a row
group, what DuckDB may use (prepare.memory_limit_gb), and the texts of the items; nothing grows with interactions or
users.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from tawin_nemo.config.schema import PrepareConfig
from tawin_nemo.data.interactions import ITEMS_FILE, USERS_FILE, Split
from tawin_nemo.data_prep import sql_steps as sql
from tawin_nemo.data_prep.dataset import (
    LeakReport,
    Summary,
    check_indices,
    check_windows,
    sample_table,
    write_summary,
)
from tawin_nemo.data_prep.log_steps import LogSteps
from tawin_nemo.data_prep.log_store import BATCH_ROWS, LogStore
from tawin_nemo.data_prep.parquet_rows import write_table, write_tables
from tawin_nemo.data_prep.pipeline import item_table, usable_items
from tawin_nemo.data_prep.raw import ITEM_TEXTS, RawData
from tawin_nemo.data_prep.splits import LEAVE_ONE_OUT, check_sizes, date_borders, ratio_borders
from tawin_nemo.data_prep.ties import report_ties, shuffled, tie_counts
from tawin_nemo.types import EXTERNAL_ID, HISTORY, ITEM, SPLITS, TARGET, TIME, USER, TokenRows
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import atomic_directory

_USERS = pa.schema([(USER, pa.int64()), (EXTERNAL_ID, pa.string())])
_SAMPLES = pa.schema(
    [(USER, pa.int64()), (HISTORY, pa.list_(pa.int64())), (TARGET, pa.int64()), (TIME, pa.int64())]
)  # fmt: skip


def write_from_store(
    raw: RawData, store: LogStore, out: Path, request: dict[str, Any], prepare: PrepareConfig, *,
    max_history: int, seed: int,
) -> Path:  # fmt: skip
    """Filter the log in ``store``, make samples and write the folder ``out``, as ``build`` and ``write_dataset`` do.

    Raises DataError as they do.
    """
    steps = LogSteps(raw, prepare)
    items, faults = _filter(raw, store, steps, prepare)
    if prepare.ties == "random":
        _shuffle(store, seed)
    store.run(sql.windows(max_history, prepare.ties))
    ties = tie_counts(*store.row(sql.TIES))
    report_ties(ties, prepare.ties)
    steps.add_samples(max_history, *store.row(sql.SAMPLE_COUNTS))
    _split(store, prepare)
    broken = int(store.row(sql.broken_windows(max_history))[0])
    with atomic_directory(out) as folder:
        table = item_table(store.frame(sql.ITEMS)["item_id"], items)
        write_table(table.to_arrow(), folder / ITEMS_FILE)
        _write_users(store, folder / USERS_FILE)
        borders = _write_splits(store, folder, table.height, max_history, by_time=prepare.split != LEAVE_ONE_OUT)
        statistics = _statistics(store, table, ties, prepare)
        report = LeakReport(borders, sum(statistics["rows"].values()), broken)
        check_windows(report)
        problems = raw.report() | {"refused_items": faults}
        summary = Summary(raw.name, raw.source, steps.steps, problems, statistics, report, raw.items is not None)
        write_summary(summary, folder, request)
    return out


def _filter(
    raw: RawData, store: LogStore, steps: LogSteps, prepare: PrepareConfig
) -> tuple[pl.DataFrame, dict[str, Any]]:  # fmt: skip
    """Leave in table ``events`` what counts; returns the items' texts and what is wrong with the other items."""
    logged = int(store.row("SELECT count(*) FROM log")[0])
    fractions = bool(logged and store.row(sql.HAS_FRACTIONS)[0])
    store.run(*sql.code_log(fractions))
    _, users, items = store.row("SELECT 0, (SELECT count(*) FROM users), (SELECT count(*) FROM items)")
    steps.add_window(logged, users, items)
    store.run("DROP TABLE log")
    steps.add_unique(*store.row(sql.COUNTS))

    reviewed = store.frame(sql.REVIEWED).rename({"item_id": ITEM}).with_columns(pl.col(ITEM).cast(pl.String))
    texts, faults = usable_items(raw, reviewed, prepare)
    if faults:
        store.run("CREATE TABLE usable (item_id VARCHAR)")
        store.insert("usable", texts.select(pl.col(ITEM).alias("item_id")))
        store.rewrite("events", sql.USABLE)
    steps.add_titled(faults, *store.row(sql.COUNTS))

    before, (left, _, _) = -1, store.row(sql.COUNTS)
    while left != before and prepare.k_core > 1:
        store.rewrite("events", sql.core_round(prepare.k_core))
        before, left = left, int(store.row("SELECT count(*) FROM events")[0])
    steps.add_core(*store.row(sql.COUNTS))
    store.run(*sql.FINAL_CODES)
    return texts.select(ITEM, *ITEM_TEXTS), faults


def _shuffle(store: LogStore, seed: int) -> None:
    """Table ``shuffle`` for prepare.ties=random: ``ties.shuffled`` in a file instead of memory."""
    rows = int(store.row(sql.COUNTS)[0])
    store.run(*sql.SHUFFLED)
    order_N = shuffled(np.memmap(store.folder / "shuffle.bin", dtype=np.int64, mode="w+", shape=(rows,)), seed)
    for start in range(0, rows, BATCH_ROWS):
        part = np.asarray(order_N[start : start + BATCH_ROWS])
        store.insert("shuffle", pl.DataFrame({"tie": np.arange(start, start + len(part)), "n": part}))


def _split(store: LogStore, prepare: PrepareConfig) -> None:
    """Views ``train``, ``valid`` and ``test`` of the samples. Raises DataError when one is empty."""
    if prepare.split == LEAVE_ONE_OUT:
        train = "recent = 2 OR (recent = 0 AND place = 2)"
        conditions = (train, "recent = 1", "recent = 0 AND place > 2")
    else:
        if prepare.split == "date":
            column, (first, second) = TIME, date_borders(prepare.valid_start, prepare.test_start)
        else:
            column, (first, second) = "rowid", ratio_borders(int(store.row("SELECT count(*) FROM samples")[0]))
        conditions = (f"{column} < {first}", f"{column} >= {first} AND {column} < {second}", f"{column} >= {second}")
    for name, condition in zip(SPLITS, conditions, strict=True):
        store.run(sql.split_view(name, condition))
    check_sizes({name: int(store.row(sql.split_size(name))[0]) for name in SPLITS}, prepare)


def _write_users(store: LogStore, path: Path) -> None:
    rows, characters = store.row(sql.USERS_SIZE)
    nbytes = 8 * rows + int(characters) + 8 * (rows + 1)
    tables = (pa.Table.from_batches([batch]) for batch in store.batches(sql.USERS))
    write_tables(tables, path, _USERS, rows=rows, nbytes=nbytes)


def _write_splits(
    store: LogStore, folder: Path, num_items: int, max_history: int, *, by_time: bool
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """Write the files of the splits, with the checks of ``dataset.leak_check``; returns first and last time of each."""
    borders: dict[str, tuple[int, int]] = {}
    before = None
    for name in SPLITS:
        rows, items = store.row(sql.split_size(name))
        nbytes = 24 * rows + 8 * int(items) + 4 * (rows + 1)
        parts = _checked(store, name, num_items, max_history, borders)
        write_tables(parts, folder / f"{name}.parquet", _SAMPLES, rows=rows, nbytes=nbytes)
        begin, end = borders[name]
        if by_time and before is not None and begin < before[1]:
            raise DataError(f"leak: {before[0]} ends at time {before[1]}, later than {name} begins ({begin})")
        before = name, end
    return borders


def _checked(
    store: LogStore, name: str, num_items: int, max_history: int, borders: dict[str, tuple[int, int]]
) -> Iterator[pa.Table]:  # fmt: skip
    """The rows of a split, checked for items, lengths and order (time, user, place); sets ``borders[name]``."""
    last, rows = np.full((3, 1), -1), 0
    for batch in store.batches(sql.split_rows(name)):
        samples = _samples(batch)
        check_indices(name, samples, num_items, max_history)
        keys = np.hstack([last, np.stack([samples.time_N, samples.user_N, batch["place"].to_numpy()])])
        step_3N = np.diff(keys, axis=1)
        forward = (step_3N[0] > 0) | ((step_3N[0] == 0) & ((step_3N[1] > 0) | ((step_3N[1] == 0) & (step_3N[2] > 0))))
        if not forward.all():
            raise DataError(f"leak: {name} row {rows + int(np.argmin(forward))} is earlier than the row before it")
        first = borders.get(name, (int(samples.time_N[0]), 0))[0]
        borders[name] = (first, int(samples.time_N[-1]))
        last, rows = keys[:, -1:], rows + len(samples)
        yield sample_table(samples)


def _samples(batch: pa.RecordBatch) -> Split:
    lists = batch[HISTORY]
    offsets = lists.offsets.to_numpy().astype(np.int64)
    history = TokenRows(lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])
    return Split(batch[USER].to_numpy(), history, batch[TARGET].to_numpy(), batch[TIME].to_numpy())


def _statistics(
    store: LogStore, items: pl.DataFrame, ties: dict[str, Any], prepare: PrepareConfig
) -> dict[str, Any]:  # fmt: skip
    store.run(sql.TRAINED)
    rows, users, flat = store.row(sql.TOTALS)
    late = prepare.split == LEAVE_ONE_OUT
    return {
        "ties": ties,
        "items": items.height,
        "users": users,
        "rows": {name: int(store.row(sql.split_size(name))[0]) for name in SPLITS},
        "mean_history": round(int(flat) / rows, 4),
        "distinct_titles": items["title"].n_unique(),
        "unseen_targets": {name: int(store.row(sql.unseen_targets(name))[0]) for name in SPLITS[1:]},
    } | ({"late_train_rows": int(store.row(sql.LATE_TRAIN_ROWS)[0])} if late else {})
