"""TAWin's operator and weights against bisection, Python loops and every limit that the paper states."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tawin_nemo.maths.tawin import soft_topk, tawin_weights, weight_profile

EXACT = {"rtol": 0.0, "atol": 1e-9}


def bisected_topk(logits: list[float], k: float, tau: float) -> list[float]:
    """Eq. 16-18 by bisection on lam."""
    finite = [x for x in logits if x > -math.inf]
    if len(finite) <= k:
        return [1.0 if x > -math.inf else 0.0 for x in logits]

    def weights(lam: float) -> list[float]:
        return [math.exp(min(0.0, (x - lam) / tau)) for x in logits]

    low, high = min(finite) - tau, max(finite) + tau * (math.log(len(finite) / k) + 1)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(weights(middle)) > k else (low, middle)
    return weights((low + high) / 2)


def looped_weights(
    scores: list[float], target: list[bool], valid: list[bool], k: float, tau: float, middle: float
) -> list[float]:
    """Eq. 19-21 for one group, as the specification reads; ``middle`` is the window's centre in ranks."""
    negatives = [g for g in range(len(scores)) if valid[g] and not target[g]]
    by_score = sorted(negatives, key=lambda g: -scores[g])  # Python's sort is stable
    n = len(negatives)
    window = bisected_topk([-abs(rank / n - middle / n) for rank in range(n)], k, tau)
    omega = [1.0 if valid[g] and target[g] else 0.0 for g in range(len(scores))]
    for rank, g in enumerate(by_score):
        omega[g] = n * window[rank] / sum(window)
    return omega


@settings(max_examples=150)
@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=12),
    st.floats(0.05, 13),
    st.sampled_from([0.01, 0.1, 1.0, 10.0]),
    st.data(),
)
def test_soft_topk_equals_bisection(logits: list[float], k: float, tau: float, data: st.DataObject) -> None:
    masked = data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)))
    logits = [-math.inf if hide else x for x, hide in zip(logits, masked, strict=True)]
    weights = soft_topk(torch.tensor(logits, dtype=torch.float64), k, tau)
    torch.testing.assert_close(weights, torch.tensor(bisected_topk(logits, k, tau), dtype=torch.float64), **EXACT)
    unmasked = sum(x > -math.inf for x in logits)
    assert weights.sum().item() == pytest.approx(min(k, unmasked), abs=1e-9)


def test_soft_topk_works_over_leading_axes() -> None:
    logits = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[0, :, 5:] = -math.inf  # n = 5 > k
    logits[1, :, 2:] = -math.inf  # n = 2 <= k
    weights = soft_topk(logits, 3.5, 0.3)
    for a in range(3):
        for b in range(4):
            torch.testing.assert_close(weights[a, b], soft_topk(logits[a, b], 3.5, 0.3), **EXACT)
    assert torch.equal(weights[1, :, :2], torch.ones(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 2.5, 4])
@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_soft_topk_gradient(k: float, tau: float) -> None:
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: soft_topk(x, k, tau), (logits,))


def test_soft_topk_gradient_is_finite_beside_masked_and_saturated_entries() -> None:
    logits = torch.tensor([[3.0, 1.0, -math.inf, 0.5], [1.0, -math.inf, -math.inf, 2.0]], requires_grad=True)
    (soft_topk(logits, 2, 0.5) * torch.arange(4.0)).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert torch.equal(logits.grad[1], torch.zeros(4))  # n <= k: the weights are constants
    assert logits.grad[0, 3] != 0


