"""Recommendation lists that another program made, ranked and measured as this project's own (``tawin-nemo score``).

A file (or all Parquet files of a folder, as ``recommend`` writes them) holds one line per recommended item
(``item_id`` with ``rank`` or ``score``) or one line per list (``item_ids``, best first). A list belongs to a row of the
split by ``row`` (0-based, the order of SPLIT.parquet), by ``user_id`` where each user has one row, or, without either
and with ``item_ids``, by its place in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import EvalConfig
from tawin_nemo.data.interactions import Dataset, Split
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.bias import beyond_accuracy, sequence_counts
from tawin_nemo.eval.evaluate import metric_names, per_user_table
from tawin_nemo.eval.intervals import share_interval
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import DataError

ROW, USER_ID, ITEM_ID, RANK, SCORE, ITEM_IDS = "row", "user_id", "item_id", "rank", "score", "item_ids"
_TEXTS = {USER_ID: pl.String, ITEM_ID: pl.String}
_READERS: dict[str, Callable[[Path], pl.DataFrame]] = {
    ".parquet": pl.read_parquet,
    ".csv": partial(pl.read_csv, schema_overrides=_TEXTS),
    ".tsv": partial(pl.read_csv, schema_overrides=_TEXTS, separator="\t"),
    ".jsonl": pl.read_ndjson,
    ".ndjson": pl.read_ndjson,
}
#: An entry that is no item of the catalog: it takes its place in a list and is never a hit.
UNKNOWN = -2


@dataclass(frozen=True, eq=False)
class ForeignLists:
    """Lists for the B rows of a split; K is the length of the longest one."""

    item_BK: np.ndarray  # item indices, best first; UNKNOWN for other names, -1 behind the end of a list
    unknown: int  # entries that name no item of the catalog
    without_list: int  # rows of the split for which the file has no entry
    unused: int  # users of the file who have no row in the split


def read_lists(path: Path, split: Split, dataset: Dataset) -> ForeignLists:
    """Read a file of lists (.parquet, .csv, .tsv, .jsonl) for the rows of ``split``.

    Raises DataError for a file that cannot be read, columns that are missing or ambiguous, rows or users that cannot be
    assigned, an empty or repeated entry, and ranks or scores that are not numbers.
    """
    table = _read(path)
    if ITEM_IDS in table.columns:
        table = _one_line_per_item(table, path, len(split))
    elif ITEM_ID not in table.columns:
        raise _columns(table, path, f"no column {ITEM_ID!r} or {ITEM_IDS!r}")
    table, unused = _with_rows(table, path, split, dataset)
    table = _ordered(table, path)
    item = pl.DataFrame({ITEM_ID: dataset.items.external_ids, "item": np.arange(len(dataset.items))})
    table = table.join(item, on=ITEM_ID, how="left", maintain_order="left")
    item_N = table["item"].fill_null(UNKNOWN).to_numpy()
    row_N, place_N = table[ROW].to_numpy(), table["place"].to_numpy()
    longest = int(place_N.max()) + 1 if len(place_N) else 0
    item_BK = np.full((len(split), longest), -1, dtype=np.int64)
    item_BK[row_N, place_N] = item_N
    return ForeignLists(
        item_BK,
        unknown=int((item_N == UNKNOWN).sum()),
        without_list=len(split) - len(np.unique(row_N)),
        unused=unused,
    )


def _read(path: Path) -> pl.DataFrame:
    if path.is_dir():
        files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith((".", "_")))
        if not files:
            raise DataError(f"{path} holds no file *.parquet; name a folder that recommend wrote, or one file")
    elif path.suffix not in _READERS:
        raise DataError(f"{path} is no {', '.join(_READERS)} file; write the lists in one of these formats")
    try:
        table = pl.read_parquet(files) if path.is_dir() else _READERS[path.suffix](path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if table.is_empty():
        raise DataError(f"{path} holds no lists")
    return table


def _columns(table: pl.DataFrame, path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} has {problem}; it has {', '.join(table.columns)}. Needed are {ITEM_ID} with {RANK} or {SCORE}, or "
        f"{ITEM_IDS} (a list, best first), and {ROW} or {USER_ID}"
    )


def _one_line_per_item(table: pl.DataFrame, path: Path, rows: int) -> pl.DataFrame:
    """Lists in ``item_ids`` -> ``item_id`` with ``rank``; the place in the file is the row where no key is given."""
    if not isinstance(table.schema[ITEM_IDS], pl.List | pl.Array):
        raise DataError(f"{path}: column {ITEM_IDS} holds {table.schema[ITEM_IDS]} instead of lists")
    if ROW not in table.columns and USER_ID not in table.columns:
        if table.height != rows:
            raise _columns(table, path, f"{table.height} lists for {rows} rows and no column {ROW} or {USER_ID}")
        table = table.with_row_index(ROW)
    keys = [name for name in (ROW, USER_ID) if name in table.columns]
    table = table.select(*keys, pl.col(ITEM_IDS).alias(ITEM_ID)).with_row_index("line")
    table = table.filter(pl.col(ITEM_ID).list.len() > 0).explode(ITEM_ID)
    key = keys[0]
    if (again := table.group_by(key).agg(pl.col("line").n_unique()).filter(pl.col("line") > 1)).height:
        raise DataError(f"{path} has {again['line'][0]} lists for {key} {again[key][0]}; give each one list")
    return table.with_columns(pl.int_range(pl.len()).over("line").alias(RANK)).drop("line")


def _with_rows(table: pl.DataFrame, path: Path, split: Split, dataset: Dataset) -> tuple[pl.DataFrame, int]:
    """The table with ``row``, and the number of its users who have no row."""
    if ROW in table.columns:
        number = table[ROW].cast(pl.Int64, strict=False)
        wrong = table[ROW].filter(number.is_null() | (number < 0) | (number >= len(split)))
        if len(wrong):
            raise DataError(f"{path}: {ROW} {wrong[0]} is no row of the split, which has 0 .. {len(split) - 1}")
        return table.with_columns(number.alias(ROW)), 0
    if USER_ID not in table.columns:
        raise _columns(table, path, f"no column {ROW!r} or {USER_ID!r}")
    names = dataset.user_ids(split.user_N)
    if not any(name is not None for name in names):
        raise DataError(f"{path} names users, but the data have no external user ids; give each list its {ROW}")
    rows = pl.DataFrame({USER_ID: names, ROW: np.arange(len(split))}, schema_overrides={USER_ID: pl.String})
    named = table.with_columns(_as_text(table, USER_ID, path))
    several = rows.filter(pl.len().over(USER_ID) > 1).join(named.select(USER_ID).unique(), on=USER_ID, how="semi")
    if several.height:
        user = several[USER_ID][0]
        count = several.filter(pl.col(USER_ID) == user).height
        raise DataError(
            f"{path}: user {user} has {count} rows in the split, so {USER_ID} does not say for which of them a list is "
            f"meant; give each list its {ROW} (0-based, the order of the prepared Parquet file)"
        )
    found = named.join(rows, on=USER_ID, how="inner", maintain_order="left")
    if found.is_empty():
        raise DataError(f"{path}: none of its users has a row in the split; are these ids of this data set?")
    return found, named[USER_ID].n_unique() - found[USER_ID].n_unique()


def _as_text(table: pl.DataFrame, name: str, path: Path) -> pl.Series:
    """A column of ids as text. Raises DataError for empty cells, and for numbers with decimals."""
    column = table[name]
    if column.null_count():
        raise DataError(f"{path}: {column.null_count()} lines have no {name}")
    if not (column.dtype.is_integer() or column.dtype == pl.String):
        raise DataError(f"{path}: column {name} holds {column.dtype}; write ids as text or whole numbers")
    return column.cast(pl.String)


def _ordered(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Columns row, item_id and place (0-based), by rank or by descending score; equal scores keep the file's order."""
    order = next((name for name in (RANK, SCORE) if name in table.columns), None)
    if order is None:
        raise _columns(table, path, f"no column {RANK!r} or {SCORE!r}")
    by = table[order].cast(pl.Float64, strict=False)
    if by.is_null().any() or not by.is_finite().all():
        raise DataError(f"{path}: column {order} holds {table[order].filter(by.is_null() | ~by.is_finite())[0]!r}")
    table = table.select(ROW, _as_text(table, ITEM_ID, path), (by if order == RANK else -by).alias("by"))
    for columns, what in (([ROW, ITEM_ID], "item"), *([([ROW, "by"], "rank")] if order == RANK else [])):
        again = table.filter(pl.len().over(columns) > 1)
        if again.height:
            raise DataError(f"{path}: the list of row {again[ROW][0]} has {what} {again[columns[1]][0]} more than once")
    table = table.sort(ROW, "by", maintain_order=True)
    return table.with_columns(pl.int_range(pl.len()).over(ROW).alias("place"))


