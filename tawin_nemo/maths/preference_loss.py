"""Preference objectives on rewards of whole answers: DPO, SimPO, S-DPO, RosePO, alpha-DPO and NAPO.

Axes: B rows (one prompt and its preferred answer), N rejected answers of a row (for NAPO its own and the shared ones).

Every loss takes the implicit rewards h of the answers and returns one loss per row; what h is belongs to the objective:

- Hhat = beta * (log pi(y|x) - log pi_ref(y|x)) for DPO, S-DPO and RosePO;
- H = beta * log pi(y|x), divided by the tokens of y where the objective normalises by length, for the others.

``mask_BN`` is True where a rejected answer exists. A row without any has loss 0 and gradient 0. Objectives that compare
pairs take the mean over the pairs of a row. All losses are ``-log sigmoid``, computed without overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(h_pos_B: Tensor, h_neg_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """``-log sigmoid(Hhat+ - Hhat-)``, mean over a row's pairs (DPO, arXiv 2305.18290, Eq. 7). [B].

    >>> dpo_loss(torch.tensor([2.0]), torch.tensor([[2.0, 9.0]]), torch.tensor([[True, False]]))
    tensor([0.6931])
    """
    return pair_mean(-logsigmoid(h_pos_B.unsqueeze(1) - h_neg_BN), mask_BN)


def simpo_loss(h_pos_B: Tensor, h_neg_BN: Tensor, mask_BN: Tensor, gamma: float) -> Tensor:
    """``-log sigmoid(H+ - H- - gamma)``, mean over pairs, without a reference (SimPO, arXiv 2405.14734). [B]."""
    return pair_mean(-logsigmoid(h_pos_B.unsqueeze(1) - h_neg_BN - gamma), mask_BN)


def sdpo_loss(h_pos_B: Tensor, h_neg_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """``-log sigmoid(-log sum_n exp(Hhat-_n - Hhat+))``: all rejected answers of a row at once. [B].

    S-DPO, arXiv 2406.09215, Eq. 10: DPO for the Plackett-Luce model; with one rejected answer it is DPO.
    """
    return napo_loss(h_pos_B, h_neg_BN, mask_BN, 0.0)


def napo_loss(h_pos_B: Tensor, h_neg_BN: Tensor, mask_BN: Tensor, gamma: float) -> Tensor:
    """``-log sigmoid(-log sum_n exp(H-_n - H+) - gamma)`` (NAPO, Eq. 11-12). [B].

    ``h_neg_BN`` holds the row's own rejected answers and those that similar rows share with it
    (``negative_sharing``), ``gamma`` is the margin of the batch (``dynamic_margin``). With gamma 0, own answers only
    and no length normalisation it is SimS-DPO, S-DPO without a reference.
    """
    return -logsigmoid(-_log_sum_exp(h_neg_BN - h_pos_B.unsqueeze(1), mask_BN) - gamma)


def rosepo_loss(h_pos_B: Tensor, h_neg_BN: Tensor, mask_BN: Tensor, epsilon_BN: Tensor) -> Tensor:
    """``-(1 - e) log sigmoid(d) - e log sigmoid(-d)`` with ``d = Hhat+ - Hhat-``, mean over a row's pairs. [B].

    RosePO (arXiv 2410.12519): DPO with labels smoothed by ``epsilon_BN``, how probable it is that the label of a pair
    is wrong, in [0, 0.5]; with 0 it is DPO.
    """
    difference_BN = h_pos_B.unsqueeze(1) - h_neg_BN
    loss_BN = -(1 - epsilon_BN) * logsigmoid(difference_BN) - epsilon_BN * logsigmoid(-difference_BN)
    return pair_mean(loss_BN, mask_BN)


def alpha_dpo_loss(
    h_pos_B: Tensor, h_neg_BN: Tensor, mask_BN: Tensor, margin_BN: Tensor, gamma: float, alpha: float
) -> Tensor:
    """``-log sigmoid(H+ - H- - sg(gamma + alpha M*))``, mean over a row's pairs (alpha-DPO, arXiv 2410.10148). [B].

    ``margin_BN`` is M*, see ``normalised_margins``; no gradient goes through it. With alpha 0 it is SimPO.
    """
    target_BN = (gamma + alpha * margin_BN).detach()
    return pair_mean(-logsigmoid(h_pos_B.unsqueeze(1) - h_neg_BN - target_BN), mask_BN)


def normalised_margins(margin_BN: Tensor, mean: float, std: float) -> Tensor:
    """``M* = (M - mean) / std``: the margins Hhat+ - Hhat- as z-scores of the global batch; 0 where std is 0.

    NAPO's table of objectives leaves M* open **[choice: alpha-DPO's z-score, over the pairs of one global batch]**.
    """
    return (margin_BN - mean) / std if std > 0 else torch.zeros_like(margin_BN)


def pair_mean(values_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean over the pairs of each row; 0 for a row without pairs. [B]."""
    count_B = mask_BN.sum(dim=1).clamp(min=1)
    return torch.where(mask_BN, values_BN, 0.0).sum(dim=1) / count_B


def _log_sum_exp(values_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Over the masked entries; a very negative number, with gradient 0, for a row without any. [B].

    The number is finite, because the gradient of ``logsumexp`` over nothing but -inf is not a number.
    """
    return torch.where(mask_BN, values_BN, torch.finfo(values_BN.dtype).min / 4).logsumexp(dim=1)
