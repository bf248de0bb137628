"""Shared parts of the clipped policy objectives: ratios, clipping, KL estimators, aggregation, statistics.

The objectives themselves have a file each: ``grpo``, ``dapo`` and ``gspo``, all with one signature. Everything works on
the N scored tokens of M candidates as flat vectors, so packing, padding and the order of rows do not exist here. All
sums are divided by *global* counts: adding up the losses of all micro-batches and data-parallel ranks gives the loss
of the whole batch, however it was split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tawin_nemo.types import Record

KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class PolicyTerms(Record):
    """Inputs of a policy objective besides the actor's log-probs: constants, no gradient flows into them.

    The N tokens are those whose log-prob was scored. Tokens that the trie forces are absent from them in trie space
    (their ratio is 1 and their KL 0), yet ``length_M`` may count them.
    """

    candidate_N: Tensor  # index into M of the candidate that the token belongs to
    old_logp_N: Tensor  # under the policy that made the rollout
    ref_logp_N: Tensor | None  # under the reference; None: no KL term
    advantage_M: Tensor
    omega_M: Tensor  # weight of the surrogate (TAWin, Eq. 22); ones for the plain algorithm
    length_M: Tensor  # |Y_m|: all tokens of the path incl. EOS (length_norm: full) or the branching ones
    importance_N: Tensor | None = None  # truncated training/rollout probability ratio of the old policy; None: ones


@dataclass(frozen=True)
class Counts:
    """Sizes of the global batch, over all micro-batches and data-parallel ranks."""

    candidates: float  # valid candidates
    tokens: float  # the sum of their |Y_m|


@dataclass(frozen=True)
class Objective:
    """Hyperparameters of an objective: limits of the ratio, weight and estimator of the KL term."""

    clip_low: float = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.2  # ... and above 1 + clip_high
    beta: float = 0.0
    kl: str = "k3"


def clipped_surrogate(ratio_N: Tensor, advantage_N: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """PPO's pessimistic surrogate ``min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``, to be maximised.

    Separate limits are DAPO's clip-higher; GSPO passes sequence ratios.

    >>> clipped_surrogate(torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2, 0.3)
    tensor([ 1.3000, -1.5000,  0.5000, -0.8000])
    """
    return torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantage_N)


def is_clipped(ratio_N: Tensor, advantage_N: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """bool [N]: the clip takes the token's gradient away."""
    too_high_N = (advantage_N > 0) & (ratio_N > 1 + clip_high)
    too_low_N = (advantage_N < 0) & (ratio_N < 1 - clip_low)
    return too_high_N | too_low_N


def token_surrogate(logp_N: Tensor, terms: PolicyTerms, objective: Objective) -> tuple[Tensor, Tensor]:
    """``omega_m min(rho A_m, clip(rho) A_m)`` of each token, times its importance weight, and where it is clipped.

    rho is the ratio of the token to the rollout's policy. [N], and bool [N].
    """
    ratio_N = torch.exp(logp_N - terms.old_logp_N)
    advantage_N = terms.advantage_M[terms.candidate_N]
    limits = objective.clip_low, objective.clip_high
    surrogate_N = terms.omega_M[terms.candidate_N] * clipped_surrogate(ratio_N, advantage_N, *limits)
    if terms.importance_N is not None:
        surrogate_N = surrogate_N * terms.importance_N
    return surrogate_N, is_clipped(ratio_N.detach(), advantage_N, *limits)


def kl_estimate(logp_N: Tensor, ref_logp_N: Tensor, kind: str) -> Tensor:
    """Estimates of KL(policy || reference) from tokens that the policy drew (J. Schulman, "Approximating KL").

    With ``d = log pi_ref - log pi``: k1 = ``-d`` (unbiased, either sign), k2 = ``d^2 / 2`` (second-order
    approximation, small bias), k3 = ``exp(d) - 1 - d`` (unbiased, never negative). Unbiased speaks of the value: as a
    loss on on-policy tokens only k2 has the gradient of KL(policy || reference) as its mean; k1's is 0, and k3's is
    the gradient of KL(reference || policy).

    Raises:
        ValueError: ``kind`` is not one of ``KL_ESTIMATORS``.
    """
    d_N = ref_logp_N - logp_N
    if kind == "k1":
        return -d_N
    if kind == "k2":
        return 0.5 * d_N.square()
    if kind == "k3":
        return torch.expm1(d_N) - d_N
    raise ValueError(f"kl = {kind!r}, but it must be one of {', '.join(KL_ESTIMATORS)}")


