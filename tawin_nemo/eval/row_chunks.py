"""Rows shared out over the replicas of a model, prompts of alike length together, and put back in order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tawin_nemo.data.samples import Samples
from tawin_nemo.types import DataParallel
from tawin_nemo.util.errors import DataError

#: Rows that are decoded at once.
CHUNK_ROWS = 128


def row_chunks(samples: Samples, dp: DataParallel, label: str) -> list[np.ndarray]:
    """This replica's rows of ``samples``, longest prompts first, in chunks. Raises DataError without rows."""
    if len(samples) == 0:
        raise DataError(f"{label}: no rows to evaluate; check data.eval_limit and the split")
    mine = np.arange(len(samples))[dp.rank :: dp.size]
    mine = mine[np.argsort(-samples.prompts.lengths_of(mine), kind="stable")]
    return [mine[start : start + CHUNK_ROWS] for start in range(0, len(mine), CHUNK_ROWS)]


def in_row_order(
    dp: DataParallel, chunks: Sequence[np.ndarray], parts: Sequence[np.ndarray], like: np.ndarray
) -> np.ndarray:
    """The values of all rows, in their order, on every replica; ``parts`` are those of this replica's ``chunks``.

    ``like`` has the shape and the type of a part without rows: a replica may have none. Collective.
    """
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *chunks])
    gathered = dp.gather((rows, np.concatenate([like, *parts])))
    order = np.concatenate([rows for rows, _ in gathered]).argsort(kind="stable")
    values: np.ndarray = np.concatenate([part for _, part in gathered])[order]
    return values
