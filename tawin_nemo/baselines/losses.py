"""Losses of next-item prediction, one value per row, and the negatives of the sampled one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_loss(scores_BI: Tensor, target_B: Tensor) -> Tensor:
    """``-log softmax(scores)[target]`` over all items. [B]"""
    return F.cross_entropy(scores_BI, target_B, reduction="none")


def bce_loss(positive_B: Tensor, negatives_BN: Tensor) -> Tensor:
    """``-log sigmoid(positive) - mean_n log(1 - sigmoid(negative_n))`` (SASRec, arXiv 1808.09781, Eq. 7). [B]

    With one negative this is the paper's loss; more are averaged, so that both parts keep their weight.
    """
    return F.softplus(-positive_B) + F.softplus(negatives_BN).mean(dim=1)


def sample_negatives(target_B: Tensor, num_items: int, count: int) -> Tensor:
    """``count`` items per row, uniform over all items but the target, with replacement. [B, count]

    Draws from torch's global generator of the target's device. Raises ValueError for a catalog of one item.
    """
    if num_items < 2:
        raise ValueError(f"a negative needs a second item, the catalog has {num_items}")
    draw_BN = torch.randint(num_items - 1, (len(target_B), count), device=target_B.device)
    return draw_BN + (draw_BN >= target_B.unsqueeze(1)).long()
