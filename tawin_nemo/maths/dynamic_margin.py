"""The margin that follows how confident an auxiliary recommender is (NAPO, Eq. 15-17)."""

from __future__ import annotations

from torch import Tensor


def confidence(score: Tensor) -> Tensor:
    """``(1 - score) / 2`` in [0, 1]: how surely the auxiliary model rejects an answer (NAPO, Eq. 15).

    ``score`` in [-1, 1] is its score of a rejected item for the user: the cosine of state and item vector.
    """
    return (1 - score) / 2


def dynamic_margin(mean_confidence: float, baseline: float, *, gamma0: float, alpha: float) -> float:
    """``[1 + alpha (mean confidence - R0)] gamma0``: larger for surely rejected answers (NAPO, Eq. 16).

    ``baseline`` is R0 before this batch, so the first batch, whose mean starts it, has margin gamma0 **[choice]**.

    >>> dynamic_margin(0.75, 0.5, gamma0=2.0, alpha=0.4)
    2.2
    """
    return (1 + alpha * (mean_confidence - baseline)) * gamma0


def next_baseline(baseline: float | None, mean_confidence: float, *, momentum: float) -> float:
    """R0 after a batch: ``m R0 + (1 - m) mean confidence``; the first batch starts it (NAPO, Eq. 17).

    >>> next_baseline(None, 0.5, momentum=0.9), next_baseline(0.5, 1.0, momentum=0.75)
    (0.5, 0.625)
    """
    if baseline is None:
        return mean_confidence
    return momentum * baseline + (1 - momentum) * mean_confidence
