"""Which rows come when, and who takes them: epochs, shares of the replicas, groups under a token budget.

The order of the data is a pure function of (seed, step): nothing has to be saved to continue a run, and every
process computes the same order and takes its own share of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tawin_nemo.types import DataParallel


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``0..n-1`` that depends on its three arguments only; int32 where that is enough.

    It is ``Generator.permutation(n)`` of NumPy, whose shuffle draws the same for every type of number.
    """
    order = np.arange(n, dtype=np.int32 if n <= np.iinfo(np.int32).max else np.int64)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


@dataclass(frozen=True)
class BatchStream:
    """Endless batches over ``n`` rows: shuffled epochs one after another, each row once per epoch.

    A batch may hold the end of one epoch and the beginning of the next; all batches have ``batch_size`` rows.
    """

    n: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1:
            raise ValueError(f"a stream needs rows and a batch size, not n={self.n}, batch_size={self.batch_size}")

    def batch(self, step: int) -> np.ndarray:
        """Row indices of step ``step`` (0-based)."""
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        for epoch in range(start // self.n, (stop - 1) // self.n + 1):
            order, first = self.order(epoch), epoch * self.n
            parts.append(order[max(start - first, 0) : stop - first])
        return np.concatenate(parts).astype(np.int64, copy=False)

    def order(self, epoch: int) -> np.ndarray:
        """Row indices of one epoch in the order in which batches take them; read-only, kept for the next batch."""
        return _order_of(self, epoch)

    def make_order(self, epoch: int) -> np.ndarray:
        """``order``, made anew."""
        return epoch_order(self.n, self.seed, epoch)

    def epoch(self, step: int) -> float:
        """Passes over the data before step ``step``, as a fraction."""
        return step * self.batch_size / self.n


@dataclass(frozen=True)
class MixedStream(BatchStream):
    """Epochs over several sources whose rows are numbered one source after another.

    An epoch takes ``shares[i]`` of the ``sizes[i]`` rows of source i: all of them, or as many as come next in an
    endless shuffled stream over that source, so that in time all its rows come equally often. Then everything is
    shuffled.
    """

    sizes: tuple[int, ...] = ()
    shares: tuple[int, ...] = ()

    @classmethod
    def of(cls, sizes: Sequence[int], shares: Sequence[int], batch_size: int, seed: int) -> MixedStream:
        """A stream with batches of at most one epoch. With one source it equals ``BatchStream``, row by row."""
        n = sum(shares)
        return cls(n, min(batch_size, n), seed, tuple(sizes), tuple(shares))

    def make_order(self, epoch: int) -> np.ndarray:
        """The row numbers of one epoch in the order in which batches take them: a share of each source, shuffled."""
        if self.shares == self.sizes:  # row i is number i
            return epoch_order(self.n, self.seed, epoch)
        parts, first = [], 0
        for source, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            if share == size:
                parts.append(first + np.arange(size))
            elif share:
                parts.append(first + BatchStream(size, share, self.seed + source).batch(epoch))
            first += size
        return np.concatenate(parts)[epoch_order(self.n, self.seed, epoch)]


@lru_cache(maxsize=2)
def _order_of(stream: BatchStream, epoch: int) -> np.ndarray:
    """The order of an epoch. A stage takes hundreds of batches of one epoch, and shuffling takes time for all rows."""
    order = stream.make_order(epoch)
    order.setflags(write=False)
    return order


def micro_batches(tokens_B: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Split prompts into groups of similar size with at most ``token_budget`` tokens each; batches have no padding.

    Largest first, so that a batch too large for the memory fails at once; every prompt is in one group. A prompt larger
    than the budget is a group of its own.
    """
    order = np.argsort(-np.asarray(tokens_B), kind="stable")
    until = np.concatenate([[0], np.cumsum(np.asarray(tokens_B)[order])])
    groups, start = [], 0
    while start < len(order):
        fitting = int(np.searchsorted(until, until[start] + token_budget, side="right")) - 1
        stop = max(start + 1, fitting)
        groups.append(order[start:stop])
        start = stop
    return groups


def shard(rows: np.ndarray, dp: DataParallel) -> np.ndarray:
    """This replica's rows; the replicas' shares are disjoint, together complete, and differ by one row at most."""
    return rows[dp.rank :: dp.size]


def balanced_shard(rows: np.ndarray, lengths_R: np.ndarray, dp: DataParallel) -> np.ndarray:
    """``shard`` with shares of similar total length, for steps in which replicas wait for each other.

    The rows are dealt out from the longest to the shortest, to the replicas up and down in turn; each share keeps the
    order of ``rows``. ``lengths_R`` is the length of each entry of ``rows``.

    Raises ValueError if the two differ in length.
    """
    if len(rows) != len(lengths_R):
        raise ValueError(f"{len(rows)} rows but {len(lengths_R)} lengths; give one length per row")
    turn_R, seat_R = np.divmod(np.arange(len(rows)), dp.size)
    mine_R = np.where(turn_R % 2 == 0, seat_R, dp.size - 1 - seat_R) == dp.rank
    dealt_R = np.argsort(-np.asarray(lengths_R), kind="stable")
    return rows[np.sort(dealt_R[mine_R])]