def sequence_mean(values_N: Tensor, candidate_N: Tensor, length_M: Tensor, num_candidates: float) -> Tensor:
    """``(1 / num_candidates) sum_m (1 / |Y_m|) sum_{t in m} value_t``: GRPO's aggregation, this process's share of it.

    Args:
        values_N: One value per scored token.
        candidate_N: The token's candidate, an index into M.
        length_M: |Y_m|; a candidate without scored tokens contributes nothing, whatever its length.
        num_candidates: Valid candidates of the global batch, over all micro-batches and data-parallel ranks.
    """
    return (values_N / length_M.to(values_N.dtype)[candidate_N]).sum() / num_candidates


def token_mean(values_N: Tensor, num_tokens: float) -> Tensor:
    """``sum_t value_t / num_tokens``: DAPO's aggregation, in which long answers weigh more (2503.14476, Eq. 12)."""
    return values_N.sum() / num_tokens


def candidate_sums(values_N: Tensor, candidate_N: Tensor, num_candidates: int) -> Tensor:
    """Sum of the tokens' values for each of M candidates; 0 for a candidate without tokens."""
    return values_N.new_zeros(num_candidates).index_add(0, candidate_N, values_N)


def kl_values(logp_N: Tensor, terms: PolicyTerms, objective: Objective) -> Tensor | None:
    """KL estimate [N] of each token by ``objective.kl``, or None without reference log-probs.

    Raises:
        ValueError: ``beta`` is not 0 but there are no reference log-probs, or the estimator is unknown.
    """
    if terms.ref_logp_N is not None:
        return kl_estimate(logp_N, terms.ref_logp_N, objective.kl)
    if objective.beta != 0.0:
        raise ValueError(
            f"beta = {objective.beta}, but ref_logp_N is None: "
            "score the candidates with the reference, or set beta to 0"
        )
    return None


def with_kl(
    policy_loss: Tensor, kl: Tensor | None, objective: Objective, stats: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``policy_loss + beta * kl`` and ``stats`` with both terms added, detached."""
    stats = {"policy_loss": policy_loss.detach(), **stats}
    if kl is None:
        return policy_loss, stats | {"loss": policy_loss.detach()}
    loss = policy_loss + objective.beta * kl
    return loss, stats | {"kl": kl.detach(), "loss": loss.detach()}


def token_stats(logp_N: Tensor, terms: PolicyTerms, clipped_N: Tensor) -> dict[str, Tensor]:
    """Sums over tokens for the log: ratio, clipping, and the distance of the policy from that of the rollout.

    ``shift_kl`` estimates KL(rollout policy || this policy) without bias (k3), ``prob_error`` is the mean change of a
    token's probability. Before the first update of a rollout both should be 0: the remainder is the mismatch between
    the training and the rollout forward pass.
    """
    with torch.no_grad():
        log_ratio_N = logp_N - terms.old_logp_N
        return {
            "ratio_sum": log_ratio_N.exp().sum(),
            "clipped_sum": clipped_N.sum().to(logp_N.dtype),
            "shift_kl_sum": (torch.expm1(log_ratio_N) - log_ratio_N).sum(),
            "prob_error_sum": (logp_N.exp() - terms.old_logp_N.exp()).abs().sum(),
            "scored_tokens": logp_N.new_full((), len(logp_N)),
        }


#: Sums over tokens in the statistics of an objective -> the name of their mean.
_MEANS = {"ratio_sum": "ratio_mean", "clipped_sum": "clip_fraction",
          "shift_kl_sum": "shift_kl", "prob_error_sum": "prob_error"}  # fmt: skip


def mean_stats(summed: dict[str, float]) -> dict[str, float]:
    """Turn statistics summed over micro-batches and ranks into logged ones: token sums become means over tokens.

    >>> mean_stats({"loss": 0.5, "ratio_sum": 8.0, "clipped_sum": 1.0, "scored_tokens": 8.0})
    {'loss': 0.5, 'scored_tokens': 8.0, 'ratio_mean': 1.0, 'clip_fraction': 0.125}
    """
    tokens = max(summed["scored_tokens"], 1.0)
    kept = {name: value for name, value in summed.items() if name not in _MEANS}
    return kept | {mean: summed[name] / tokens for name, mean in _MEANS.items() if name in summed}
