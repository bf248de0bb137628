"""AUC, partial and windowed partial AUC over the full catalog, and how hard the beams' negatives are (``eval.auc``).

The papers' argument is about areas under the ROC curve: random negatives train AUC, beam negatives partial AUC, TAWin
its window. Here every path of the catalog is ranked for every row, so the figures are exact. Axes beyond ``types``: L
paths (leaves of the trie); items on one path are one negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.schema import EvalConfig
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.measured import Measured
from tawin_nemo.eval.row_chunks import in_row_order
from tawin_nemo.rollout.assist import histories_for
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.types import DataParallel
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.log import progress

#: Rows that are ranked at once, before the engine's own division by ``eval.token_budget``.
CHUNK_ROWS = 32
#: ``opauc@n``: the AUC against the best n negatives.
PARTIAL = (10, 50)


def rank_everything(
    engine: Engine,
    samples: Samples,
    catalog: Catalog,
    cfg: EvalConfig,
    *,
    window: tuple[int, int],
    widths: Sequence[int],
    dp: DataParallel,
    label: str,
) -> Measured:
    """Rank all paths for ``cfg.auc_rows`` evenly spaced rows (0 = all); every rank returns the same.

    The means: ``auc``; ``opauc@n`` against the best n negatives; ``wpauc`` against the negatives of the 0-based ranks
    ``window[0] <= rank < window[1]``; ``beams_found@w``, the share of the true w best paths that a search with w beams
    finds, for each of ``widths``. Raises DataError without rows, and for a catalog of a single path.
    """
    leaves = catalog.trie.num_leaves
    if len(samples) == 0 or leaves < 2:
        raise DataError(f"{label}: eval.auc needs rows and two paths, not {len(samples)} rows and {leaves} paths")
    dp = engine.dp or dp
    chosen = spaced_rows(len(samples), cfg.auc_rows)
    mine = chosen[dp.rank :: dp.size]
    widths = sorted({min(width, leaves) for width in widths})
    size = CHUNK_ROWS * engine.num_replicas
    parts = [
        _ranked(engine, samples, catalog, cfg, mine[start : start + size], widths)
        for start in progress(range(0, len(mine), size), what=f"{label} full ranking")
    ]
    values = in_row_order(dp, [mine], parts, np.zeros((0, 1 + len(widths))))
    rank_B = values[:, 0].astype(np.int64)
    measured = areas(rank_B, leaves - 1, window)
    measured |= {f"beams_found@{width}": values[:, 1 + place].copy() for place, width in enumerate(widths)}
    return Measured.of("auc", samples.take(chosen), measured, rank=rank_B)


def areas(rank_B: np.ndarray, negatives: int, window: tuple[int, int]) -> dict[str, np.ndarray]:
    """``auc``, ``opauc@n`` and ``wpauc`` of rows with one positive at 0-based ``rank_B`` among its negatives. [B] each.

    >>> {name: value.tolist() for name, value in areas(np.array([0, 3, 60]), 100, (1, 5)).items()}
    {'auc': [1.0, 0.97, 0.4], 'opauc@10': [1.0, 0.7, 0.0], 'opauc@50': [1.0, 0.94, 0.0], 'wpauc': [1.0, 0.5, 0.0]}
    """
    spans = {"auc": (0, negatives), **{f"opauc@{n}": (0, min(n, negatives)) for n in PARTIAL}}
    start = min(window[0], negatives - 1)
    spans["wpauc"] = (start, max(start + 1, min(window[1], negatives)))
    return {
        name: np.clip(end - np.maximum(rank_B, first), 0, end - first) / (end - first)
        for name, (first, end) in spans.items()
    }


def spaced_rows(rows: int, limit: int) -> np.ndarray:
    """``limit`` evenly spaced row numbers out of ``rows``, ascending; all of them for 0."""
    if limit == 0 or limit >= rows:
        return np.arange(rows)
    return np.linspace(0, rows - 1, limit).round().astype(np.int64)


def _ranked(
    engine: Engine, samples: Samples, catalog: Catalog, cfg: EvalConfig, rows: np.ndarray, widths: Sequence[int]
) -> np.ndarray:
    """[B, 1 + widths]: the target's rank among all paths, then the share of the best w that w beams find."""
    prompts = samples.prompts.take(rows)
    options: dict[str, Any] = {"token_budget": cfg.token_budget, **histories_for(engine, samples.history, rows)}
    everything_BL = engine.search(prompts, catalog.trie.num_leaves, **options).leaf_BW.cpu().numpy()
    target_B = catalog.leaf_I[samples.target_N[rows]]
    hit_BL = everything_BL == target_B[:, None]  # a path that the model gives no probability at all is not listed
    columns = [np.where(hit_BL.any(axis=1), hit_BL.argmax(axis=1), catalog.trie.num_leaves - 1).astype(float)]
    for width in widths:
        beams_BW = engine.search(prompts, width, **options).leaf_BW.cpu().numpy()
        best_BW = everything_BL[:, :width]
        columns.append(np.array([np.isin(best, beams).mean() for best, beams in zip(best_BW, beams_BW, strict=True)]))
    return np.stack(columns, axis=1)
