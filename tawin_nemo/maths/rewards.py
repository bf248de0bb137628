"""Rewards of one prompt's candidates: the rule reward and ReRe's ranking reward (arXiv 2510.12211)."""

from __future__ import annotations

import torch
from torch import Tensor

from tawin_nemo.types import NO_ITEM


def rule_reward(items_BG: Tensor, target_B: Tensor) -> Tensor:
    """1 where the candidate is the target item, else 0; padding (``NO_ITEM``) gets 0. [B, G] float32.

    Items are compared by index, never by text. Items that share a token path cannot be told apart by the policy:
    name both sides by the first item of their path, or use ``Rollout.is_target_BG.float()``.

    >>> rule_reward(torch.tensor([[7, 3, -1]]), torch.tensor([3]))
    tensor([[0., 1., 0.]])
    """
    return ((items_BG == target_B.unsqueeze(-1)) & (items_BG != NO_ITEM)).float()


def ranking_reward(scores_BG: Tensor, is_target_BG: Tensor, valid_BG: Tensor | None = None) -> Tensor:
    """Rule reward plus a penalty for wrong candidates, the larger the better they rank. [B, G] in the scores' dtype.

    In a group of G candidates that holds its target, a wrong one at 0-based rank i (best score first, ties in list
    order, the target's rank counts) gets ``-(1 / log2(i + 2)) / sum_{j < G} 1 / log2(j + 2)``. A target gets 1. A
    group without target gets 0 throughout. Candidates that are not valid (padding) get 0, have no rank and are not
    among the G.

    The target is second of three, ``1/log2(2) + 1/log2(3) + 1/log2(4) = 1 + 0.6309 + 0.5 = 2.1309``:

    >>> ranking_reward(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[False, True, False]]))
    tensor([[-0.4693,  1.0000, -0.2346]])
    """
    valid_BG = torch.ones_like(is_target_BG) if valid_BG is None else valid_BG
    hit_BG = is_target_BG & valid_BG
    by_score_BG = scores_BG.detach().argsort(dim=-1, descending=True, stable=True)
    padding_last_BG = (~valid_BG).gather(-1, by_score_BG).to(torch.uint8).argsort(dim=-1, stable=True)
    rank_BG = by_score_BG.gather(-1, padding_last_BG).argsort(dim=-1)
    discount_BG = valid_BG / torch.log2(rank_BG.to(scores_BG.dtype) + 2)
    penalty_BG = discount_BG / discount_BG.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_BG.dtype).tiny)
    is_penalised_BG = hit_BG.any(-1, keepdim=True) & ~hit_BG
    return hit_BG.to(scores_BG.dtype) - penalty_BG * is_penalised_BG
