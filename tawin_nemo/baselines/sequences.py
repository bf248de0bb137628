"""Training rows of one user as one sequence: a causal model learns all its targets in one pass.

Sliding-window data repeat the history: the rows of a user are (x1 -> x2), (x1 x2 -> x3), ... As a sequence they are the
items x1 x2 ... that are read and, at each position, the item to predict. Only targets of the given rows are predicted,
so what is not in train cannot be learned. Axes: N rows, C chains of rows, P positions, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tawin_nemo.data.samples import Samples
from tawin_nemo.types import NO_ITEM, TokenRows


@dataclass(frozen=True)
class Sequences:
    """S sequences: the items that are read, oldest first, and the item to predict at each of them.

    ``targets`` has the shape of ``inputs`` and NO_ITEM where nothing is predicted: the next item is no target there.
    """

    inputs: TokenRows
    targets: TokenRows

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def num_targets(self) -> int:
        """Positions at which an item is predicted."""
        return int((self.targets.flat != NO_ITEM).sum())

    def take(self, rows: np.ndarray) -> Sequences:
        """The sequences at indices ``rows`` [M], in that order."""
        return Sequences(self.inputs.take(rows), self.targets.take(rows))


def user_sequences(samples: Samples, max_length: int) -> Sequences:
    """The rows of ``samples``, which are in time order, as sequences of at most ``max_length`` inputs.

    Every row's target is predicted exactly once. A row continues the row before it of the same user if its history is
    the end of that row's history and target; else a new sequence begins. Longer sequences are cut from the newest end
    into pieces that share no target: the first targets of an older piece have less context than their rows.
    """
    order_N = np.argsort(samples.user_N, kind="stable")
    history, target_N = samples.history.take(order_N), samples.target_N[order_N].astype(np.int64)
    first_C = np.flatnonzero(~_continues(samples.user_N[order_N], history, target_N))
    rows_C = np.diff(np.append(first_C, len(target_N)))
    known_C = history.lengths_of(first_C)  # items before the first target
    length_C = known_C + rows_C - 1
    chain_P = np.repeat(np.arange(len(first_C)), length_C + 1)
    place_P = np.arange(len(chain_P)) - (np.cumsum(length_C + 1) - length_C - 1)[chain_P]
    known_P = place_P < known_C[chain_P]
    item_P = np.empty(len(chain_P), dtype=np.int64)
    item_P[known_P] = history.take(first_C).flat
    item_P[~known_P] = target_N
    inputs = item_P[place_P < length_C[chain_P]]
    targets = np.where(known_P, NO_ITEM, item_P)[place_P > 0]
    offsets_S = _pieces(length_C, max_length)
    pieces = Sequences(TokenRows(inputs, offsets_S), TokenRows(targets, offsets_S))
    return pieces.take(np.flatnonzero(np.add.reduceat(targets != NO_ITEM, offsets_S[:-1])))


def _continues(user_N: np.ndarray, history: TokenRows, target_N: np.ndarray) -> np.ndarray:
    """Whether each row's history is the end of the history and target of the row before it, of the same user. [N]"""
    length_N, offset_N = history.lengths, history.offsets[:-1]
    row_P = np.repeat(np.arange(len(target_N)), length_N)
    from_end_P = history.offsets[1:][row_P] - np.arange(len(row_P))  # 1 at a row's newest item
    before_P = np.maximum(row_P - 1, 0)
    # Item j from the end must be the target of the row before (j = 1), or its history's item j - 1 from the end.
    reaches_P = from_end_P - 1 <= length_N[before_P]
    place_P = np.clip(offset_N[before_P] + length_N[before_P] - (from_end_P - 1), 0, len(row_P) - 1)
    expected_P = np.where(from_end_P == 1, target_N[before_P], history.flat[place_P])
    wrong_N = np.bincount(row_P, weights=~reaches_P | (history.flat != expected_P), minlength=len(target_N)) > 0
    same_N = np.append(False, user_N[1:] == user_N[:-1])[: len(target_N)]
    return same_N & ~wrong_N


def _pieces(length_C: np.ndarray, longest: int) -> np.ndarray:
    """Offsets [S + 1] of pieces with ``longest`` positions, the oldest piece of each chain taking the rest.

    >>> _pieces(np.array([3, 7]), 3).tolist()
    [0, 3, 4, 7, 10]
    """
    count_C = -(-length_C // longest)
    piece_S = np.arange(count_C.sum()) - np.repeat(np.cumsum(count_C) - count_C, count_C)
    rest_S = np.repeat(length_C - longest * (count_C - 1), count_C)
    return np.concatenate([[0], np.cumsum(np.where(piece_S == 0, rest_S, longest))]).astype(np.int64)
