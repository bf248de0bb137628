"""Clipped policy objective of GRPO and the pieces that its relatives share (DAPO 2503.14476, GSPO 2507.18071).

Everything works on the N scored tokens of M candidates as flat vectors, so packing, padding and the order of rows do
not exist here. All sums are divided by *global* counts: adding up the losses of all micro-batches and data-parallel
ranks gives the loss of the whole batch, however it was split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class PolicyTerms:
    """What the policy objective needs besides the actor's log-probs; constants, no gradient reaches them.

    The N tokens are those whose log-prob was scored. Tokens that the trie forces are absent from them in trie space
    (their ratio is 1 and their KL 0), yet ``length_M`` may count them.
    """

    candidate_N: Tensor  # index into M of the candidate that the token belongs to
    old_logp_N: Tensor  # under the policy that made the rollout
    ref_logp_N: Tensor | None  # under the reference; None: no KL term
    advantage_M: Tensor
    omega_M: Tensor  # weight of the surrogate (TAWin, Eq. 22); ones for plain GRPO
    length_M: Tensor  # |Y_m|: all tokens of the path incl. EOS (length_norm: full) or the branching ones


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


def grpo_loss(
    logp_N: Tensor,
    terms: PolicyTerms,
    *,
    num_candidates: float,
    clip_low: float,
    clip_high: float,
    beta: float = 0.0,
    kl: str = "k3",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative of TAWin's objective (Eq. 22), GRPO's when every omega is 1; KL is not weighted by omega.

    ``-(1/M) sum_m (1/|Y_m|) sum_t [omega_m min(rho A_m, clip(rho) A_m) - beta KL_t]``, rho the ratio of token t to the
    rollout's policy. The sum runs over scored tokens: a forced token would add the constant ``omega_m A_m / |Y_m|``,
    which has no gradient and is left out of the reported value too.

    Args:
        logp_N: Log-probs of the scored tokens under the actor, with gradient.
        terms: The other facts of these tokens and their candidates.
        num_candidates: Valid candidates of the global batch (see ``sequence_mean``).
        clip_low: The ratio is clipped below ``1 - clip_low``.
        clip_high: The ratio is clipped above ``1 + clip_high``.
        beta: Weight of the KL term; it needs ``terms.ref_logp_N``.
        kl: One of ``KL_ESTIMATORS``.

    Returns:
        This process's share of the loss, and detached statistics that are to be *summed* over micro-batches and
        ranks and then passed to ``mean_stats``.

    Raises:
        ValueError: ``beta`` is not 0 and there are no reference log-probs.
    """
    if beta != 0.0 and terms.ref_logp_N is None:
        raise ValueError(
            f"beta = {beta}, but ref_logp_N is None: score the candidates with the reference, or set beta to 0"
        )
    ratio_N = torch.exp(logp_N - terms.old_logp_N)
    advantage_N = terms.advantage_M[terms.candidate_N]
    omega_N = terms.omega_M[terms.candidate_N]
    surrogate_N = omega_N * clipped_surrogate(ratio_N, advantage_N, clip_low, clip_high)
    loss = -sequence_mean(surrogate_N, terms.candidate_N, terms.length_M, num_candidates)
    stats = {
        "policy_loss": loss.detach(),
        "ratio_sum": ratio_N.detach().sum(),
        "clipped_tokens": is_clipped(ratio_N.detach(), advantage_N, clip_low, clip_high).sum().to(loss.dtype),
        "scored_tokens": loss.new_tensor(len(logp_N)),
    }
    if terms.ref_logp_N is not None:
        kl_N = kl_estimate(logp_N, terms.ref_logp_N, kl)
        kl_mean = sequence_mean(kl_N, terms.candidate_N, terms.length_M, num_candidates)
        loss = loss + beta * kl_mean
        stats["kl"] = kl_mean.detach()
    return loss, stats | {"loss": loss.detach()}


def mean_stats(summed: dict[str, float]) -> dict[str, float]:
    """Summed statistics of ``grpo_loss`` as what one logs: the token sums become means over all scored tokens.

    >>> mean_stats({"loss": 0.5, "ratio_sum": 8.0, "clipped_tokens": 1.0, "scored_tokens": 8.0})
    {'loss': 0.5, 'scored_tokens': 8.0, 'ratio_mean': 1.0, 'clip_fraction': 0.125}
    """
    means = {name: value for name, value in summed.items() if name not in ("ratio_sum", "clipped_tokens")}
    tokens = max(summed["scored_tokens"], 1.0)
    return means | {"ratio_mean": summed["ratio_sum"] / tokens, "clip_fraction": summed["clipped_tokens"] / tokens}
