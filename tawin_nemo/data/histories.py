"""Histories that lists are made for, and those of prepared data: the rows of a split, or each user once.

Histories in files are read by ``history_files``. N: rows of a piece; U: users.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from tawin_nemo.data.interactions import Dataset, Split
from tawin_nemo.types import SPLITS, TokenRows

ROW, USER_ID = "row", "user_id"


@dataclass(frozen=True, eq=False)
class HistoryRows:
    """N rows: ``keys`` name each of them in the output (``user_id``, and ``row`` for a split)."""

    keys: dict[str, pa.Array]
    items: TokenRows  # item indices, oldest first; entries that name no item of the catalog are left out
    unknown_N: np.ndarray  # number of such entries of each row
    unknown_names: list[str] = field(default_factory=list)  # the first of them

    def __len__(self) -> int:
        return len(self.items)

    @property
    def digest(self) -> str:
        """SHA-256 of what lists depend on: names and item indices, however the files divide them."""
        found = hashlib.sha256()
        for name, column in self.keys.items():
            found.update(repr((name, column.to_pylist())).encode())
        for numbers in (self.items.offsets, self.items.flat):
            found.update(np.ascontiguousarray(numbers, dtype=np.int64).tobytes())
        return found.hexdigest()


class Histories(Protocol):
    """A source of histories: ``rows`` in all, and the rows ``begin`` .. ``end`` - 1."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    def read(self, begin: int, end: int) -> HistoryRows:
        """Rows ``begin`` .. ``end`` - 1. Raises DataError for rows that cannot be read."""


@dataclass(frozen=True, eq=False)
class PreparedHistories:
    """The rows of a split, or (``users``) each user of prepared data once."""

    dataset: Dataset
    split: Split
    users: bool

    @classmethod
    def of_users(cls, dataset: Dataset) -> PreparedHistories:
        """Each user once, by number, with all that the data know: their last row's history, then its target."""
        return cls(dataset, newest_rows([getattr(dataset, name) for name in SPLITS]), users=True)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.split)

    def read(self, begin: int, end: int) -> HistoryRows:
        """Rows ``begin`` .. ``end`` - 1; a user without an external id has the number as name where rows have none."""
        part = self.split.slice(begin, end)
        names = self.dataset.user_ids(part.user_N)
        keys = {} if self.users else {ROW: pa.array(np.arange(begin, end, dtype=np.int64))}
        if self.users:
            names = [
                str(number) if name is None else name for name, number in zip(names, part.user_N.tolist(), strict=True)
            ]
        keys[USER_ID] = pa.array(names, type=pa.string())
        return HistoryRows(keys, part.history, np.zeros(len(part), dtype=np.int64))


def newest_rows(splits: Sequence[Split]) -> Split:
    """The last row of each user in ``splits`` (in time order), its target appended to its history; by user number."""
    user_N = np.concatenate([split.user_N for split in splits])
    user_U, from_end_U = np.unique(user_N[::-1], return_index=True)
    row_U = len(user_N) - 1 - from_end_U
    starts = np.cumsum([0, *map(len, splits)])
    histories, targets, times, places = [], [], [], []
    for start, split in zip(starts.tolist(), splits, strict=False):
        place = np.flatnonzero((row_U >= start) & (row_U < start + len(split)))
        rows = row_U[place] - start
        histories.append(split.history.take(rows))
        targets.append(split.target_N[rows])
        times.append(split.time_N[rows])
        places.append(place)
    order = np.argsort(np.concatenate(places))
    history, target_U = TokenRows.cat(histories).take(order), np.concatenate(targets)[order]
    offsets = history.offsets + np.arange(len(history.offsets))
    flat = np.empty(int(offsets[-1]), dtype=np.int64)
    is_target = np.zeros(len(flat), dtype=bool)
    is_target[offsets[1:] - 1] = True
    flat[is_target], flat[~is_target] = target_U, history.flat
    return Split(user_U, TokenRows(flat, offsets), target_U, np.concatenate(times)[order])
