"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Protocol


class HasSchedule(Protocol):
    """The schedule keys that the sections sft and rl share."""

    @property
    def lr(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup(self) -> int: ...
    @property
    def min_lr_ratio(self) -> float: ...


def scheduled(cfg: HasSchedule, step: int, total: int) -> float:
    """Learning rate of 0-based ``step`` out of ``total`` under a recipe section."""
    return learning_rate(
        step, peak=cfg.lr, schedule=cfg.schedule, warmup=cfg.warmup, total=total, min_ratio=cfg.min_lr_ratio
    )


def learning_rate(step: int, *, peak: float, schedule: str, warmup: int, total: int, min_ratio: float) -> float:
    """Learning rate of 0-based ``step`` out of ``total``: linear warm-up, then constant, cosine or linear decay.

    >>> [learning_rate(s, peak=1.0, schedule="linear", warmup=2, total=6, min_ratio=0.0) for s in (0, 1, 2, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    decay = 1.0 - share if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return peak * (min_ratio + (1.0 - min_ratio) * decay)
