"""DAPO and GSPO against loops and against GRPO: values, gradients, splits, importance weights, what omega touches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tawin_nemo.maths.dapo import dapo_loss
from tawin_nemo.maths.grpo import grpo_loss
from tawin_nemo.maths.gspo import gspo_loss
from tawin_nemo.maths.policy_loss import Counts, Objective, PolicyTerms, mean_stats

Loss = Callable[[Tensor, PolicyTerms, Counts, Objective], tuple[Tensor, dict[str, Tensor]]]

LOSSES: dict[str, Loss] = {"grpo": grpo_loss, "dapo": dapo_loss, "gspo": gspo_loss}
OBJECTIVE = Objective(clip_low=0.02, clip_high=0.03, beta=0.05)
EXACT = {"rtol": 0.0, "atol": 1e-12}


def problem(seed: int, M: int = 12) -> tuple[Tensor, PolicyTerms, Counts]:
    """M candidates of 0 to 5 scored tokens out of up to 9, with importance weights."""
    generator = torch.Generator().manual_seed(seed)
    scored_M = torch.randint(0, 6, (M,), generator=generator)
    candidate_N = torch.repeat_interleave(torch.arange(M), scored_M)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    N = len(candidate_N)
    logp_N = -normal(N).abs()
    terms = PolicyTerms(
        candidate_N=candidate_N,
        old_logp_N=logp_N + 0.3 * normal(N),
        ref_logp_N=logp_N + 0.3 * normal(N),
        advantage_M=normal(M),
        omega_M=normal(M).abs(),
        length_M=(scored_M + torch.randint(0, 4, (M,), generator=generator)).clamp(min=1),
        importance_N=normal(N).exp().clamp(max=2.0),
    )
    return logp_N, terms, Counts(candidates=M + 3, tokens=float(terms.length_M.sum()) + 7)


def looped(name: str, logp: list[float], terms: PolicyTerms, counts: Counts) -> float:
    """Candidate by candidate, token by token; KL by k3."""
    assert terms.ref_logp_N is not None
    assert terms.importance_N is not None
    low, high, beta = 1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high, OBJECTIVE.beta
    total = 0.0
    for m in range(len(terms.advantage_M)):
        A, omega, length = terms.advantage_M[m].item(), terms.omega_M[m].item(), terms.length_M[m].item()
        tokens = (terms.candidate_N == m).nonzero().flatten().tolist()
        log_rho = [logp[t] - terms.old_logp_N[t].item() for t in tokens]
        weight = [terms.importance_N[t].item() for t in tokens]
        kl = sum(math.exp(d) - 1 - d for d in (terms.ref_logp_N[t].item() - logp[t] for t in tokens))
        if name == "gspo":
            if not tokens:
                continue
            s = math.exp(sum(log_rho) / length)
            w = math.exp(sum(math.log(x) for x in weight) / length)
            total += (w * omega * min(s * A, min(max(s, low), high) * A) - beta * kl / length) / counts.candidates
            continue
        surrogate = sum(
            w * omega * min(math.exp(x) * A, min(max(math.exp(x), low), high) * A)
            for x, w in zip(log_rho, weight, strict=True)
        )
        scale = length * counts.candidates if name == "grpo" else counts.tokens
        total += (surrogate - beta * kl) / scale
    return -total


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_loops(name: str, seed: int) -> None:
    logp_N, terms, counts = problem(seed)
    loss, stats = LOSSES[name](logp_N, terms, counts, OBJECTIVE)
    assert loss.item() == pytest.approx(looped(name, logp_N.tolist(), terms, counts), abs=1e-12)
    assert stats["loss"].item() == pytest.approx(stats["policy_loss"].item() + OBJECTIVE.beta * stats["kl"].item())
    assert 0 < stats["clipped_sum"] < len(logp_N)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient(name: str) -> None:
    logp_N, terms, counts = problem(1)
    logp_N.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, terms, counts, OBJECTIVE)[0], (logp_N,))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [[4], [3, 3, 9]])
def test_any_split_into_micro_batches_gives_the_same_loss_gradient_and_statistics(name: str, cuts: list[int]) -> None:
    logp_N, terms, counts = problem(3)
    whole_N, split_N = logp_N.clone().requires_grad_(), logp_N.clone().requires_grad_()
    loss, stats = LOSSES[name](whole_N, terms, counts, OBJECTIVE)
    loss.backward()
    summed = dict.fromkeys(stats, torch.zeros((), dtype=torch.float64))
    for start, stop in zip([0, *cuts], [*cuts, 12], strict=True):
        mine_N = (terms.candidate_N >= start) & (terms.candidate_N < stop)
        part = PolicyTerms(
            terms.candidate_N[mine_N] - start,
            *(None if x is None else x[mine_N] for x in (terms.old_logp_N, terms.ref_logp_N)),  # type: ignore[arg-type]
            *(x[start:stop] for x in (terms.advantage_M, terms.omega_M, terms.length_M)),  # type: ignore[arg-type]
            None if terms.importance_N is None else terms.importance_N[mine_N],
        )
        part_loss, part_stats = LOSSES[name](split_N[mine_N], part, counts, OBJECTIVE)
        part_loss.backward()
        summed = {key: summed[key] + value for key, value in part_stats.items()}
    torch.testing.assert_close(split_N.grad, whole_N.grad, **EXACT)
    for key, value in stats.items():
        torch.testing.assert_close(summed[key], value, **EXACT)


def test_before_the_first_update_gspo_has_grpos_gradient_and_dapo_has_it_where_lengths_are_equal() -> None:
    logp_N, terms, counts = problem(4)
    logp_N.requires_grad_()
    terms = dataclasses.replace(terms, old_logp_N=logp_N.detach(), importance_N=None)

    def gradient(name: str, terms: PolicyTerms, counts: Counts) -> Tensor:
        return torch.autograd.grad(LOSSES[name](logp_N, terms, counts, Objective(0.1, 0.2))[0], logp_N)[0]

    torch.testing.assert_close(gradient("gspo", terms, counts), gradient("grpo", terms, counts), **EXACT)
    assert not torch.allclose(gradient("dapo", terms, counts), gradient("grpo", terms, counts))
    equal = dataclasses.replace(terms, length_M=torch.full((12,), 5))
    torch.testing.assert_close(
        gradient("dapo", equal, Counts(12, 60)), gradient("grpo", equal, Counts(12, 60)), **EXACT
    )


def test_gspo_clips_whole_candidates() -> None:
    """One candidate far above the limit: all its tokens lose their gradient, whatever their own ratios are."""
    logp_N = torch.tensor([0.5, -0.1, 0.01, 0.02], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(2, dtype=torch.float64)
    terms = PolicyTerms(torch.tensor([0, 0, 1, 1]), torch.zeros(4), None, ones, ones, torch.tensor([2, 2]))
    loss, stats = gspo_loss(logp_N, terms, Counts(2, 4), Objective(0.1, 0.1))
    loss.backward()
    assert logp_N.grad is not None
    assert logp_N.grad[:2].tolist() == [0.0, 0.0]
    assert (logp_N.grad[2:] < 0).all()
    assert loss.item() == pytest.approx(-(1.1 + math.exp(0.015)) / 2)
    assert mean_stats({key: value.item() for key, value in stats.items()})["clip_fraction"] == 0.5


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_shift_the_mismatch_is_zero(name: str) -> None:
    logp_N, terms, counts = problem(5)
    same = dataclasses.replace(terms, old_logp_N=logp_N.clone())
    for subject, is_zero in ((same, True), (terms, False)):
        stats = mean_stats({k: v.item() for k, v in LOSSES[name](logp_N, subject, counts, OBJECTIVE)[1].items()})
        assert (stats["shift_kl"] == 0) == (stats["prob_error"] == 0) == is_zero
    exact = (logp_N.exp() - terms.old_logp_N.exp()).abs().mean().item()
    assert stats["prob_error"] == pytest.approx(exact)


@pytest.mark.parametrize("name", LOSSES)
def test_kl_needs_a_reference(name: str) -> None:
    logp_N, terms, counts = problem(0)
    with pytest.raises(ValueError, match="set beta to 0"):
        LOSSES[name](logp_N, dataclasses.replace(terms, ref_logp_N=None), counts, OBJECTIVE)
