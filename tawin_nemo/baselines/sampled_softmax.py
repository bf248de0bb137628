"""Softmax cross-entropy against sampled items (Bengio and Senecal, 2008), with logQ correction as an option.

N sampled items are drawn once per optimizer step, with replacement, and shared by all M targets of the step. So a step
costs one small matrix product instead of the whole catalog, and its loss does not depend on micro-batch sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SharedNegatives:
    """The sampled items of one step; where scores are corrected, log of how often each item is expected among them."""

    items_N: Tensor
    log_expected_I: Tensor | None = None


def sampled_softmax_loss(own_M: Tensor, shared_MN: Tensor, target_M: Tensor, negatives: SharedNegatives) -> Tensor:
    """``-log(e^own / (e^own + sum_n e^shared_n))`` per target, without the negatives that are the target itself. [M]

    ``own_M`` are the scores of the targets, ``shared_MN`` those of ``negatives.items_N``. LogQ correction subtracts
    ``log(N q_n)`` from the score of a negative with the probability ``q_n``: then the sum over negatives is an unbiased
    estimate of the sum over all other items, and the loss one of the full softmax (Bengio and Senecal). The target is
    in the sum with certainty, so its score is not corrected (arXiv 2507.09331).
    """
    if negatives.log_expected_I is not None:
        shared_MN = shared_MN - negatives.log_expected_I[negatives.items_N]
    shared_MN = shared_MN.masked_fill(negatives.items_N == target_M.unsqueeze(1), float("-inf"))
    return torch.cat([own_M.unsqueeze(1), shared_MN], dim=1).logsumexp(dim=1) - own_M


@dataclass(frozen=True, eq=False)
class NegativeSampler:
    """Draws ``count`` items with the probabilities ``q_I``, from torch's global generator of their device."""

    count: int
    q_I: Tensor
    logq: bool = False

    @classmethod
    def of(cls, count_I: np.ndarray, count: int, *, popularity: bool, logq: bool, device: torch.device | str = "cpu",
           ) -> NegativeSampler:  # fmt: skip
        """Uniform over the I items, or with ``popularity`` in proportion to ``count_I``, how often each is a target."""
        weight_I = torch.from_numpy(np.asarray(count_I, dtype=np.float32)) if popularity else torch.ones(len(count_I))
        return cls(count, (weight_I / weight_I.sum()).to(device), logq)

    def draw(self) -> SharedNegatives:
        """The negatives of one step."""
        items_N = torch.multinomial(self.q_I, self.count, replacement=True)
        return SharedNegatives(items_N, (self.count * self.q_I).log() if self.logq else None)
