"""Ragged rows that are made when they are asked for, so that a process does not hold those of a whole split.

``TokenSource`` is what they have in common with ``TokenRows``. Axes: N rows, M rows that are asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tawin_nemo.types import TokenRows


class TokenSource(Protocol):
    """N ragged rows of token ids or item indices, in memory (``TokenRows``) or lazy."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> np.ndarray: ...

    @property
    def lengths(self) -> np.ndarray:
        """Entries of each row, [N] int64: a new array."""

    @property
    def longest(self) -> int:
        """Entries of the longest row, 0 without rows."""

    @property
    def num_tokens(self) -> int:
        """Entries of all rows together."""

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Entries of the rows with indices ``rows`` [M], int64."""

    def take(self, rows: np.ndarray) -> TokenRows:
        """The rows with indices ``rows`` [M], in that order, in memory."""

    def select(self, rows: np.ndarray) -> TokenSource:
        """The rows with indices ``rows`` [M], in that order; lazy rows stay lazy."""

    def in_memory(self) -> TokenRows:
        """All rows, in memory."""


class LazyRows(ABC):
    """What follows from ``take``, ``lengths_of`` and the number of rows."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Entries of the rows with indices ``rows`` [M], int64."""

    @abstractmethod
    def take(self, rows: np.ndarray) -> TokenRows:
        """The rows with indices ``rows`` [M], in that order, in memory."""

    def __getitem__(self, row: int) -> np.ndarray:
        return self.take(np.array([row], dtype=np.int64)).flat

    @property
    def lengths(self) -> np.ndarray:
        """Entries of each row, [N] int64: a new array."""
        return self.lengths_of(np.arange(len(self)))

    @property
    def longest(self) -> int:
        """Entries of the longest row, 0 without rows."""
        return int(self.lengths.max(initial=0))

    @property
    def num_tokens(self) -> int:
        """Entries of all rows together."""
        return int(self.lengths.sum())

    def select(self, rows: np.ndarray) -> TokenSource:
        """The rows with indices ``rows`` [M], in that order, made no sooner than these are."""
        return SelectedRows(self, np.asarray(rows, dtype=np.int64))

    def in_memory(self) -> TokenRows:
        """All rows, in memory."""
        return self.take(np.arange(len(self)))


@dataclass(frozen=True)
class SelectedRows(LazyRows):
    """Rows ``rows`` [N] of ``source``, in that order."""

    source: TokenSource
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Entries of the rows with indices ``rows`` [M], int64."""
        return self.source.lengths_of(self.rows[rows])

    def take(self, rows: np.ndarray) -> TokenRows:
        """The rows with indices ``rows`` [M], in that order, in memory."""
        return self.source.take(self.rows[rows])

    def select(self, rows: np.ndarray) -> TokenSource:
        """The rows with indices ``rows`` [M] of these rows."""
        return SelectedRows(self.source, self.rows[rows])


@dataclass(frozen=True)
class NewestEntries(LazyRows):
    """The last ``kept_N`` entries of each of N rows."""

    whole: TokenRows
    kept_N: np.ndarray

    def __len__(self) -> int:
        return len(self.whole)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Entries of the rows with indices ``rows`` [M], int64."""
        return self.kept_N[rows].astype(np.int64, copy=False)

    def take(self, rows: np.ndarray) -> TokenRows:
        """The rows with indices ``rows`` [M], in that order, in memory."""
        return newest(self.whole, rows, self.lengths_of(rows))


def newest(whole: TokenRows, rows: np.ndarray, kept_M: np.ndarray) -> TokenRows:
    """The last ``kept_M`` entries of each of the rows ``rows`` [M] of ``whole``, which have at least so many.

    >>> some = newest(TokenRows.from_lists([[1, 2], [3, 4, 5]]), np.array([1, 0]), np.array([2, 1]))
    >>> some[0].tolist(), some[1].tolist()
    ([4, 5], [2])
    """
    rows = np.asarray(rows, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(kept_M)]).astype(np.int64)
    source = np.repeat(whole.offsets[rows + 1] - offsets[1:], kept_M) + np.arange(offsets[-1])
    return TokenRows(whole.flat[source].astype(np.int64, copy=False), offsets)


@dataclass(frozen=True)
class JoinedRows(LazyRows):
    """The rows of several sources, one source after another."""

    parts: tuple[TokenSource, ...]

    @classmethod
    def of(cls, parts: Sequence[TokenSource]) -> TokenSource:
        """The rows of at least one part; a single part is returned as it is."""
        return parts[0] if len(parts) == 1 else cls(tuple(parts))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _place(self, rows: np.ndarray) -> list[tuple[TokenSource, np.ndarray, np.ndarray]]:
        """For each part that has some of the M rows: which of the M they are, and their indices in the part."""
        rows = np.asarray(rows, dtype=np.int64)
        first = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])
        part_M = np.searchsorted(first[1:], rows, side="right")
        return [
            (self.parts[part], places, rows[places] - first[part])
            for part in np.unique(part_M)
            for places in [np.flatnonzero(part_M == part)]
        ]

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Entries of the rows with indices ``rows`` [M], int64."""
        lengths_M = np.zeros(len(rows), dtype=np.int64)
        for part, places, own in self._place(rows):
            lengths_M[places] = part.lengths_of(own)
        return lengths_M

    def take(self, rows: np.ndarray) -> TokenRows:
        """The rows with indices ``rows`` [M], in that order, in memory."""
        placed = self._place(rows)
        if not placed:
            return TokenRows.from_lists([])
        taken = TokenRows.cat([part.take(own) for part, _, own in placed])
        return taken.take(np.concatenate([places for _, places, _ in placed]).argsort(kind="stable"))