def test_soft_topk_is_monotone_in_its_logits() -> None:
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = soft_topk(logits, 3, 0.4)
    by_logit = before.gather(-1, logits.argsort(dim=-1))
    assert (by_logit.diff(dim=-1) >= -1e-12).all()  # a larger logit has no smaller weight
    raised = logits.clone()
    raised[:, 4] += 0.5
    after = soft_topk(raised, 3, 0.4)
    others = torch.arange(10) != 4
    assert (after[:, 4] >= before[:, 4] - 1e-12).all()
    assert (after[:, others] <= before[:, others] + 1e-12).all()
    assert (after[:, 4] > before[:, 4] + 1e-3).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_topk_limits_of_tau(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.3, 0.9, -0.4, 0.3, 0.3, -2.0], dtype=dtype)
    # 1 is first, the three at 0.3 share the remaining 3 - 1 = 2
    hard = torch.tensor([2 / 3, 1, 0, 2 / 3, 2 / 3, 0], dtype=dtype)
    torch.testing.assert_close(soft_topk(logits, 3, 1e-6), hard, rtol=0, atol=1e-6)
    torch.testing.assert_close(soft_topk(logits, 3, 1e6), torch.full_like(logits, 3 / 6), rtol=0, atol=1e-5)
    assert soft_topk(logits, 3, 0.1).dtype == dtype