def measure(lists: ForeignLists, dataset: Dataset, split: Split, cfg: EvalConfig) -> EvalResult:
    """Recall@K, NDCG@K and what lies beyond them, as ``evaluate.evaluate`` measures a policy.

    A list names items, not token paths, so each hit counts in full. The popularity bias is that of whole histories.
    """
    samples = _without_prompts(split)
    hit_BK = lists.item_BK == samples.target_N[:, None]
    rank_B = np.where(hit_BK.any(axis=1), hit_BK.argmax(axis=1), -1)
    listed_B = (lists.item_BK != -1).sum(axis=1)
    table = per_user_table(samples, rank_B, np.ones(len(split)), listed_B, cfg)
    metrics = {name: table[name].to_numpy() for name in metric_names(cfg.ks, cfg.metrics)}
    intervals = {name: share_interval(values_B) for name, values_B in metrics.items()}
    items = one_path_each(len(dataset.items))
    item_BK = lists.item_BK[:, : max(cfg.ks)]
    leaf_BK = np.where(item_BK >= 0, items.leaf_I[np.maximum(item_BK, 0)], -1)
    popularity_I = sequence_counts(_without_prompts(dataset.train), len(items))
    beyond = beyond_accuracy(leaf_BK, items, samples.history.in_memory(), cfg.ks, popularity_I)
    return EvalResult(
        means={name: interval.mean for name, interval in intervals.items()},
        intervals={name: (interval.low, interval.high) for name, interval in intervals.items()},
        rows=len(split),
        invalid_rate=lists.unknown / max(1, int(listed_B.sum())),
        collisions=0,
        short_rows=float((listed_B < max(cfg.ks)).mean()),
        coverage=float(len(np.unique(leaf_BK[leaf_BK >= 0])) / len(items)),
        beams=lists.item_BK.shape[1],
        collision=cfg.collision,
        per_user=table,
        beyond={name: value for name, value in beyond.items() if not name.startswith("first_codes")},
    )


def _without_prompts(split: Split) -> Samples:
    """The rows of a split as samples; nothing here reads their prompts."""
    return Samples(split.history, split.target_N, split.user_N, split.history)


def one_path_each(num_items: int) -> Catalog:
    """A catalog in which every item is one token of its own: for lists of items, which know nothing of tokens."""
    names = [str(item) for item in range(num_items)]
    paths = TokenRows(np.arange(num_items, dtype=np.int64), np.arange(num_items + 1, dtype=np.int64))
    return Catalog(names, names, "sid", paths, TokenTrie.from_paths(paths))
