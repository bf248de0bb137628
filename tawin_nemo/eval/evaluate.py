"""Recall@K and NDCG@K of a policy over the full catalog: a table with one row per user first, means after.

Rank and credit. A policy ranks token *paths*: each path is one entry of the beam list, however many items share
it. The rank of a target is the 0-based index of its path in the list (-1 when no beam ended there). A target that
shares its path with s - 1 other items cannot be distinguished from them; ``eval.collision`` then decides the credit
of a hit: ``fractional`` gives 1/s, the probability that one item drawn from the path is the target, ``optimistic``
gives 1, as comparing strings does (MiniOneRec). Both multiply Recall@K and NDCG@K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.schema import EvalConfig
from tawin_nemo.config.seam_checks import BUILT_IN, metric_name
from tawin_nemo.config.seams import made
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.bias import beyond_accuracy
from tawin_nemo.eval.intervals import share_interval
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.maths.ranking import ndcg_at_k, recall_at_k
from tawin_nemo.rollout.assist import histories_for
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.types import NO_ITEM, Candidates, DataParallel
from tawin_nemo.util.errors import ConfigError, DataError
from tawin_nemo.util.log import progress

#: Prompts whose candidates a replica holds in memory at once.
CHUNK_ROWS = 512
#: Entries of each list that count for coverage.
COVERAGE_K = 10


@dataclass(frozen=True)
class _Rankings:
    """Target ranks, counts and first leaves of the candidates of B rows."""

    rank_B: np.ndarray
    candidates_B: np.ndarray  # valid candidates in the list
    invalid: int
    returned: int
    top_leaf_BK: np.ndarray  # the first entries of each list, -1 where nothing was returned


def evaluate(
    engine: Engine,
    samples: Samples,
    catalog: Catalog,
    cfg: EvalConfig,
    *,
    dp: DataParallel,
    label: str,
    popularity_I: np.ndarray | None = None,
) -> EvalResult:
    """Search ``cfg.beams`` beams for every row and compare with its target.

    ``dp``: this process's rank among the replicas of training; an engine with replicas of its own (``engine.dp``)
    overrides it. Rows are divided among the replicas and gathered in row order, so the result does not depend on their
    number; every rank returns it. ``popularity_I`` (how often each item occurs in train,
    ``bias.sequence_counts``) adds the popularity bias to ``beyond``. Raises DataError without rows, ConfigError for a
    cut-off beyond the beam list.
    """
    if len(samples) == 0:
        raise DataError(f"{label}: no rows to evaluate; check data.eval_limit and the split")
    num_paths = catalog.trie.num_leaves
    if max(cfg.ks) > cfg.beams < num_paths:
        raise ConfigError(f"eval.ks={list(cfg.ks)} goes beyond eval.beams={cfg.beams}; raise eval.beams")
    dp = engine.dp or dp
    mine = np.arange(len(samples))[dp.rank :: dp.size]
    rankings = _search(engine, samples, catalog, cfg, mine, label)
    parts = dp.gather((mine, rankings))
    order_B = np.concatenate([rows for rows, _ in parts]).argsort(kind="stable")
    everything = _join([part for _, part in parts], order_B, _list_length(cfg))
    per_user = per_user_table(
        samples, everything.rank_B, catalog.sharing_I[samples.target_N], everything.candidates_B, cfg
    )
    metrics = {name: per_user[name].to_numpy() for name in metric_names(cfg.ks, cfg.metrics)}
    intervals = {name: share_interval(values_B) for name, values_B in metrics.items()}
    full_list = min(cfg.beams, num_paths)
    return EvalResult(
        means={name: interval.mean for name, interval in intervals.items()},
        intervals={name: (interval.low, interval.high) for name, interval in intervals.items()},
        rows=len(samples),
        invalid_rate=everything.invalid / max(1, everything.returned),
        collisions=int((per_user["sharing"] > 1).sum()),
        short_rows=float((everything.candidates_B < full_list).mean()),
        coverage=_listed_paths(everything.top_leaf_BK[:, :COVERAGE_K]) / num_paths,
        beams=cfg.beams,
        collision=cfg.collision,
        per_user=per_user,
        beyond=beyond_accuracy(everything.top_leaf_BK, catalog, samples.history.in_memory(), cfg.ks, popularity_I),
    )


def _listed_paths(leaf_BK: np.ndarray) -> int:
    """Number of different paths that appear in at least one list."""
    return int(np.count_nonzero(np.unique(leaf_BK) >= 0))


def metric_names(ks: Sequence[int], own: Sequence[str] = ()) -> list[str]:
    """The columns ``recall@K`` of all cut-offs, then ``ndcg@K``, then those of ``eval.metrics``: the order of tables.

    >>> metric_names([1, 3], ["my.mod:mrr"])
    ['recall@1', 'recall@3', 'ndcg@1', 'ndcg@3', 'mrr@1', 'mrr@3']
    """
    return [f"{metric}@{k}" for metric in (*BUILT_IN, *map(metric_name, own)) for k in ks]


def own_metric(path: str, rank_B: Tensor, k: int) -> np.ndarray:
    """Metric ``path`` of ``eval.metrics`` at cut-off ``k``, from 0-based ranks (-1 = not listed). [B] float64.

    Raises ConfigError when the function returns another shape, or values that are not finite.
    """
    values = np.asarray(made("eval.metrics", path)(rank_B, k), dtype=np.float64)
    if values.shape != tuple(rank_B.shape) or not np.isfinite(values).all():
        wrong = f"shape {list(values.shape)}" if values.shape != tuple(rank_B.shape) else "values that are not finite"
        raise ConfigError(
            f"eval.metrics={path} returned {wrong} at k={k}; expected one finite number per rank, shape "
            f"{list(rank_B.shape)}"
        )
    return values


def per_user_table(
    samples: Samples, rank_B: np.ndarray, sharing_B: np.ndarray, candidates_B: np.ndarray, cfg: EvalConfig
) -> pl.DataFrame:
    """One line per row of the split: row, user, target, rank, sharing, candidates, then the metrics with credit."""
    credit_B = 1.0 / sharing_B if cfg.collision == "fractional" else np.ones(len(rank_B))
    rank = torch.from_numpy(rank_B)
    identity = {
        "row": samples.row_N,
        "user": samples.user_N,
        "target": samples.target_N,
        "rank": rank_B,
        "sharing": sharing_B,
        "candidates": candidates_B,
    }
    columns: dict[str, np.ndarray] = {name: np.asarray(values, dtype=np.int64) for name, values in identity.items()}
    for k in cfg.ks:
        columns[f"recall@{k}"] = recall_at_k(rank, k).numpy() * credit_B
        columns[f"ndcg@{k}"] = ndcg_at_k(rank, k).numpy() * credit_B
        for path in cfg.metrics:
            columns[f"{metric_name(path)}@{k}"] = own_metric(path, rank, k) * credit_B
    return pl.DataFrame({name: columns[name] for name in [*identity, *metric_names(cfg.ks, cfg.metrics)]})


def target_rank(leaf_BW: Tensor, target_leaf_B: Tensor) -> Tensor:
    """0-based index of each row's target leaf in its list, -1 where it is absent. [B] int64.

    >>> target_rank(torch.tensor([[5, 7, 9], [5, 7, -1]]), torch.tensor([7, 4])).tolist()
    [1, -1]
    """
    hit_BW = leaf_BW == target_leaf_B.unsqueeze(-1)
    return torch.where(hit_BW.any(-1), hit_BW.int().argmax(-1), -1)


def check_candidates(candidates: Candidates, catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """Two bool arrays [B, W]: a candidate was returned, and it is not a catalog item.

    A candidate is invalid unless it is, token for token, the path of the item that it claims to be. The search should
    make that impossible; here it is checked against the catalog's own token rows and not against the trie that the
    search walked.
    """
    items_BW, tokens_BWT = candidates.items_BW.cpu().numpy(), candidates.tokens_BWT.cpu().numpy()
    lengths_BW, leaf_BW = candidates.lengths_BW.cpu().numpy(), candidates.leaf_BW.cpu().numpy()
    returned_BW = (items_BW != NO_ITEM) | (lengths_BW > 0)
    known_BW = (items_BW >= 0) & (items_BW < len(catalog))
    item_BW = np.where(known_BW, items_BW, 0)
    same_BW = known_BW & (lengths_BW == catalog.paths.lengths[item_BW]) & (leaf_BW == catalog.leaf_I[item_BW])
    same_BW &= lengths_BW <= tokens_BWT.shape[-1]
    starts_BW = catalog.paths.offsets[item_BW]
    for t in range(tokens_BWT.shape[-1]):
        inside_BW = same_BW & (t < lengths_BW)
        expected_BW = catalog.paths.flat[np.where(inside_BW, starts_BW + t, 0)]
        same_BW &= ~inside_BW | (tokens_BWT[..., t] == expected_BW)
    return returned_BW, returned_BW & ~same_BW


def _search(
    engine: Engine, samples: Samples, catalog: Catalog, cfg: EvalConfig, rows: np.ndarray, label: str
) -> _Rankings:
    """Longest prompts first, so that a chunk too large for the memory fails at once; results in the rows' order."""
    by_length = np.argsort(-samples.prompts.lengths_of(rows), kind="stable")
    size = CHUNK_ROWS * engine.num_replicas
    chunks = [by_length[start : start + size] for start in range(0, len(rows), size)]
    parts = [_search_chunk(engine, samples, catalog, cfg, rows[chunk]) for chunk in progress(chunks, what=label)]
    return _join(parts, by_length.argsort(kind="stable"), _list_length(cfg))


