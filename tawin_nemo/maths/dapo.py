"""DAPO's objective (arXiv 2503.14476, Eq. 8-12): clip-higher and a mean over tokens; TAWin's weights by option.

Its dynamic sampling is part of the rollout (``train/rollouts.py``). Its overlong filtering has no counterpart here: the
paths of a closed catalog have known lengths.
"""

from __future__ import annotations

from torch import Tensor

from tawin_nemo.maths.policy_loss import (
    Counts,
    Objective,
    PolicyTerms,
    kl_values,
    token_mean,
    token_stats,
    token_surrogate,
    with_kl,
)


def dapo_loss(
    logp_N: Tensor, terms: PolicyTerms, counts: Counts, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative of ``(1 / sum_m |Y_m|) sum_m sum_t [omega_m min(rho A_m, clip(rho) A_m) - beta KL_t]``.

    It differs from ``grpo_loss`` in that every token of the global batch weighs the same, forced ones included in the
    count.
    Arguments, result and errors are those of ``grpo_loss``.
    """
    surrogate_N, clipped_N = token_surrogate(logp_N, terms, objective)
    kl_N = kl_values(logp_N, terms, objective)
    return with_kl(
        -token_mean(surrogate_N, counts.tokens),
        None if kl_N is None else token_mean(kl_N, counts.tokens),
        objective,
        token_stats(logp_N, terms, clipped_N),
    )
