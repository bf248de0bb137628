"""Import of S-DPO's JSON with candidate sets: ``NAME-{train,val,test}.json`` (the repository of arXiv 2406.09215).

A file is a list of rows: ``historyList`` (item names joined by ``::``, or a list of names, oldest first), ``itemList``
(the candidates, the target among them) and ``trueSelection`` (the target). Rows of one user follow each other, each
history continuing the one before; users are numbered from that. Where no train file is published (LastFM), the last
tenth of the val file's users is the split valid and the others are train.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.config.schema import PrepareConfig
from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION, PRICE, Split
from tawin_nemo.data_prep.dataset import Prepared, Step
from tawin_nemo.data_prep.item_texts import ready_made
from tawin_nemo.types import EXTERNAL_ID, ITEM, SPLITS, TITLE, TokenRows
from tawin_nemo.util.errors import DataError

KEYS = ("historyList", "itemList", "trueSelection")
#: Endings of the files of each split.
ENDINGS = {"train": ("-train.json",), "valid": ("-val.json", "-valid.json"), "test": ("-test.json",)}
#: Share of the val file's users that are valid where there is no train file.
VALID_SHARE = 0.1


@dataclass(frozen=True)
class NamedRow:
    """One row of a file, in item names."""

    history: list[str]
    candidates: list[str]
    target: str

    def continues(self, earlier: NamedRow) -> bool:
        """This row is the next one of the same user: its history is the earlier one and its target."""
        before = [*earlier.history, earlier.target]
        return len(self.history) > 1 and self.history == before[-len(self.history) :]


def found_in(root: Path) -> bool:
    """Whether ``root`` holds a val and a test file of this layout."""
    return bool(_files(root, "valid")) and bool(_files(root, "test"))


def source_files(root: Path) -> list[Path]:
    """The files of the layout: train if there is one, val, test. Raises DataError unless there is one each."""
    files = []
    for split in SPLITS:
        paths = _files(root, split)
        if len(paths) > 1 or (not paths and split != "train"):
            found = ", ".join(path.name for path in paths) or "none"
            raise DataError(f"{root} must hold one file *{' or *'.join(ENDINGS[split])}, found {found}")
        files += paths
    return files


def _files(root: Path, split: str) -> list[Path]:
    return sorted(path for ending in ENDINGS[split] for path in root.glob(f"*{ending}"))


def read(root: Path, name: str, max_history: int, prepare: PrepareConfig | None = None) -> Prepared:
    """Splits with candidates; items are all names that occur, in alphabetical order, time = row number.

    Histories are cut to their newest ``max_history`` items. Raises DataError naming file, row and key for a row that is
    not of this layout, a target that is not among its candidates, candidates that come twice, and sets of other sizes.
    """
    files = source_files(root)
    parts = [_read_rows(path) for path in files]
    if len(files) == 2:
        parts = [*_train_and_valid(parts[0]), parts[1]]
    size = len(parts[0][0].candidates)
    names = sorted({text for rows in parts for row in rows for text in (*row.history, *row.candidates)})
    index = {text: item for item, text in enumerate(names)}
    splits, first_row, first_user = {}, 0, 0
    for split, rows in zip(SPLITS, parts, strict=True):
        users = first_user + _users(rows)
        splits[split] = _split(rows, users, index, first_row, max_history)
        if wrong := [number for number, row in enumerate(rows) if len(row.candidates) != size]:
            raise DataError(f"{split} row {wrong[0]} has {len(rows[wrong[0]].candidates)} candidates, others {size}")
        first_row, first_user = first_row + len(rows), int(users[-1]) + 1
    items = pl.DataFrame(
        {ITEM: range(len(names)), EXTERNAL_ID: names, TITLE: names} | {key: [""] * len(names) for key in _EMPTY},
        schema_overrides={ITEM: pl.Int64},
    )
    longest = max(int(rows.history.lengths.max()) for rows in splits.values())
    steps = [Step("rows as imported", first_row, first_user, len(names))]
    items = ready_made(items, prepare or PrepareConfig(), name)
    return Prepared(name, "candidates", items, splits, min(max_history, longest), steps)


_EMPTY = (DESCRIPTION, BRAND, CATEGORY, PRICE)


def _read_rows(path: Path) -> list[NamedRow]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} must be a list of at least one object with the keys {', '.join(KEYS)}")
    return [_read_row(entry, f"{path} row {number}") for number, entry in enumerate(entries)]


def _read_row(entry: Any, where: str) -> NamedRow:
    if not isinstance(entry, dict) or not entry.keys() >= set(KEYS):
        raise DataError(f"{where} must be an object with the keys {', '.join(KEYS)}")
    history, candidates, target = (entry[key] for key in KEYS)
    history = history.split("::") if isinstance(history, str) else history
    for key, names in (("historyList", history), ("itemList", candidates), ("trueSelection", [target])):
        named = isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)
        if not named or not names:
            raise DataError(f"{where}: {key} must hold item names, not {str(entry[key])[:80]!r}")
    row = NamedRow([name.strip() for name in history], [name.strip() for name in candidates], target.strip())
    if row.target not in row.candidates:
        raise DataError(f"{where}: trueSelection {row.target!r} is not in itemList")
    if len(set(row.candidates)) < len(row.candidates):
        twice = next(name for name in row.candidates if row.candidates.count(name) > 1)
        raise DataError(f"{where}: itemList holds {twice!r} twice")
    return row


def _users(rows: list[NamedRow]) -> np.ndarray:
    """User of each row, counted from 0 in the order of the file. [N]."""
    is_new = [number == 0 or not row.continues(rows[number - 1]) for number, row in enumerate(rows)]
    return np.cumsum(is_new, dtype=np.int64) - 1


def _train_and_valid(rows: list[NamedRow]) -> tuple[list[NamedRow], list[NamedRow]]:
    """The rows of the earlier users, and those of the last tenth of them."""
    users = _users(rows)
    count = int(users[-1]) + 1
    if count < 2:
        raise DataError("the val file holds one user only; without a train file it is divided by users into both")
    first = int(np.searchsorted(users, count - max(1, round(VALID_SHARE * count))))
    return rows[:first], rows[first:]


def _split(
    rows: list[NamedRow], user_N: np.ndarray, index: dict[str, int], first_row: int, max_history: int
) -> Split:  # fmt: skip
    def numbered(names: list[list[str]]) -> TokenRows:
        return TokenRows.from_lists([[index[name] for name in row] for row in names])

    return Split(
        user_N,
        numbered([row.history[-max_history:] for row in rows]),
        np.array([index[row.target] for row in rows], dtype=np.int64),
        np.arange(first_row, first_row + len(rows), dtype=np.int64),
        numbered([row.candidates for row in rows]),
    )
