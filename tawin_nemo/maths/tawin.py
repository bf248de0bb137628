"""Threshold-adjusted windowed reweighting of a group's negatives (TAWin, arXiv 2604.22504, Section 3.3).

The window is laid over the *ranks* of the negatives, so the scores only matter through their order: the weights are
constants of the policy gradient and no gradient reaches the scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WINDOWS = ("centred", "start")
MASSES = ("mean1", "k")


def soft_topk(logits: Tensor, k: float, tau: float) -> Tensor:
    """Weights in [0, 1] that sum to ``k`` and favour the largest logits (Eq. 16-18), over the last axis.

    ``w_i = min(1, exp((x_i - lam) / tau))`` with the one ``lam`` for which ``sum_i w_i = k``. With the ``m`` largest
    logits saturated at 1, ``lam_m = tau * (logsumexp_{i > m}(x_i / tau) - log(k - m))``; the right ``m`` is the
    smallest for which no other weight exceeds 1. One sort, so O(n log n); differentiable in the logits.

    Args:
        logits: [..., n]. Entries of ``-inf`` are masked: their weight is 0 and they do not count.
        k: Mass to hand out, integer or fractional, above 0.
        tau: Softness of the border, above 0. ``tau -> 0`` is a hard top-k whose tied border entries share what is
            left equally; ``tau -> inf`` spreads ``k`` evenly.

    Returns:
        Weights of the shape of ``logits``. Where at most ``k`` entries are unmasked, each of them gets 1.

    Raises:
        ValueError: ``k`` or ``tau`` is not a positive finite number.

    The two largest are saturated, the two tied ones share what is left:

    >>> soft_topk(torch.tensor([3.0, 2.0, 0.0, 0.0]), k=2.5, tau=0.1)
    tensor([1.0000, 1.0000, 0.2500, 0.2500])
    """
    for name, value in (("k", k), ("tau", tau)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"soft_topk: {name} = {value}, but it must be a positive finite number")
    unmasked = logits > -math.inf
    saturated = unmasked.sum(-1, keepdim=True) <= k
    # float64, because x / tau is large where tau is small and its rounding error ends up in an exponent. A row that is
    # saturated as a whole has no lam; zeros keep its unused branch, and so its gradient, finite.
    scaled = torch.where(saturated, 0.0, logits.double() / tau)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    index = torch.arange(logits.shape[-1], device=logits.device)
    with torch.no_grad():
        tail = ordered.flip(-1).logcumsumexp(-1).flip(-1)  # logsumexp of the indices >= m
        lam = tail - torch.log((k - index.double()).clamp(min=0.0))
        # The first index that qualifies; it is below k, because logcumsumexp never rounds below its largest term.
        num_full = (lam >= ordered).int().argmax(-1, keepdim=True)
    free = index >= num_full
    lam = ordered.masked_fill(~free, -math.inf).logsumexp(-1, keepdim=True) - torch.log(k - num_full.double())
    weights = torch.where(free, torch.exp((ordered - lam).clamp(max=0.0)), 1.0)
    weights = torch.zeros_like(weights).scatter(-1, order, weights)
    return torch.where(saturated, unmasked.double(), weights).to(logits.dtype)


def tawin_weights(
    scores_BG: Tensor,
    is_target_BG: Tensor,
    *,
    k: float,
    tau: float,
    anchor: float,
    window: str = "centred",
    mass: str = "mean1",
    valid_BG: Tensor | None = None,
) -> Tensor:
    """Weight of every candidate's surrogate term, from the rank of its score among its group's negatives.

    With n negatives, ranks ``s = 0 .. n-1`` (best score first, ties in list order): logits ``-|s - anchor| / n``
    (Eq. 19), weights ``w = soft_topk(logits, k, tau)``, then ``n * w / sum(w)`` so that the negatives weigh 1 on
    average (Eq. 21). Targets weigh 1. ``k >= n`` and ``tau -> inf`` give plain GRPO: every weight is 1. That Eq. 21
    normalises is one reading of the paper; ``mass="k"`` takes the weights of Eq. 20 as they are, smaller by ``k / n``.

    Args:
        scores_BG: What the group is ranked by; only the order matters, no gradient flows.
        is_target_BG: bool. A group may hold no target (all are negatives) or several (each weighs 1).
        k: Mass of the window, in ranks.
        tau: Softness of the window's border, in units of the normalised rank ``s / n``.
        anchor: 0-based rank at which the window sits.
        window: ``centred``: the anchor is the middle of the window. ``start``: the window begins at the anchor, so
            its middle is ``anchor + (k - 1) / 2``.
        mass: What the weights of n > k negatives sum to: ``mean1``: n. ``k``: k, each at most 1.
        valid_BG: bool; candidates that are padding are False, weigh 0 and do not count. None: all are valid.

    Returns:
        Weights [B, G] in the dtype of the scores.

    Raises:
        ValueError: ``k`` or ``tau`` is not positive, ``window`` none of ``WINDOWS``, or ``mass`` none of ``MASSES``.

    Five negatives, the window takes their ranks 1 to 3 (``k = 3``), each with weight 5/3:

    >>> scores_BG = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    >>> is_target_BG = torch.tensor([[False, True, False, False, False, False]])
    >>> tawin_weights(scores_BG, is_target_BG, k=3, tau=1e-3, anchor=2)
    tensor([[0.0000, 1.0000, 1.6667, 1.6667, 1.6667, 0.0000]])
    """
    valid_BG = torch.ones_like(is_target_BG) if valid_BG is None else valid_BG
    negative_BG = valid_BG & ~is_target_BG
    by_score_BG = scores_BG.detach().argsort(dim=-1, descending=True, stable=True)
    # Negatives first, each part still best score first: a -inf score of a negative must not mix with the others.
    others_last_BG = (~negative_BG).gather(-1, by_score_BG).to(torch.uint8).argsort(dim=-1, stable=True)
    order_BG = by_score_BG.gather(-1, others_last_BG)
    rank_BG = order_BG.argsort(dim=-1)
    weights_BG = _rank_weights(rank_BG, negative_BG, k=k, tau=tau, anchor=anchor, window=window, mass=mass)
    return torch.where(negative_BG, weights_BG, (valid_BG & is_target_BG).double()).to(scores_BG.dtype)


def weight_profile(n: int, *, k: float, tau: float, anchor: float, window: str = "centred") -> Tensor:
    """Weights of ``n`` negatives by rank, as ``tawin_weights`` gives them: [n] float64, mean 1.

    >>> weight_profile(4, k=2, tau=1e-3, anchor=0, window="start").round(decimals=9).tolist()
    [2.0, 2.0, 0.0, 0.0]
    """
    rank = torch.arange(n)
    return _rank_weights(rank, torch.ones_like(rank, dtype=torch.bool), k=k, tau=tau, anchor=anchor, window=window)


def _rank_weights(
    rank_BG: Tensor, negative_BG: Tensor, *, k: float, tau: float, anchor: float, window: str, mass: str = "mean1"
) -> Tensor:
    """Eq. 19-21 for negatives of known rank; what is returned for the others means nothing."""
    if window not in WINDOWS:
        raise ValueError(f"window = {window!r}, but it must be one of {', '.join(WINDOWS)}")
    if mass not in MASSES:
        raise ValueError(f"mass = {mass!r}, but it must be one of {', '.join(MASSES)}")
    middle = anchor if window == "centred" else anchor + (k - 1) / 2
    n_B1 = negative_BG.sum(-1, keepdim=True).clamp(min=1)
    # float64 and the division last: ranks at equal distance stay exact ties however small tau is.
    logits_BG = -(rank_BG.double() - middle).abs() / n_B1
    weights_BG = soft_topk(logits_BG.masked_fill(~negative_BG, -math.inf), k, tau)
    if mass == "k":
        return weights_BG
    sum_B1 = weights_BG.sum(-1, keepdim=True)
    return n_B1 * weights_BG / torch.where(sum_B1 > 0, sum_B1, 1.0)
