"""Areas under the ROC curve, whole, one-way partial and windowed, and what a window says about Recall@K.

TAWin (arXiv 2604.22504), Section 3.2. Everything works on the scores of one user's positive and negative items (last
axis) and over any leading axes; the mean over users is the caller's. False-positive rates are turned into ranks of the
negatives, best score first, so all that matters is an order and every value is a count of pairs over a number of pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: How far above a whole number ``alpha * n`` may come out, as a share of n, and still be taken for that number. The
#: sum ``(K - 1) / n + 1 / n`` times n carries a few roundings of 1e-16 each. A limit that truly lies this close above a
#: rank would need a denominator of 1e12.
_ROUNDING = 1e-12
#: The same for ``wpauc * P * P``, which is a whole number of pairs when no scores are tied (half ones otherwise).
_PAIR_ROUNDING = 0.01


def auc(pos: Tensor, neg: Tensor) -> Tensor:
    """Share of (positive, negative) pairs with the positive ahead; a tie counts 1/2. [...] float64.

    Args:
        pos: [..., P] scores of the positives, P >= 1.
        neg: [..., N] scores of the negatives, N >= 1; leading axes broadcast with those of ``pos``.

    Raises:
        ValueError: one side is empty, or a score is NaN.

    3 is ahead of one negative and ties with one, 5 is ahead of three: 4.5 of 8 pairs.

    >>> auc(torch.tensor([3.0, 5.0]), torch.tensor([9.0, 4.0, 3.0, 1.0]))
    tensor(0.5625, dtype=torch.float64)
    """
    return wpauc(pos, neg, 0.0, 1.0)


def opauc(pos: Tensor, neg: Tensor, beta: float) -> Tensor:
    """One-way partial AUC: only the best ``ceil(beta * N)`` negatives count (false-positive rates in [0, beta]). [...]

    It is ``wpauc`` with ``alpha = 0``; arguments and errors are the same.

    >>> opauc(torch.tensor([3.0, 5.0]), torch.tensor([9.0, 4.0, 3.0, 1.0]), 0.5)
    tensor(0.2500, dtype=torch.float64)
    """
    return wpauc(pos, neg, 0.0, beta)


def wpauc(pos: Tensor, neg: Tensor, alpha: float, d: float) -> Tensor:
    """Windowed partial AUC (Eq. 11-12): the AUC against the negatives of a window of false-positive rates. [...]

    The negatives are sorted, best score first; those of the ranks (from 1) ``ceil(alpha * N) < j <= ceil((alpha + d) *
    N)`` count. Equal scores at the border are interchangeable, so their order does not matter. There is no gradient.

    Args:
        pos: [..., P] scores of the positives, P >= 1.
        neg: [..., N] scores of the negatives, N >= 1; leading axes broadcast with those of ``pos``.
        alpha: Where the window begins, a false-positive rate in [0, 1).
        d: Its width, above 0; ``alpha + d`` is at most 1.

    Returns:
        Mean over the P positives and the window's negatives of 1[positive ahead], ties 1/2. float64.

    Raises:
        ValueError: one side is empty, a score is NaN, the window leaves [0, 1], or it holds no negative.

    The window holds ranks 2 and 3, the scores 4 and 3: 3 ties with one of them, 5 is ahead of both, 2.5 of 4 pairs.

    >>> wpauc(torch.tensor([3.0, 5.0]), torch.tensor([9.0, 4.0, 3.0, 1.0]), 0.25, 0.5)
    tensor(0.6250, dtype=torch.float64)
    """
    num_pos, num_neg = pos.shape[-1], neg.shape[-1]
    if num_pos == 0 or num_neg == 0:
        raise ValueError(f"{num_pos} positives and {num_neg} negatives, but a pair needs at least one of each")
    start, end = window_ranks(alpha, d, num_neg)
    if pos.isnan().any() or neg.isnan().any():
        raise ValueError("a score is NaN, which has no rank: use -inf for items that were not scored")
    leading = torch.broadcast_shapes(pos.shape[:-1], neg.shape[:-1])
    best_first = neg.double().sort(dim=-1, descending=True).values
    window = best_first[..., start:end].flip(-1).expand(*leading, end - start).contiguous()
    scores = pos.double().expand(*leading, num_pos).contiguous()
    behind = torch.searchsorted(window, scores)
    not_ahead = torch.searchsorted(window, scores, right=True)
    pairs = num_pos * (end - start)
    return (behind + not_ahead).sum(-1).double() / (2 * pairs)


def window_ranks(alpha: float, d: float, num_negatives: int) -> tuple[int, int]:
    """The window ``[alpha, alpha + d]`` as 0-based ranks ``start <= rank < end`` among the negatives, best first.

    ``start = ceil(alpha * N)`` and ``end = ceil((alpha + d) * N)``, where a product that exceeds a whole number by
    rounding only (see ``_ROUNDING``) stands for that number.

    Raises:
        ValueError: ``alpha`` is below 0, ``d`` not above 0, ``alpha + d`` above 1, or the window holds no rank.

    The 15th of 25 negatives alone; without the guard the window would begin behind it and be empty:

    >>> 14 / 25 * 25, window_ranks(14 / 25, 1 / 25, 25)
    (14.000000000000002, (14, 15))
    """
    if not (alpha >= 0 and d > 0 and alpha + d <= 1 + _ROUNDING):
        raise ValueError(f"alpha = {alpha}, d = {d}, but a window needs 0 <= alpha, 0 < d and alpha + d <= 1")
    start = math.ceil((alpha - _ROUNDING) * num_negatives)
    end = min(math.ceil((alpha + d - _ROUNDING) * num_negatives), num_negatives)
    if start >= end:
        raise ValueError(
            f"alpha = {alpha}, d = {d} holds none of the {num_negatives} negatives: ranks {start} < j <= {end}; "
            f"use d >= 1 / {num_negatives} = {1 / max(num_negatives, 1):.3g}"
        )
    return start, end


def recall_window(k: int, num_positives: int, num_negatives: int) -> tuple[float, float]:
    """``(alpha, d)`` whose WPAUC bounds Recall@k (Theorem 3.4): ``alpha = (k - P) / N``, ``d = P / N``.

    With one positive it is ``((k - 1) / N, 1 / N)``, the one negative at rank k, and WPAUC *is* Recall@k (Lemma 3.5).

    Raises:
        ValueError: not ``1 <= P <= k <= N``.

    >>> recall_window(k=30, num_positives=10, num_negatives=200)
    (0.1, 0.05)
    """
    if not 1 <= num_positives <= k <= num_negatives:
        raise ValueError(
            f"k = {k} with {num_positives} positives and {num_negatives} negatives, but the window exists for "
            "1 <= positives <= k <= negatives only"
        )
    return (k - num_positives) / num_negatives, num_positives / num_negatives


def recall_bounds(window_auc: Tensor | float, num_positives: int) -> tuple[Tensor, Tensor]:
    """Bounds of a ranking's Recall@K given its WPAUC in the window of ``recall_window`` (Theorem 3.4).

    ``ceil(P (1 - sqrt(1 - w))) / P <= Recall@K <= floor(P sqrt(w)) / P``, for one ranking without ties. ``w`` is then a
    count of pairs over P^2, and the bounds are taken from that whole number: sqrt, floor and ceil of it are exact.

    Args:
        window_auc: [...] one WPAUC per user, not a mean over users.
        num_positives: P.

    Returns:
        Lower and upper bound, [...] float64.

    Raises:
        ValueError: a ``w`` is outside of [0, 1] or not a whole number of pairs (ties, a mean, or another P).

    Two positives, 3 of 4 pairs won: 2 (1 - sqrt(1/4)) = 1 and 2 sqrt(3/4) = 1.73, so exactly one is in the list.

    >>> recall_bounds(0.75, num_positives=2)
    (tensor(0.5000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    w = torch.as_tensor(window_auc, dtype=torch.float64)
    pairs = num_positives**2
    won = (w * pairs).round()
    whole = (w * pairs - won).abs() <= _PAIR_ROUNDING
    wrong = ~(whole & (won >= 0) & (won <= pairs))
    if wrong.any():
        raise ValueError(
            f"WPAUC = {w[wrong].flatten()[0].item():.6g} is no number of pairs over {num_positives}^2: the bounds hold "
            "for one ranking without ties, and for the window of recall_window"
        )
    lost_positives = (pairs - won).sqrt().floor()
    return (num_positives - lost_positives) / num_positives, won.sqrt().floor() / num_positives
