"""GRPO's objective (arXiv 2402.03300) with TAWin's weights (arXiv 2604.22504, Eq. 22)."""

from __future__ import annotations

from torch import Tensor

from tawin_nemo.maths.policy_loss import (
    Counts,
    Objective,
    PolicyTerms,
    kl_values,
    sequence_mean,
    token_stats,
    token_surrogate,
    with_kl,
)


def grpo_loss(
    logp_N: Tensor, terms: PolicyTerms, counts: Counts, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative of ``(1/M) sum_m (1/|Y_m|) sum_t [omega_m min(rho A_m, clip(rho) A_m) - beta KL_t]``.

    rho is the ratio of token t to the rollout's policy; the KL term is not weighted by omega. The sum runs over scored
    tokens: a forced token would add the constant ``omega_m A_m / |Y_m|``, which has no gradient and is not part of the
    reported value either.

    Args:
        logp_N: Log-probs of the scored tokens under the actor, with gradient.
        terms: The other inputs, by token and by candidate.
        counts: Sizes of the global batch.
        objective: Limits of the ratio; weight and estimator of the KL term.

    Returns:
        This process's share of the loss, and detached statistics that are to be *summed* over micro-batches and
        ranks and then passed to ``mean_stats``.

    Raises:
        ValueError: ``beta`` is not 0 but there are no reference log-probs, or the estimator is unknown.
    """
    surrogate_N, clipped_N = token_surrogate(logp_N, terms, objective)
    kl_N = kl_values(logp_N, terms, objective)
    mean = (terms.candidate_N, terms.length_M, counts.candidates)
    return with_kl(
        -sequence_mean(surrogate_N, *mean),
        None if kl_N is None else sequence_mean(kl_N, *mean),
        objective,
        token_stats(logp_N, terms, clipped_N),
    )
