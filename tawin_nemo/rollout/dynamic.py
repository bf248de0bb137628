"""Distinct candidates out of more draws than are needed: the dynamic sampling of ReRe (arXiv 2510.12211)."""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor

from tawin_nemo.errors import ConfigError
from tawin_nemo.types import Candidates


def draws_for(group_size: int, oversample: float) -> int:
    """Draws from which ``group_size`` candidates are kept: ``ceil(oversample * group_size)``.

    Raises ConfigError for an ``oversample`` below 1.

    >>> draws_for(16, 1.5), draws_for(10, 1.1)
    (24, 11)
    """
    if not (math.isfinite(oversample) and oversample >= 1):
        raise ConfigError(f"rl.oversample={oversample} must be at least 1: draws per candidate that is kept")
    return math.ceil(round(oversample * group_size, 9))  # 1.1 * 10 is a little above 11


def distinct_first(found: Candidates, target_leaf_B: Tensor, group_size: int) -> Candidates:
    """Keep ``group_size`` of W >= ``group_size`` independent draws of each prompt, as many distinct paths as possible.

    Which ones **[choice]**: the target's path if it was drawn; then every other path that was drawn, once, best
    log-prob first; if these are fewer than ``group_size``, second draws of the same paths in the same order (the
    target's first), then third draws, and so on. What is kept is listed best score first, as everywhere. Every kept
    place is a real draw with its own log-probs: those of the policy at temperature 1, as ``constrained_sample`` gives
    them.

    ReRe's public code orders the wrong paths by how often they were drawn, whose expectation is this order at
    temperature 1; it keeps *every* draw of the target, which can fill a group with targets, while here a path comes
    twice only when there are too few.

    The draws are independent, the kept set is not a sample of the policy: likely wrong paths appear once however often
    they were drawn, unlikely ones are dropped first, and the target never is. A group's mean reward is therefore not
    an estimate of the policy's, and the mean of the surrogate over the group is not an unbiased estimate of its
    expectation; the ratio of each single candidate is exact.

    Args:
        found: Draws, sorted by score (``constrained_sample``).
        target_leaf_B: Leaf of each prompt's target.
        group_size: G.
    """
    leaf_BW = found.leaf_BW
    width = leaf_BW.shape[1]
    place_W = torch.arange(width, device=leaf_BW.device)
    others_later_BW = (leaf_BW != target_leaf_B[:, None]) * width
    preference_BW = repeats_before(leaf_BW) * (2 * width) + others_later_BW + place_W
    kept_BG = preference_BW.argsort(dim=1)[:, :group_size].sort(dim=1).values
    return at_places(found, kept_BG)


def repeats_before(leaf_BW: Tensor) -> Tensor:
    """How many places to the left hold the same leaf. [B, W] int64.

    >>> repeats_before(torch.tensor([[7, 3, 7, 7, 3]]))
    tensor([[0, 0, 1, 2, 1]])
    """
    by_leaf_BW, order_BW = leaf_BW.sort(dim=1, stable=True)
    place_BW = torch.arange(leaf_BW.shape[1], device=leaf_BW.device).expand_as(leaf_BW)
    new_BW = torch.ones_like(leaf_BW, dtype=torch.bool)
    new_BW[:, 1:] = by_leaf_BW[:, 1:] != by_leaf_BW[:, :-1]
    first_BW = torch.where(new_BW, place_BW, 0).cummax(dim=1).values
    return torch.empty_like(leaf_BW).scatter_(1, order_BW, place_BW - first_BW)


def at_places(found: Candidates, place_BG: Tensor) -> Candidates:
    """The candidates at these places of each list."""

    def taken(tensor: Tensor) -> Tensor:
        index = place_BG if tensor.ndim == 2 else place_BG[..., None].expand(*place_BG.shape, tensor.shape[-1])
        return tensor.gather(1, index)

    return Candidates(**{field.name: taken(getattr(found, field.name)) for field in fields(Candidates)})
