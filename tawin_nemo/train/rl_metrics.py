"""Metrics of an RL step besides those of the loss: of its rollouts, and tokens and FLOPs of its phases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.maths.advantages import zero_std_groups
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.rollout.groups import GroupStats
from tawin_nemo.run.mfu import forward_flop_count
from tawin_nemo.run.timers import Timers, count_update
from tawin_nemo.types import DataParallel, Rollout, TokenBatch


def rollout_metrics(rollout: Rollout, rewards_BG: Tensor, dp: DataParallel, masked: int = 0) -> dict[str, float]:
    """Mean reward, hit rate and shares of the kinds of groups (``GroupStats``), over all data-parallel ranks.

    ``masked``: candidates of this rank that were left out, because their reward is not finite; only a step with such
    candidates has ``rl/masked_rewards``.
    """
    valid = rollout.valid_BG
    mine = (
        GroupStats.of(rollout),
        float((rewards_BG * valid).sum(dtype=torch.float64)),
        int(zero_std_groups(rewards_BG, valid).sum()),
        masked,
    )
    parts = dp.gather(mine)
    groups = sum((part for part, *_ in parts), GroupStats())
    lost = sum(count for *_, count in parts)
    count, shares = max(1, groups.groups), groups.means()
    return {
        "rl/reward": sum(rewards for _, rewards, *_ in parts) / max(1, groups.candidates),
        "rl/hit_rate": 1.0 - shares.pop("frac_groups_without_target") - shares["frac_inserted_groups"],
        "rl/frac_zero_std_groups": sum(zero for _, _, zero, _ in parts) / count,
        **({"rl/masked_rewards": float(lost)} if lost else {}),
        **prefixed(shares),
    }


def prefixed(stats: dict[str, float]) -> dict[str, float]:
    """The metrics with the prefix ``rl/``, except ``grad_norm``."""
    return {name if name == "grad_norm" else f"rl/{name}": value for name, value in stats.items()}


def count_flops(
    timers: Timers,
    engine: Engine,
    dp: DataParallel,
    shape: Backbone,
    batches: Sequence[TokenBatch],
    *,
    path_tokens: int,
    scored: bool,
    passes: int,
) -> None:
    """Count tokens and FLOPs of the phases generate, reference and update of this step in ``timers``.

    ``path_tokens``: generated tokens; ``scored``: whether the reference ran; ``passes``: inner updates. ``dp`` are the
    training replicas, whose counts the timers add up. When the engine has its own replicas, each training replica
    counts an equal share of their total.
    """
    ran = engine.pop_flops()
    rows, flops = float(ran.tokens), ran.forward_flops(shape)
    if engine.dp is not None:
        rows, flops = np.sum(engine.dp.gather((rows, flops)), axis=0) / dp.size
    timers.count("generate", tokens=path_tokens, rows=rows, flops=flops)
    if scored:
        once, tokens = forward_flop_count(batches, shape.vocab), sum(len(batch.target_N) for batch in batches)
        timers.count("reference", tokens=tokens, rows=once.tokens, flops=once.forward_flops(shape))
    count_update(timers, batches, shape, passes=passes)
