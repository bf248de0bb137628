"""Entropic optimal transport: which code for which row, when every code is to get its share."""

from __future__ import annotations

import torch
from torch import Tensor


def transport_plan(cost_NK: Tensor, mass_K: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Plan [N, K] whose rows sum to 1 and whose columns sum (nearly) to ``mass_K`` (which sums to N).

    Minimises <plan, cost> - epsilon * entropy(plan) by Sinkhorn's alternating scaling in log space (Cuturi 2013,
    Algorithm 1). ``epsilon`` is in units of the cost. Rows are scaled last and hold exactly; the columns converge
    linearly in ``iterations``.
    """
    log_kernel_NK, log_mass_K = -cost_NK / epsilon, mass_K.to(cost_NK.dtype).log()
    column_K = torch.zeros_like(log_mass_K)
    row_N = -log_kernel_NK.logsumexp(dim=1)
    for _ in range(iterations):
        column_K = log_mass_K - (log_kernel_NK + row_N[:, None]).logsumexp(dim=0)
        row_N = -(log_kernel_NK + column_K).logsumexp(dim=1)
    return (log_kernel_NK + row_N[:, None] + column_K).exp()
