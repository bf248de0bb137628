"""DAPO's dynamic sampling (arXiv 2503.14476, Section 3.2): groups that teach nothing make room for others, bounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tawin_nemo.maths.advantages import zero_std_groups
from tawin_nemo.rollout.groups import join_groups, take_groups
from tawin_nemo.types import DataParallel, Rollout

RollOut = Callable[[], tuple[Rollout, Tensor]]


def informative(rollout: Rollout, rewards_BG: Tensor) -> tuple[Rollout, Tensor]:
    """The groups whose rewards differ: all others have advantage 0 throughout."""
    rows = (~zero_std_groups(rewards_BG, rollout.valid_BG)).nonzero().squeeze(1)
    return take_groups(rollout, rows), rewards_BG[rows]


def refilled(
    rollout: Rollout, rewards_BG: Tensor, more: RollOut, *, wanted: int, most: int, dp: DataParallel
) -> tuple[Rollout, Tensor, int]:
    """Informative groups only, from this rollout and up to ``most`` further ones: rollout, rewards, rollouts added.

    Rolls out on all replicas alike until they hold ``wanted`` such groups together. All that were found stay, also
    beyond ``wanted``: they are paid for. When none was found at all the first rollout is returned as it is, so that
    there is something to step on. ``more`` rolls out the next prompts of the stream with the same weights.
    """
    kept = [informative(rollout, rewards_BG)]

    def found() -> int:
        return sum(dp.gather(sum(len(part.prompts) for part, _ in kept)))

    added = 0
    while added < most and found() < wanted:
        kept.append(informative(*more()))
        added += 1
    if found() == 0:
        return rollout, rewards_BG, added
    return join_groups([part for part, _ in kept]), torch.cat([rewards for _, rewards in kept]), added
