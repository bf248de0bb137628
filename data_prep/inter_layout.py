"""Import of the MiniOneRec / RecBole layout: ready-made splits, items and code indices.

``NAME.{train,valid,test}.inter`` (TSV; header user_id:token, item_id_list:token_seq, item_id:token), ``NAME.item.json``
({item: {title, description, brand, categories}}) and any ``NAME.index*.json`` ({item: [codes]}).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION, Split
from tawin_nemo.data_prep.dataset import Prepared, Step
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
    """All files of the layout. Raises DataError naming the missing ones."""
    name = find_name(root)
    files = [root / f"{name}.{split}.inter" for split in SPLITS] + [root / f"{name}.item.json"]
    if missing := [path.name for path in files if not path.is_file()]:
        raise DataError(f"{root} lacks {', '.join(missing)}")
    return files + sorted(root.glob(f"{name}.index*.json"))


def read(root: Path, name: str, max_history: int) -> Prepared:
    """Splits and titles as they are; item index = item id, time = row number over train, valid and test.

    Histories are cut to their newest ``max_history`` items. The code indices are copied byte for byte. Raises DataError
    for another header, rows that are not numbers, and item ids that are not 0..I-1.
    """
    files = source_files(root)
    items = _read_items(files[3])
    splits, row = {}, 0
    for split, path in zip(SPLITS, files, strict=False):
        splits[split] = _read_split(path, row, items.height, max_history)
        row += len(splits[split])
    users = len(np.unique(np.concatenate([samples.user_N for samples in splits.values()])))
    longest = max(int(samples.history.lengths.max()) for samples in splits.values())
    steps = [Step("samples as imported", row, users, items.height)]
    return Prepared(
        name,
        "inter",
        items,
        splits,
        min(max_history, longest),
        steps,
        extra_files={path.name: path.read_bytes() for path in files[4:]},
    )


def _read_split(path: Path, first_row: int, num_items: int, max_history: int) -> Split:
    try:
        frame = pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} cannot be read as a table with tabs: {error}") from error
    if frame.columns != list(HEADER):
        raise DataError(f"{path} has the header {frame.columns}, expected {list(HEADER)}")
    if frame.height == 0:
        raise DataError(f"{path} has no rows; every split needs at least one")
    frame = frame.rename(HEADER).with_columns(pl.col(HISTORY).str.strip_chars().str.split(" "))
    numbers = frame.select(
        pl.col(USER).cast(pl.Int64, strict=False),
        pl.col(HISTORY).cast(pl.List(pl.Int64), strict=False),
        pl.col(TARGET).cast(pl.Int64, strict=False),
    )
    known = pl.element().is_between(0, num_items - 1).fill_null(False)
    good = numbers.select(
        pl.col(USER).is_not_null()
        & pl.col(TARGET).is_between(0, num_items - 1).fill_null(False)
        & pl.col(HISTORY).list.eval(known).list.all().fill_null(False)
    ).to_series()
    if not good.all():
        row = int((~good).arg_max() or 0)
        raise DataError(
            f"{path} line {row + 2}: {frame.row(row)} must be a user number, item numbers and a target item number, "
            f"items 0..{num_items - 1} as in the item file"
        )
    lists = numbers[HISTORY].list.tail(max_history)
    offsets = np.concatenate([[0], np.cumsum(lists.list.len().to_numpy().astype(np.int64))])
    history = TokenRows(lists.explode().to_numpy().astype(np.int64), offsets)
    time_N = np.arange(first_row, first_row + frame.height, dtype=np.int64)
    return Split(numbers[USER].to_numpy(), history, numbers[TARGET].to_numpy(), time_N)


def _read_items(path: Path) -> pl.DataFrame:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path} must be an object {{item number: {{title, ...}}}}")
    names = [str(item) for item in range(len(entries))]
    if set(entries) != set(names):
        missing, odd = [name for name in names if name not in entries], sorted(set(entries) - set(names))
        raise DataError(
            f"{path} must be an object with the keys 0..{len(entries) - 1} for its {len(entries)} items; "
            f"{_shown(missing)} missing, {_shown(odd)} not among them"
        )
    rows = [entries[str(item)] for item in range(len(entries))]
    if wrong := [item for item, row in enumerate(rows) if not _has_title(row)]:
        raise DataError(f"{path}: {len(wrong)} items have no title, e.g. {wrong[:5]}; every item needs one")
    texts = {TITLE: "title", DESCRIPTION: "description", BRAND: "brand", CATEGORY: "categories"}
    columns = {ours: [_text(row.get(theirs)) for row in rows] for ours, theirs in texts.items()}
    identity = {ITEM: range(len(rows)), EXTERNAL_ID: [str(item) for item in range(len(rows))]}
    return pl.DataFrame(identity | columns, schema_overrides={ITEM: pl.Int64, **dict.fromkeys(texts, pl.String)})


def _shown(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (" ..." if len(names) > 5 else "")


def _has_title(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("title"), str) and bool(row["title"].strip())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(str(part) for part in value)
    return "" if value is None else str(value).strip()
