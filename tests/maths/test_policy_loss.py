"""The policy loss against loops, its gradient, Lemma 3.1, the KL estimators, and splits into micro-batches."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tawin_nemo.maths import grpo
from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.maths.policy_loss import (
    Counts,
    Objective,
    PolicyTerms,
    clipped_surrogate,
    is_clipped,
    kl_estimate,
    mean_stats,
    sequence_mean,
)

LOW, HIGH, BETA = 0.2, 0.28, 0.05
CLIP = {"clip_low": LOW, "clip_high": HIGH}
EXACT = {"rtol": 0.0, "atol": 1e-12}


def grpo_loss(
    logp_N: Tensor, terms: PolicyTerms, *, num_candidates: float, beta: float = 0.0, kl: str = "k3", **clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    return grpo.grpo_loss(logp_N, terms, Counts(num_candidates, math.nan), Objective(beta=beta, kl=kl, **clip))


def random_problem(seed: int = 0, M: int = 12) -> tuple[Tensor, PolicyTerms]:
    """M candidates of 0 to 5 scored tokens out of up to 9; ratios on both sides of the clip limits."""
    generator = torch.Generator().manual_seed(seed)
    scored_M = torch.randint(0, 6, (M,), generator=generator)
    candidate_N = torch.repeat_interleave(torch.arange(M), scored_M)
    N = len(candidate_N)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    logp_N = -normal(N).abs()
    terms = PolicyTerms(
        candidate_N=candidate_N,
        old_logp_N=logp_N + 0.3 * normal(N),
        ref_logp_N=logp_N + 0.3 * normal(N),
        advantage_M=normal(M),
        omega_M=normal(M).abs(),
        length_M=scored_M + torch.randint(0, 4, (M,), generator=generator),
    )
    return logp_N, terms


def looped_loss(logp: list[float], terms: PolicyTerms, num_candidates: float) -> float:
    """Eq. 22 with k3, candidate by candidate and token by token."""
    assert terms.ref_logp_N is not None
    total = 0.0
    for m, (A, omega, length) in enumerate(
        zip(terms.advantage_M.tolist(), terms.omega_M.tolist(), terms.length_M.tolist(), strict=True)
    ):
        for t in (terms.candidate_N == m).nonzero().flatten().tolist():
            rho = math.exp(logp[t] - terms.old_logp_N[t].item())
            clipped = min(max(rho, 1 - LOW), 1 + HIGH)
            d = terms.ref_logp_N[t].item() - logp[t]
            total += (omega * min(rho * A, clipped * A) - BETA * (math.exp(d) - 1 - d)) / length
    return -total / num_candidates


@pytest.mark.parametrize("seed", range(4))
def test_loss_equals_loops(seed: int) -> None:
    logp_N, terms = random_problem(seed)
    loss, stats = grpo_loss(logp_N, terms, num_candidates=37, beta=BETA, **CLIP)
    assert loss.item() == pytest.approx(looped_loss(logp_N.tolist(), terms, 37), abs=1e-12)
    assert stats["loss"].item() == pytest.approx(stats["policy_loss"].item() + BETA * stats["kl"].item(), abs=1e-12)
    assert stats["scored_tokens"].item() == len(logp_N)
    assert is_clipped(torch.exp(logp_N - terms.old_logp_N), terms.advantage_M[terms.candidate_N], **CLIP).any()


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_loss_gradient(kl: str) -> None:
    logp_N, terms = random_problem(1)
    logp_N.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, terms, num_candidates=5, beta=BETA, kl=kl, **CLIP)[0], (logp_N,)
    )


def test_clipped_tokens_get_no_gradient_and_are_counted() -> None:
    # rho:     1.5        1.5       0.5       0.5       1.1
    ratio_N = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    advantage_M = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    logp_N = ratio_N.log().requires_grad_()
    terms = PolicyTerms(
        torch.arange(5), torch.zeros(5), None, advantage_M, torch.ones(5), torch.ones(5, dtype=torch.int64)
    )
    loss, stats = grpo_loss(logp_N, terms, num_candidates=5, **CLIP)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8 + 1.1) / 5)
    assert logp_N.grad is not None
    assert logp_N.grad.tolist() == pytest.approx([0, 1.5 / 5, -0.5 / 5, 0, -1.1 / 5])
    stats_means = mean_stats({name: value.item() for name, value in stats.items()})
    assert stats_means["clip_fraction"] == 2 / 5
    assert stats_means["ratio_mean"] == pytest.approx((1.5 + 1.5 + 0.5 + 0.5 + 1.1) / 5)
    assert "kl" not in stats


def test_omega_weighs_the_surrogate_and_not_the_kl() -> None:
    logp_N, terms = random_problem(2)
    doubled = dataclasses.replace(terms, omega_M=2 * terms.omega_M)
    _, once = grpo_loss(logp_N, terms, num_candidates=5, beta=BETA, **CLIP)
    _, twice = grpo_loss(logp_N, doubled, num_candidates=5, beta=BETA, **CLIP)
    torch.testing.assert_close(twice["policy_loss"], 2 * once["policy_loss"], **EXACT)
    assert twice["kl"] == once["kl"]


@pytest.mark.parametrize("cuts", [[4], [3, 3, 9], [1, 2, 5, 11]])
def test_any_split_into_micro_batches_gives_the_same_loss_gradient_and_statistics(cuts: list[int]) -> None:
    logp_N, terms = random_problem(3)
    whole_N = logp_N.clone().requires_grad_()
    loss, stats = grpo_loss(whole_N, terms, num_candidates=12, beta=BETA, **CLIP)
    loss.backward()
    split_N = logp_N.clone().requires_grad_()
    summed = dict.fromkeys(stats, torch.zeros((), dtype=torch.float64))
    for start, stop in zip([0, *cuts], [*cuts, 12], strict=True):
        mine_N = (terms.candidate_N >= start) & (terms.candidate_N < stop)
        assert terms.ref_logp_N is not None
        part = PolicyTerms(
            terms.candidate_N[mine_N] - start,
            terms.old_logp_N[mine_N],
            terms.ref_logp_N[mine_N],
            terms.advantage_M[start:stop],
            terms.omega_M[start:stop],
            terms.length_M[start:stop],
        )
        part_loss, part_stats = grpo_loss(split_N[mine_N], part, num_candidates=12, beta=BETA, **CLIP)
        part_loss.backward()
        summed = {name: summed[name] + value for name, value in part_stats.items()}
    assert split_N.grad is not None
    torch.testing.assert_close(split_N.grad, whole_N.grad, **EXACT)
    for name, value in stats.items():
        torch.testing.assert_close(summed[name], value, **EXACT)


def test_first_update_is_the_policy_gradient() -> None:
    """At rho = 1 the gradient is that of -A omega logp / |Y|, whatever the clip."""
    logp_N, terms = random_problem(4)
    logp_N.requires_grad_()
    on_policy = dataclasses.replace(terms, old_logp_N=logp_N.detach())
    (gradient_N,) = torch.autograd.grad(grpo_loss(logp_N, on_policy, num_candidates=8, **CLIP)[0], logp_N)
    m_N = terms.candidate_N
    expected_N = -(terms.advantage_M * terms.omega_M / terms.length_M)[m_N] / 8
    torch.testing.assert_close(gradient_N, expected_N, **EXACT)


def test_full_length_norm_counts_forced_tokens() -> None:
    """Candidate 0 has two scored tokens out of a path of 8: each weighs 1/8, and the mean is over 2 candidates."""
    values_N, candidate_N = torch.tensor([3.0, 5.0, 7.0]), torch.tensor([0, 0, 1])
    assert sequence_mean(values_N, candidate_N, torch.tensor([8, 1]), 2).item() == ((3 + 5) / 8 + 7 / 1) / 2


def test_candidates_without_tokens_are_harmless() -> None:
    logp_N = torch.zeros(0, requires_grad=True)
    empty = torch.zeros(0)
    terms = PolicyTerms(empty.long(), empty, empty, torch.ones(3), torch.ones(3), torch.tensor([0, 4, 2]))
    loss, stats = grpo_loss(logp_N, terms, num_candidates=3, beta=BETA, **CLIP)
    loss.backward()
    assert loss.item() == 0
    assert mean_stats({name: value.item() for name, value in stats.items()})["clip_fraction"] == 0


def test_kl_needs_a_reference_and_a_known_estimator() -> None:
    logp_N, terms = random_problem()
    with pytest.raises(ValueError, match="set beta to 0"):
        grpo_loss(logp_N, dataclasses.replace(terms, ref_logp_N=None), num_candidates=1, beta=BETA, **CLIP)
    with pytest.raises(ValueError, match="kl = 'k4'"):
        grpo_loss(logp_N, terms, num_candidates=1, beta=BETA, kl="k4", **CLIP)


# Expectations over an enumerable catalog: two tokens per item, 3 x 4 paths, every distribution is known.


def path_logprobs(logits_A: Tensor, logits_AB: Tensor) -> Tensor:
    """Log-probs of both tokens of all paths: [paths, 2]."""
    first_A, second_AB = logits_A.log_softmax(-1), logits_AB.log_softmax(-1)
    return torch.stack([first_A.unsqueeze(1).expand_as(second_AB), second_AB], dim=-1).reshape(-1, 2)


def random_policy(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3 + 12, generator=generator, dtype=torch.float64)
    return logits[:3], logits[3:].reshape(3, 4)


def test_lemma_3_1() -> None:
    """J = sqrt(p (1 - p)) (E_hits[mean_t min(rho, 1 + eps)] - E_misses[mean_t max(rho, 1 - eps)])."""
    eps = 0.2
    new_MT, old_MT = path_logprobs(*random_policy(1)), path_logprobs(*random_policy(2))
    q_M = old_MT.sum(-1).exp()
    hit_M = torch.arange(12) % 5 == 1
    p = q_M[hit_M].sum()
    advantage_M = (hit_M.double() - p) / (p * (1 - p)).sqrt()
    candidate_N = torch.arange(12).repeat_interleave(2)
    # omega = probability of the candidate turns the sum over the catalog into the expectation over rollouts
    terms = PolicyTerms(candidate_N, old_MT.flatten(), None, advantage_M, q_M, torch.full((12,), 2))
    objective = -grpo_loss(new_MT.flatten(), terms, num_candidates=1, clip_low=eps, clip_high=eps)[0]

    rho_MT = (new_MT - old_MT).exp()
    plus_M, minus_M = rho_MT.clamp(max=1 + eps).mean(-1), rho_MT.clamp(min=1 - eps).mean(-1)
    hits = (q_M * plus_M)[hit_M].sum() / p
    misses = (q_M * minus_M)[~hit_M].sum() / (1 - p)
    assert q_M.sum().item() == pytest.approx(1)
    torch.testing.assert_close(objective, (p * (1 - p)).sqrt() * (hits - misses), **EXACT)
    assert (rho_MT > 1 + eps).any()
    assert (rho_MT < 1 - eps).any()


def test_lemma_3_1_advantage_is_the_population_group_advantage() -> None:
    rewards_BG = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0]], dtype=torch.float64)
    p = 2 / 8
    expected_BG = (rewards_BG - p) / math.sqrt(p * (1 - p))
    torch.testing.assert_close(group_advantages(rewards_BG, eps=0.0), expected_BG, **EXACT)


def test_kl_estimators_in_expectation() -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    near = logits + 0.01 * torch.randn(9, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for reference, is_near in ((near, True), (logits.flip(0), False)):
        logp_V, ref_V = logits.log_softmax(-1), reference.log_softmax(-1)
        exact = (logp_V.exp() * (logp_V - ref_V)).sum()
        means = {kind: (logp_V.exp() * kl_estimate(logp_V, ref_V, kind)).sum() for kind in ("k1", "k2", "k3")}
        torch.testing.assert_close(means["k1"], exact, **EXACT)
        torch.testing.assert_close(means["k3"], exact, **EXACT)
        assert (abs(means["k2"] / exact - 1) < 0.02) == is_near  # k2 is good to second order only
        assert (kl_estimate(logp_V, ref_V, "k3") >= 0).all()
        assert (kl_estimate(logp_V, ref_V, "k1") < 0).any()
    assert kl_estimate(logp_V, logp_V, "k3").abs().max() == 0


def test_kl_estimators_mean_gradients() -> None:
    """On-policy mean gradients as the docstring of kl_estimate states them."""
    logits = torch.randn(9, generator=torch.Generator().manual_seed(7), dtype=torch.float64).requires_grad_()
    logp_V = logits.log_softmax(-1)
    ref_V = logits.detach().flip(0).log_softmax(-1)

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    drawn_V = logp_V.detach().exp()
    mean = {kind: gradient((drawn_V * kl_estimate(logp_V, ref_V, kind)).sum()) for kind in ("k1", "k2", "k3")}
    reverse = gradient((logp_V.exp() * (logp_V - ref_V)).sum())
    forward = gradient((ref_V.exp() * (ref_V - logp_V)).sum())
    torch.testing.assert_close(mean["k1"], torch.zeros_like(reverse), **EXACT)
    torch.testing.assert_close(mean["k2"], reverse, **EXACT)
    torch.testing.assert_close(mean["k3"], forward, **EXACT)
    assert (reverse - forward).abs().max() > 1e-2


def test_surrogate_is_pessimistic() -> None:
    ratio_N = torch.linspace(0.1, 3, 200)
    for A in (-2.0, 0.5):
        advantage_N = torch.full_like(ratio_N, A)
        assert (clipped_surrogate(ratio_N, advantage_N, **CLIP) <= ratio_N * advantage_N + 1e-6).all()


def test_all_constants_move_to_the_devices_of_the_log_probs():
    _, terms = random_problem()
    moved = dataclasses.asdict(dataclasses.replace(terms, importance_N=terms.old_logp_N).to("meta"))
    assert all(value.device.type == "meta" for value in moved.values())
    assert terms.to("cpu").importance_N is None
