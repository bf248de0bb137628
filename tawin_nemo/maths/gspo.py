"""GSPO's objective (arXiv 2507.18071, Eq. 5-7): one ratio per candidate; TAWin's weights by option."""

from __future__ import annotations

import torch
from torch import Tensor

from tawin_nemo.maths.policy_loss import (
    Counts,
    Objective,
    PolicyTerms,
    candidate_sums,
    clipped_surrogate,
    is_clipped,
    kl_values,
    sequence_mean,
    token_stats,
    with_kl,
)


def gspo_loss(
    logp_N: Tensor, terms: PolicyTerms, counts: Counts, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative of ``(1/M) sum_m [omega_m min(s_m A_m, clip(s_m) A_m)] - beta KL``.

    ``s_m = exp((1/|Y_m|) sum_t (logp_t - old_t))``: forced tokens add nothing to the sum. The limits belong to the
    whole path and are far narrower than a token's (the paper uses 3e-4 and 4e-4). Before the first update of a rollout
    its gradient is GRPO's. ``clip_fraction`` counts the tokens of clipped candidates. A candidate without scored
    tokens is a constant and is omitted from the value. Arguments, result and errors are those of ``grpo_loss``.
    """
    num = len(terms.advantage_M)
    length_M = terms.length_M.to(logp_N.dtype)
    ratio_M = torch.exp(candidate_sums(logp_N - terms.old_logp_N, terms.candidate_N, num) / length_M.clamp(min=1))
    limits = objective.clip_low, objective.clip_high
    surrogate_M = terms.omega_M * clipped_surrogate(ratio_M, terms.advantage_M, *limits)
    if terms.importance_N is not None:
        log_importance_M = candidate_sums(terms.importance_N.log(), terms.candidate_N, num) / length_M.clamp(min=1)
        surrogate_M = surrogate_M * log_importance_M.exp()
    scored_M = torch.zeros(num, dtype=torch.bool, device=logp_N.device)
    scored_M[terms.candidate_N] = True
    kl_N = kl_values(logp_N, terms, objective)
    kl = None if kl_N is None else sequence_mean(kl_N, terms.candidate_N, terms.length_M, counts.candidates)
    clipped_M = is_clipped(ratio_M.detach(), terms.advantage_M, *limits)
    return with_kl(
        -torch.where(scored_M, surrogate_M, 0.0).sum() / counts.candidates,
        kl,
        objective,
        token_stats(logp_N, terms, clipped_M[terms.candidate_N]),
    )
