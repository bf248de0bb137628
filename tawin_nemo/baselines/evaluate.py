"""Full-catalog ranking of a sequential recommender, in the evaluator's own tables.

Rank: the number of items with a strictly higher score, plus those with the same score and a smaller index. So a model
that gives all items one score ranks them by index, and no tie is decided in the target's favour. All items are
ranked, also those that the user already has. TIGER ranks code rows: items that share one have one rank and divide the
credit (``eval.collision``), and items that its search did not return have none.

K first items of a list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.baselines.protocol import SequentialRecommender, left_padded
from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.schema import EvalConfig
from tawin_nemo.data.negative_sampling import candidate_set
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.bias import beyond_accuracy
from tawin_nemo.eval.evaluate import CHUNK_ROWS, COVERAGE_K, metric_names, per_user_table
from tawin_nemo.eval.intervals import share_interval
from tawin_nemo.eval.measured import Measured
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.types import NO_ITEM
from tawin_nemo.util.errors import DataError, TawinError
from tawin_nemo.util.log import progress


@dataclass(frozen=True)
class Rankings:
    """Target ranks and first items of the rankings of B rows."""

    rank_B: np.ndarray
    sharing_B: np.ndarray  # items that share the target's rank, the target included
    listed_B: np.ndarray  # items in the list
    top_BK: np.ndarray  # its first items, NO_ITEM behind its end


def target_rank(scores_BI: Tensor, target_B: Tensor) -> Tensor:
    """0-based rank [B] of each row's target among all items, -1 where its score is -inf; equal scores rank by index.

    >>> target_rank(torch.tensor([[0.5, 2.0, 0.5, 1.0]] * 3), torch.tensor([0, 2, 1])).tolist()
    [2, 3, 0]
    """
    own_B1 = scores_BI.gather(1, target_B.unsqueeze(1))
    before_BI = torch.arange(scores_BI.shape[1], device=scores_BI.device) < target_B.unsqueeze(1)
    rank_B = ((scores_BI > own_B1) | ((scores_BI == own_B1) & before_BI)).sum(dim=1)
    return torch.where(own_B1.squeeze(1) == float("-inf"), -1, rank_B)


def evaluate_baseline(
    model: SequentialRecommender,
    samples: Samples,
    catalog: Catalog,
    cfg: EvalConfig,
    *,
    label: str,
    popularity_I: np.ndarray | None = None,
) -> EvalResult:
    """Rank the whole catalog for every row; models that search use ``cfg.beams`` beams.

    ``popularity_I`` [I] counts each item in train (``bias.sequence_counts``) and adds the popularity bias. Raises
    DataError without rows, TawinError when a score is not a number.
    """
    rankings = rank_rows(model, samples, cfg.beams, max(COVERAGE_K, *cfg.ks), label)
    per_user = per_user_table(samples, rankings.rank_B, rankings.sharing_B, rankings.listed_B, cfg)
    intervals = {name: share_interval(per_user[name].to_numpy()) for name in metric_names(cfg.ks, cfg.metrics)}
    leaf_BK = np.where(rankings.top_BK == NO_ITEM, -1, catalog.leaf_I[rankings.top_BK])
    listed = np.unique(rankings.top_BK[:, :COVERAGE_K])
    longest = int(rankings.listed_B.max())
    return EvalResult(
        means={name: interval.mean for name, interval in intervals.items()},
        intervals={name: (interval.low, interval.high) for name, interval in intervals.items()},
        rows=len(samples),
        invalid_rate=0.0,
        collisions=int((rankings.sharing_B > 1).sum()),
        short_rows=float((rankings.listed_B < longest).mean()),
        coverage=int((listed != NO_ITEM).sum()) / len(model.representative_I.unique()),
        beams=longest,
        collision=cfg.collision,
        per_user=per_user,
        beyond=beyond_accuracy(leaf_BK, catalog, samples.history.in_memory(), cfg.ks, popularity_I),
    )


@torch.no_grad()
def baseline_candidates(
    model: SequentialRecommender, samples: Samples, catalog: Catalog, cfg: EvalConfig, *, seed: int, label: str
) -> Measured:
    """HitRatio@1 of the candidate protocol (``eval.candidates``): the candidate with the best score, the first of equal
    ones. Every answer is valid; models that search count what they do not list as worst."""
    model.eval()
    hit_B = np.zeros(len(samples))
    chunks = range(0, len(samples), CHUNK_ROWS)
    for start in progress(chunks, what=f"{label} candidates"):
        rows = np.arange(start, min(start + CHUNK_ROWS, len(samples)))
        history_BL = left_padded(samples.history.take(rows)).to(model.representative_I.device)
        scores_BI = model.scores(history_BL, cfg.beams)[:, model.representative_I].cpu()
        for place, row in enumerate(rows.tolist()):
            items_C = candidate_set(samples, catalog.leaf_I, row, cfg.candidates, seed)
            best = items_C[int(scores_BI[place, torch.from_numpy(items_C)].argmax())]
            hit_B[row] = best == samples.target_N[row]
    return Measured.of("candidates", samples, {"hit_ratio@1": hit_B, "valid_ratio": np.ones(len(samples))})


def valid_metrics(model: SequentialRecommender, samples: Samples, cfg: EvalConfig) -> dict[str, float]:
    """Means on ``samples`` for early stopping; a search uses as many beams as the largest cut-off, for speed."""
    rankings = rank_rows(model, samples, max(cfg.ks), max(cfg.ks), "valid")
    table = per_user_table(samples, rankings.rank_B, rankings.sharing_B, rankings.listed_B, cfg)
    return {name: float(table[name].to_numpy().mean()) for name in metric_names(cfg.ks, cfg.metrics)}


@torch.no_grad()
def rank_rows(model: SequentialRecommender, samples: Samples, width: int, list_length: int, label: str) -> Rankings:
    """Rankings of all rows, of which the first ``list_length`` items are kept.

    ``width``: beams of models that search. Raises DataError without rows, TawinError when a score is not a number.
    """
    if len(samples) == 0:
        raise DataError(f"{label}: no rows to evaluate; check data.eval_limit and the split")
    model.eval()
    representative_I = model.representative_I
    items_I = torch.arange(model.num_items, device=representative_I.device)
    by_length = np.argsort(-samples.history.lengths, kind="stable")
    rank_B, listed_B = (np.empty(len(samples), dtype=np.int64) for _ in range(2))
    top_BK = np.full((len(samples), list_length), NO_ITEM)
    chunks = [by_length[start : start + CHUNK_ROWS] for start in range(0, len(samples), CHUNK_ROWS)]
    for rows in progress(chunks, what=label):
        history_BL = left_padded(samples.history.take(rows)).to(representative_I.device)
        scores_BI = model.scores(history_BL, width)
        if bool(scores_BI.isnan().any()):
            raise TawinError(f"{label}: scores are not numbers; lower baseline.lr")
        scores_BI = scores_BI.masked_fill(representative_I != items_I, float("-inf"))
        target_B = torch.from_numpy(samples.target_N[rows].astype(np.int64)).to(representative_I.device)
        rank_B[rows] = target_rank(scores_BI, representative_I[target_B]).cpu().numpy()
        listed_B[rows] = (scores_BI > float("-inf")).sum(dim=1).cpu().numpy()
        best = scores_BI.topk(min(list_length, model.num_items), dim=1)
        items_BK = best.indices.masked_fill(best.values == float("-inf"), NO_ITEM)
        top_BK[rows, : items_BK.shape[1]] = items_BK.cpu().numpy()
    representatives = representative_I.cpu().numpy()
    sharing_I = np.bincount(representatives, minlength=model.num_items)[representatives]
    return Rankings(rank_B, sharing_I[samples.target_N], listed_B, top_BK)