@pytest.mark.parametrize(("k", "tau"), [(0, 1), (-1, 1), (math.inf, 1), (math.nan, 1), (1, 0), (1, -0.1)])
def test_soft_topk_refuses_what_has_no_solution(k: float, tau: float) -> None:
    with pytest.raises(ValueError, match="must be a positive finite number"):
        soft_topk(torch.zeros(3), k, tau)


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.integers(1, 9), st.floats(0.3, 10), st.floats(0, 9), st.sampled_from([0.01, 0.2, 3.0]))
def test_weights_equal_loops(seed: int, G: int, k: float, anchor: float, tau: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_BG = torch.randint(0, 6, (4, G), generator=generator).double()  # many ties
    is_target_BG = torch.rand(4, G, generator=generator) < 0.3  # none, one or several per group
    valid_BG = torch.rand(4, G, generator=generator) < 0.8
    for window, middle in (("centred", anchor), ("start", anchor + (k - 1) / 2)):
        weights_BG = tawin_weights(
            scores_BG, is_target_BG, k=k, tau=tau, anchor=anchor, window=window, valid_BG=valid_BG
        )
        for b in range(4):
            expected = looped_weights(
                scores_BG[b].tolist(), is_target_BG[b].tolist(), valid_BG[b].tolist(), k, tau, middle
            )
            torch.testing.assert_close(weights_BG[b], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def group(n: int) -> tuple[Tensor, Tensor]:
    """One target at rank 3 and ``n`` negatives, best score first."""
    return torch.linspace(1, 0, n + 1).unsqueeze(0), (torch.arange(n + 1) == 3).unsqueeze(0)


@pytest.mark.parametrize("n", [6, 15])
def test_small_tau_selects_the_ranks_nearest_the_anchor(n: int) -> None:
    scores_BG, is_target_BG = group(n)
    weights_BG = tawin_weights(scores_BG, is_target_BG, k=4, tau=1e-6, anchor=2)
    # distances 2 1 0 1 2: ranks 1, 2, 3 are in, 0 and 4 share the fourth place
    window = torch.tensor([0.5, 1, 1, 1, 0.5, *[0.0] * (n - 5)]) * n / 4
    torch.testing.assert_close(weights_BG[~is_target_BG], window, rtol=0, atol=1e-5)
    assert weights_BG[is_target_BG].item() == 1


def test_start_window_begins_at_the_anchor() -> None:
    weights = weight_profile(10, k=4, tau=1e-6, anchor=2, window="start")
    window = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64) * 10 / 4
    torch.testing.assert_close(weights, window, rtol=0, atol=1e-5)


def test_mass_k_leaves_the_weights_of_the_soft_top_k() -> None:
    """Eq. 20 as it stands: they sum to k, none exceeds 1, and mean1 is the same profile times n / k."""
    scores_BG, is_target_BG = group(15)
    raw_BG = tawin_weights(scores_BG, is_target_BG, k=4, tau=0.1, anchor=2, mass="k")
    rank = torch.arange(15, dtype=torch.float64)
    expected = soft_topk(-(rank - 2).abs() / 15, 4, 0.1)
    torch.testing.assert_close(raw_BG[~is_target_BG].double(), expected, rtol=0, atol=1e-6)
    assert raw_BG[~is_target_BG].sum().item() == pytest.approx(4, abs=1e-5)
    assert raw_BG[is_target_BG].item() == 1
    mean1_BG = tawin_weights(scores_BG, is_target_BG, k=4, tau=0.1, anchor=2)
    torch.testing.assert_close(mean1_BG[~is_target_BG], raw_BG[~is_target_BG] * 15 / 4, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="mass = 'all', but it must be one of mean1, k"):
        tawin_weights(scores_BG, is_target_BG, k=4, tau=0.1, anchor=2, mass="all")


@pytest.mark.parametrize(("k", "tau"), [(15, 0.01), (99, 0.01), (4, 1e9)])
def test_wide_windows_are_plain_grpo(k: float, tau: float) -> None:
    scores_BG, is_target_BG = group(15)
    weights_BG = tawin_weights(scores_BG, is_target_BG, k=k, tau=tau, anchor=2)
    torch.testing.assert_close(weights_BG, torch.ones(1, 16), rtol=0, atol=1e-6)


def test_only_the_order_of_the_scores_matters_and_no_gradient_reaches_them() -> None:
    scores_BG, is_target_BG = group(15)
    scores_BG.requires_grad_()
    weights_BG = tawin_weights(scores_BG, is_target_BG, k=4, tau=0.1, anchor=2)
    assert not weights_BG.requires_grad
    assert torch.equal(weights_BG, tawin_weights(torch.exp(9 * scores_BG) - 50, is_target_BG, k=4, tau=0.1, anchor=2))
    shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    shuffled_BG = tawin_weights(scores_BG[:, shuffle], is_target_BG[:, shuffle], k=4, tau=0.1, anchor=2)
    torch.testing.assert_close(shuffled_BG, weights_BG[:, shuffle])


def test_padding_changes_nothing_and_weighs_nothing() -> None:
    scores_BG, is_target_BG = group(7)
    padded_BG = torch.cat([scores_BG, torch.full((1, 3), -math.inf)], dim=1)
    target_BG = torch.cat([is_target_BG, torch.zeros(1, 3, dtype=torch.bool)], dim=1)
    weights_BG = tawin_weights(padded_BG, target_BG, k=3, tau=0.1, anchor=1, valid_BG=padded_BG > -math.inf)
    alone_BG = tawin_weights(scores_BG, is_target_BG, k=3, tau=0.1, anchor=1)
    torch.testing.assert_close(weights_BG, torch.cat([alone_BG, torch.zeros(1, 3)], dim=1))
    # a negative whose score underflowed is still ranked before padding
    padded_BG[0, 7] = -math.inf
    weights_BG = tawin_weights(padded_BG, target_BG, k=3, tau=0.1, anchor=1, valid_BG=torch.arange(11)[None] < 8)
    torch.testing.assert_close(weights_BG[:, :8], alone_BG)


def test_groups_without_negatives_and_unknown_windows() -> None:
    scores_BG = torch.tensor([[2.0, 1.0]])
    assert tawin_weights(scores_BG, torch.tensor([[True, True]]), k=4, tau=0.1, anchor=2).tolist() == [[1.0, 1.0]]
    with pytest.raises(ValueError, match="window = 'middle', but it must be one of centred, start"):
        tawin_weights(scores_BG, torch.tensor([[True, False]]), k=4, tau=0.1, anchor=2, window="middle")


@pytest.mark.parametrize("k", [1, 2, 2.5, 2.9999999999999996, 3])
@pytest.mark.parametrize("tau", [1e-6, 1e-3, 1.0])
def test_mass_is_k_however_small_tau_and_however_equal_the_logits(k: float, tau: float) -> None:
    generator = torch.Generator().manual_seed(8)
    logits = torch.randint(0, 4, (500, 9), generator=generator).double() / 3 + 1e-9 * torch.rand(
        500, 9, generator=generator
    )
    weights = soft_topk(logits, k, tau)
    torch.testing.assert_close(weights.sum(-1), torch.full((500,), float(k), dtype=torch.float64), rtol=0, atol=1e-8)
    assert ((weights >= 0) & (weights <= 1)).all()
