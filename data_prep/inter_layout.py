"""Import of the MiniOneRec / RecBole layout: ready-made splits, items and code indices.

``NAME.{train,valid,test}.inter`` (TSV; header user_id:token, item_id_list:token_seq, item_id:token). If there are any:
``NAME.item.json`` ({item: {title, description, brand, categories}}) or RecBole's ``NAME.item``, and
``NAME.index*.json`` ({item: [codes]}). Tokens are text; where all users are numbers, they keep them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.config.schema import ColumnsConfig, PrepareConfig
from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION, PRICE, Split
from tawin_nemo.data_prep.dataset import Prepared, Step
from tawin_nemo.data_prep.item_texts import ready_made
from tawin_nemo.data_prep.table_items import read_items
from tawin_nemo.data_prep.tables import open_table
from tawin_nemo.types import EXTERNAL_ID, HISTORY, ITEM, SPLITS, TARGET, TITLE, USER, TokenRows
from tawin_nemo.util.errors import DataError

HEADER = {"user_id:token": USER, "item_id_list:token_seq": HISTORY, "item_id:token": TARGET}


def find_name(root: Path) -> str:
    """NAME of the only ``NAME.train.inter`` in ``root``. Raises DataError if there is none or more than one."""
    names = sorted(path.name.removesuffix(".train.inter") for path in root.glob("*.train.inter"))
    if len(names) != 1:
        contents = f"found {', '.join(names)}" if names else "found none"
        raise DataError(f"{root} must hold exactly one NAME.train.inter, {contents}")
    return names[0]


def source_files(root: Path) -> list[Path]:
    """All files of the layout: three splits, the item file if there is one, code indices.

    Raises DataError naming missing splits.
    """
    name = find_name(root)
    files = [root / f"{name}.{split}.inter" for split in SPLITS]
    if missing := [path.name for path in files if not path.is_file()]:
        raise DataError(f"{root} lacks {', '.join(missing)}")
    items = [path for path in (root / f"{name}.item.json", root / f"{name}.item") if path.is_file()][:1]
    return files + items + sorted(root.glob(f"{name}.index*.json"))


def read(root: Path, name: str, max_history: int, prepare: PrepareConfig | None = None) -> Prepared:
    """Splits and titles as they are; time = row number over train, valid and test.

    Items are numbered as in ``NAME.item.json`` where its keys are 0..I-1, else by their sorted ids; without an item
    file the items are those of the splits, and ids are their titles. Histories are cut to their newest ``max_history``
    items. The code indices are copied byte for byte. Raises DataError for another header, for rows without user,
    history or target, and for items that the item file does not have.
    """
    files = source_files(root)
    tables = {split: _read_tokens(path) for split, path in zip(SPLITS, files, strict=False)}
    item_file = next((path for path in files[3:] if ".item" in path.name), None)
    items = ready_made(_items(item_file, tables), prepare or PrepareConfig(), name)
    ids = items[EXTERNAL_ID].to_list()
    users = _users(tables)
    splits, row = {}, 0
    for (split, frame), path in zip(tables.items(), files, strict=False):
        splits[split] = _numbered(frame, path, row, ids, users, max_history)
        row += len(splits[split])
    longest = max(int(samples.history.lengths.max()) for samples in splits.values())
    return Prepared(
        name, "inter", items, splits, min(max_history, longest),
        [Step("samples as imported", row, users.height, items.height)],
        extra_files={path.name: path.read_bytes() for path in files[3:] if path != item_file},
        users=users, has_titles=item_file is not None,
    )  # fmt: skip


def _read_tokens(path: Path) -> pl.DataFrame:
    """USER, HISTORY (list) and TARGET of each row, as text."""
    try:
        frame = pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} cannot be read as a table with tabs: {error}") from error
    if not set(HEADER) <= set(frame.columns):
        raise DataError(f"{path} has the header {frame.columns}, expected {list(HEADER)}")
    if frame.height == 0:
        raise DataError(f"{path} has no rows; every split needs at least one")
    frame = frame.select(pl.col(theirs).alias(ours) for theirs, ours in HEADER.items())
    return frame.with_columns(pl.col(HISTORY).str.strip_chars().str.split(" "))


def _users(tables: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """USER and EXTERNAL_ID of all users, by user: their own numbers where all are numbers, else the order of ids."""
    ids = pl.concat([frame[USER] for frame in tables.values()]).drop_nulls().unique().sort()
    numbers = ids.cast(pl.Int64, strict=False)
    if numbers.null_count() or (numbers.cast(pl.String) != ids).any():
        numbers = pl.int_range(len(ids), dtype=pl.Int64, eager=True)
    return pl.DataFrame({USER: numbers, EXTERNAL_ID: ids}).sort(USER)


def _numbered(
    frame: pl.DataFrame, path: Path, first_row: int, ids: list[str], users: pl.DataFrame, max_history: int
) -> Split:  # fmt: skip
    def places(column: pl.Expr) -> pl.Expr:
        return column.replace_strict(ids, list(range(len(ids))), default=None, return_dtype=pl.Int64)

    user = pl.col(USER).replace_strict(users[EXTERNAL_ID], users[USER], default=None, return_dtype=pl.Int64)
    numbers = frame.select(user, pl.col(HISTORY).list.eval(places(pl.element())), places(pl.col(TARGET)))
    good = numbers.select(
        pl.col(USER).is_not_null()
        & pl.col(TARGET).is_not_null()
        & pl.col(HISTORY).list.eval(pl.element().is_not_null()).list.all().fill_null(False)
    ).to_series()
    if not good.all():
        row = int((~good).arg_max() or 0)
        raise DataError(
            f"{path} line {row + 2}: {frame.row(row)} must be a user, items and a target item, all of them among the "
            f"{len(ids)} items of the item file (such as {ids[0]!r})"
        )
    lists = numbers[HISTORY].list.tail(max_history)
    offsets = np.concatenate([[0], np.cumsum(lists.list.len().to_numpy().astype(np.int64))])
    history = TokenRows(lists.explode().to_numpy().astype(np.int64), offsets)
    time_N = np.arange(first_row, first_row + frame.height, dtype=np.int64)
    return Split(numbers[USER].to_numpy(), history, numbers[TARGET].to_numpy(), time_N)


def _items(path: Path | None, tables: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """The columns of items.parquet: from the item file, else the ids that the splits name."""
    if path is not None and path.suffix == ".json":
        return _read_items(path)
    if path is None:
        named = [series for frame in tables.values() for series in (frame[HISTORY].explode(), frame[TARGET])]
        ids = pl.concat(named).drop_nulls().unique()
        texts = pl.DataFrame({EXTERNAL_ID: ids, TITLE: ids} | {key: [""] * len(ids) for key in _OTHERS})
    else:
        table = open_table(path, ColumnsConfig())
        if table is None:
            raise DataError(f"{path} has no columns; RecBole's item file is a table with tabs")
        texts = read_items(table)
    texts = texts.filter(pl.col(EXTERNAL_ID) != "").sort(pl.col(EXTERNAL_ID).cast(pl.Int64, strict=False), EXTERNAL_ID)
    return texts.with_row_index(ITEM).with_columns(pl.col(ITEM).cast(pl.Int64))


_OTHERS = (DESCRIPTION, BRAND, CATEGORY, PRICE)


def _read_items(path: Path) -> pl.DataFrame:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path} must be an object {{item number: {{title, ...}}}}")
    numbered = all(name.isdigit() for name in entries)
    names = [str(item) for item in range(len(entries))] if numbered else sorted(entries)
    if set(entries) != set(names):
        missing, odd = [name for name in names if name not in entries], sorted(set(entries) - set(names))
        raise DataError(
            f"{path} must be an object with the keys 0..{len(entries) - 1} for its {len(entries)} items; "
            f"{_shown(missing)} missing, {_shown(odd)} not among them"
        )
    rows = [entries[name] for name in names]
    shown = range(len(rows)) if numbered else names
    if wrong := [item for item, row in zip(shown, rows, strict=True) if not _has_title(row)]:
        raise DataError(f"{path}: {len(wrong)} items have no title, e.g. {wrong[:5]}; every item needs one")
    texts = {TITLE: "title", DESCRIPTION: "description", BRAND: "brand", CATEGORY: "categories", PRICE: "price"}
    columns = {ours: [_text(row.get(theirs)) for row in rows] for ours, theirs in texts.items()}
    identity = {ITEM: range(len(rows)), EXTERNAL_ID: names}
    return pl.DataFrame(identity | columns, schema_overrides={ITEM: pl.Int64, **dict.fromkeys(texts, pl.String)})


def _shown(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (" ..." if len(names) > 5 else "")


def _has_title(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("title"), str) and bool(row["title"].strip())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(str(part) for part in value)
    return "" if value is None else str(value).strip()
