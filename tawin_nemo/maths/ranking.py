"""Ranking metrics of one relevant item per user; the mean over users is the caller's.

``rank_B`` is 0-based; a negative rank means that the target is not in the list and counts 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recall_at_k(rank_B: Tensor, k: int) -> Tensor:
    """1 where the target is among the first ``k``, else 0. [B] float64.

    >>> recall_at_k(torch.tensor([0, 2, 3, -1]), 3).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    _require_cutoff(k)
    return ((rank_B >= 0) & (rank_B < k)).double()


def ndcg_at_k(rank_B: Tensor, k: int) -> Tensor:
    """``1 / log2(rank + 2)`` where the target is among the first ``k``, else 0. [B] float64.

    With one relevant item the ideal DCG is ``1 / log2(2) = 1``, so this is the normalised gain already.

    >>> ndcg_at_k(torch.tensor([0, 2, 3, -1]), 3).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """
    return recall_at_k(rank_B, k) / torch.log2(rank_B.clamp(min=0).double() + 2)


def _require_cutoff(k: int) -> None:
    if k < 1:
        raise ValueError(f"k = {k}, but a metric needs a cut-off of at least 1")
