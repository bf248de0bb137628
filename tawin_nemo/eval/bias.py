"""Metrics of recommendation lists beyond accuracy: popularity bias, diversity, coverage of the catalog.

Lists hold the leaves of token paths, best first, -1 where nothing was returned. Items with equal texts share a path: a
listed path counts for all of them, and its log-popularity is their mean. K entries of a list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.data.samples import Samples
from tawin_nemo.types import TokenRows

#: Entries of each list among which first codes are counted.
DIVERSITY_K = 10
#: Rows whose histories are counted at once: NumPy counts a copy of eight bytes per item.
_COUNTED_ROWS = 1 << 16


def beyond_accuracy(
    leaf_BK: np.ndarray, catalog: Catalog, history: TokenRows, ks: Sequence[int], popularity_I: np.ndarray | None = None
) -> dict[str, float]:
    """``coverage@K``, ``first_codes@10`` and, where popularity is known, ``popularity_bias@K``.

    ``leaf_BK`` holds at least ``max(ks)`` entries, or fewer where the catalog has no more; ``history`` the items that
    each row's prompt shows; ``popularity_I`` counts each item in the training sequences (``sequence_counts``). A bias
    that no row has (no candidates, or no histories) is omitted.
    """
    metrics = {f"coverage@{k}": coverage(leaf_BK[:, :k], catalog) for k in ks}
    metrics[f"first_codes@{DIVERSITY_K}"] = float(first_codes(leaf_BK[:, :DIVERSITY_K], catalog).mean())
    if popularity_I is not None:
        for k in ks:
            bias_B = popularity_bias(leaf_BK[:, :k], catalog, history, popularity_I)
            if not np.isnan(bias_B).all():
                metrics[f"popularity_bias@{k}"] = float(np.nanmean(bias_B))
    return metrics


def target_counts(samples: Samples, num_items: int) -> np.ndarray:
    """Number of rows whose target is the item: every interaction counts once, except the first of each user. [I]

    Histories are not counted: they repeat what earlier rows of the same user have as targets.
    """
    return np.bincount(samples.target_N, minlength=num_items)


def sequence_counts(samples: Samples, num_items: int) -> np.ndarray:
    """``Pop``: how often each item occurs in the training sequences, histories and targets (NAPO, App. D). [I]"""
    count_I = target_counts(samples, num_items)
    for start in range(0, len(samples), _COUNTED_ROWS):
        shown = samples.history.take(np.arange(start, min(start + _COUNTED_ROWS, len(samples))))
        count_I += np.bincount(shown.flat, minlength=num_items)
    return count_I


def log_popularity(count_I: np.ndarray) -> np.ndarray:
    """``LogPop = ln(1 + Pop)``, 0 for an item that was never seen (NAPO, App. D). [I] float64.

    >>> log_popularity(np.array([0, 1, 2])).round(4).tolist()
    [0.0, 0.6931, 1.0986]
    """
    return np.log1p(count_I)


def popularity_bias(leaf_BK: np.ndarray, catalog: Catalog, history: TokenRows, popularity_I: np.ndarray) -> np.ndarray:
    """Mean log-popularity of each list minus that of the row's history. [B] float64.

    Above 0: more popular things are recommended than this user has chosen so far (NAPO, App. D: LogPop(i) minus the
    mean LogPop of the history). NaN for a row without candidates or without history.
    """
    logpop_I, leaf_I = log_popularity(popularity_I), catalog.leaf_I
    nodes = catalog.trie.num_nodes
    sharing = np.maximum(np.bincount(leaf_I, minlength=nodes), 1)
    logpop_of_leaf = np.bincount(leaf_I, weights=logpop_I, minlength=nodes) / sharing
    listed_BK = leaf_BK >= 0
    total_B = np.where(listed_BK, logpop_of_leaf[np.where(listed_BK, leaf_BK, 0)], 0.0).sum(axis=1)
    row_N = np.repeat(np.arange(len(history)), history.lengths)
    history_B = np.bincount(row_N, weights=logpop_I[history.flat], minlength=len(history))
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is promised
        return total_B / listed_BK.sum(axis=1) - history_B / history.lengths


def coverage(leaf_BK: np.ndarray, catalog: Catalog) -> float:
    """Share of the catalog's items that appear in at least one list."""
    return float(np.isin(catalog.leaf_I, leaf_BK).mean())


def first_codes(leaf_BK: np.ndarray, catalog: Catalog) -> np.ndarray:
    """Number of different first tokens among the paths of each list, a measure of its diversity. [B] int64.

    The first token that distinguishes anything: what all paths of the catalog begin with is skipped.
    """
    trie = catalog.trie
    depth = int(trie.arrays.node_depth[0]) if trie.num_leaves > 1 else 0
    first_item = trie.arrays.node_item[np.maximum(leaf_BK, 0)].astype(np.int64)
    code_BK = np.where(leaf_BK >= 0, catalog.paths.flat[catalog.paths.offsets[first_item] + depth], -1)
    code_BK = np.sort(code_BK, axis=1)
    new_BK = np.ones(code_BK.shape, dtype=bool)
    new_BK[:, 1:] = code_BK[:, 1:] != code_BK[:, :-1]
    return (new_BK & (code_BK >= 0)).sum(axis=1)