def _search_chunk(engine: Engine, samples: Samples, catalog: Catalog, cfg: EvalConfig, rows: np.ndarray) -> _Rankings:
    width = min(cfg.beams, catalog.trie.num_leaves)  # so many beams rank the whole catalog, more could not do better
    histories = histories_for(engine, samples.history, rows)
    candidates = engine.search(samples.prompts.take(rows), width, token_budget=cfg.token_budget, **histories)
    returned_BW, invalid_BW = check_candidates(candidates, catalog)
    leaf_BW = candidates.leaf_BW.cpu()
    return _Rankings(
        rank_B=target_rank(leaf_BW, torch.from_numpy(catalog.leaf_I[samples.target_N[rows]])).numpy(),
        candidates_B=(returned_BW & ~invalid_BW).sum(-1),
        invalid=int(invalid_BW.sum()),
        returned=int(returned_BW.sum()),
        top_leaf_BK=_filled(leaf_BW.numpy(), _list_length(cfg)),
    )


def _list_length(cfg: EvalConfig) -> int:
    return max(COVERAGE_K, *cfg.ks)


def _filled(leaf_BW: np.ndarray, length: int) -> np.ndarray:
    """The first ``length`` entries of each list [B, K], padded with -1."""
    missing = max(0, length - leaf_BW.shape[1])
    return np.pad(leaf_BW[:, :length], ((0, 0), (0, missing)), constant_values=-1)


def _join(parts: Sequence[_Rankings], order_B: np.ndarray, length: int) -> _Rankings:
    """Concatenate the parts and take their rows in ``order_B``."""
    empty = np.zeros(0, np.int64)
    return _Rankings(
        rank_B=np.concatenate([empty, *(part.rank_B for part in parts)])[order_B],
        candidates_B=np.concatenate([empty, *(part.candidates_B for part in parts)])[order_B],
        invalid=sum(part.invalid for part in parts),
        returned=sum(part.returned for part in parts),
        top_leaf_BK=np.concatenate([np.zeros((0, length), np.int64), *(part.top_leaf_BK for part in parts)])[order_B],
    )
