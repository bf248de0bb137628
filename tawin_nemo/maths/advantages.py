"""Group-relative advantages (GRPO, arXiv 2402.03300): the reward, normalised within the candidates of one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

STDS = ("population", "sample")


def group_advantages(
    rewards_BG: Tensor, eps: float = 1e-4, *, std: str = "population", valid_BG: Tensor | None = None
) -> Tensor:
    """``A = (r - mean_G r) / (std_G r + eps)``, mean and std over the valid candidates of the group. [B, G].

    A group whose rewards are all equal teaches nothing: its advantages are exactly 0, whatever rounding does to its
    mean. Candidates that are not valid (padding) get 0.

    Args:
        rewards_BG: One group per row.
        eps: Added to the standard deviation.
        std: ``population`` divides the squares by G, ``sample`` by G - 1.
        valid_BG: bool; None means that all candidates are valid.

    Raises:
        ValueError: ``std`` is not one of ``STDS``.

    One hit among four: mean 1/4, population variance (9/16 + 3 * 1/16) / 4 = 3/16.

    >>> group_advantages(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), eps=0.0)
    tensor([[-0.5774,  1.7321, -0.5774, -0.5774]])
    """
    if std not in STDS:
        raise ValueError(f"std = {std!r}, but it must be one of {', '.join(STDS)}")
    valid_BG = torch.ones_like(rewards_BG, dtype=torch.bool) if valid_BG is None else valid_BG
    num_B1 = valid_BG.sum(-1, keepdim=True)
    mean_B1 = torch.where(valid_BG, rewards_BG, 0.0).sum(-1, keepdim=True) / num_B1.clamp(min=1)
    centred_BG = torch.where(valid_BG, rewards_BG - mean_B1, 0.0)
    freedom_B1 = num_B1 if std == "population" else num_B1 - 1
    std_B1 = (centred_BG.square().sum(-1, keepdim=True) / freedom_B1.clamp(min=1)).sqrt()
    constant_B1 = zero_std_groups(rewards_BG, valid_BG).unsqueeze(-1)
    return torch.where(constant_B1, 0.0, centred_BG / torch.where(constant_B1, 1.0, std_B1 + eps))


def zero_std_groups(rewards_BG: Tensor, valid_BG: Tensor | None = None) -> Tensor:
    """bool [B]: the group's valid candidates all have the same reward (or there are none)."""
    valid_BG = torch.ones_like(rewards_BG, dtype=torch.bool) if valid_BG is None else valid_BG
    infinity = torch.finfo(rewards_BG.dtype).max
    highest_B = torch.where(valid_BG, rewards_BG, -infinity).amax(-1)
    lowest_B = torch.where(valid_BG, rewards_BG, infinity).amin(-1)
    return highest_B <= lowest_B


def frac_zero_std_groups(rewards_BG: Tensor, valid_BG: Tensor | None = None) -> Tensor:
    """Share of groups with advantage 0 throughout, a scalar in [0, 1] (the groups that this process holds).

    >>> frac_zero_std_groups(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    tensor(0.5000)
    """
    return zero_std_groups(rewards_BG, valid_BG).float().mean()
