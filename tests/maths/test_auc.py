"""AUC, OPAUC and WPAUC against loops over pairs with exact window limits; what windows may not be."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.maths.auc import auc, opauc, recall_bounds, recall_window, window_ranks, wpauc

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=9)  # seven values: ties everywhere


def looped_wpauc(pos: list[float], neg: list[float], alpha: Fraction, d: Fraction) -> Fraction:
    """Eq. 11-12, pair by pair; the limits are exact fractions."""
    ranked = sorted(neg, reverse=True)
    n = len(neg)
    inside = [score for j, score in enumerate(ranked, 1) if math.ceil(alpha * n) < j <= math.ceil((alpha + d) * n)]
    credit = Fraction(0)
    for p in pos:
        for q in inside:
            credit += 1 if p > q else Fraction(1, 2) if p == q else 0
    return credit / (len(pos) * len(inside))


@st.composite
def windows(draw: st.DrawFn, num_negatives: int) -> tuple[Fraction, Fraction]:
    """alpha and d as fractions of any denominator, with at least one rank inside."""
    denominator = draw(st.integers(num_negatives, 60))  # so that d >= 1/denominator can hold a rank
    low = draw(st.integers(0, denominator - 1))
    high = draw(st.integers(low + 1, denominator))
    alpha, d = Fraction(low, denominator), Fraction(high - low, denominator)
    if math.ceil(alpha * num_negatives) == math.ceil((alpha + d) * num_negatives):
        return Fraction(0), Fraction(1)
    return alpha, d


@settings(max_examples=300)
@given(SCORES, SCORES, st.data())
def test_wpauc_equals_loops(pos: list[int], neg: list[int], data: st.DataObject) -> None:
    alpha, d = data.draw(windows(len(neg)))
    found = wpauc(torch.tensor(pos), torch.tensor(neg), float(alpha), float(d))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(float(looped_wpauc(pos, neg, alpha, d)), abs=1e-14)


@settings(max_examples=200)
@given(SCORES, SCORES, st.data())
def test_auc_and_opauc_are_special_windows(pos: list[int], neg: list[int], data: st.DataObject) -> None:
    pos_P, neg_N = torch.tensor(pos), torch.tensor(neg)
    whole = sum((p > q) + (p == q) / 2 for p in pos for q in neg) / (len(pos) * len(neg))
    assert auc(pos_P, neg_N).item() == pytest.approx(whole, abs=1e-14)
    assert auc(pos_P, neg_N) == wpauc(pos_P, neg_N, 0, 1)

    kept = data.draw(st.integers(1, len(neg)))
    best = sorted(neg)[-kept:]
    partial = sum((p > q) + (p == q) / 2 for p in pos for q in best) / (len(pos) * kept)
    beta = kept / len(neg)
    assert opauc(pos_P, neg_N, beta).item() == pytest.approx(partial, abs=1e-14)
    assert opauc(pos_P, neg_N, beta) == wpauc(pos_P, neg_N, 0, beta)


@settings(max_examples=100)
@given(SCORES, SCORES, st.data())
def test_windows_that_share_out_the_negatives_average_to_the_auc(
    pos: list[int], neg: list[int], data: st.DataObject
) -> None:
    n = len(neg)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n)))})
    parts = [wpauc(torch.tensor(pos), torch.tensor(neg), a / n, (b - a) / n) * (b - a) for a, b in pairwise(cuts)]
    assert sum(parts).item() / n == pytest.approx(auc(torch.tensor(pos), torch.tensor(neg)).item(), abs=1e-12)


def test_leading_axes_are_users_and_broadcast() -> None:
    generator = torch.Generator().manual_seed(0)
    pos = torch.randint(0, 9, (3, 4, 5), generator=generator).float()
    neg = torch.randint(0, 9, (3, 4, 20), generator=generator).float()
    whole = wpauc(pos, neg, 0.1, 0.3)
    assert whole.shape == (3, 4)
    assert whole.unique().numel() > 6
    shared = wpauc(pos, neg[1, 2], 0.1, 0.3)
    for a in range(3):
        for b in range(4):
            assert whole[a, b] == wpauc(pos[a, b], neg[a, b], 0.1, 0.3)
            assert shared[a, b] == wpauc(pos[a, b], neg[1, 2], 0.1, 0.3)
    assert wpauc(pos[:0], neg[:0], 0.1, 0.3).shape == (0, 4)


def test_only_the_order_matters_and_the_order_given_does_not() -> None:
    generator = torch.Generator().manual_seed(1)
    pos, neg = torch.randn(7, generator=generator), torch.randn(40, generator=generator)
    first = wpauc(pos, neg, 0.2, 0.3)
    assert 0.1 < first < 0.9
    assert wpauc(torch.exp(pos) - 5, torch.exp(neg) - 5, 0.2, 0.3) == first
    assert wpauc(pos.flip(0), neg[torch.randperm(40, generator=generator)], 0.2, 0.3) == first


def test_extremes() -> None:
    pos, neg = torch.tensor([2.0, 1.0]), torch.tensor([0.0, -1.0, -math.inf])
    assert auc(pos, neg) == 1
    assert auc(neg, pos) == 0
    assert auc(torch.zeros(4), torch.zeros(9)) == 0.5
    assert wpauc(torch.tensor([-math.inf]), neg, 2 / 3, 1 / 3) == 0.5  # neither was scored: a tie
    assert auc(torch.tensor([1.0]).bfloat16(), torch.tensor([3.0, 0.0]).bfloat16()) == 0.5


def test_rounding_never_moves_a_limit_that_is_a_rank() -> None:
    """Every window of one rank (Lemma 3.5), and every limit in hundredths, for all catalogs up to 400 items."""
    naive_wrong = 0
    for n in range(1, 401):
        for k in range(1, n + 1):
            assert window_ranks((k - 1) / n, 1 / n, n) == (k - 1, k)
            naive_wrong += math.ceil((k - 1) / n * n) != k - 1
            naive_wrong += math.ceil(((k - 1) / n + 1 / n) * n) != k
        for percent in range(0, 100, 7):
            start = math.ceil(Fraction(percent, 100) * n)
            assert start == n or window_ranks(percent / 100, 1 - percent / 100, n) == (start, n)
    assert naive_wrong > 100  # the reason for the guard


def test_limits_that_are_no_rank_are_rounded_up() -> None:
    assert window_ranks(0.101, 0.2, 10) == (2, 4)  # ceil(1.01), ceil(3.01)
    assert window_ranks(0.1 + 1e-9, 0.1, 10) == (2, 3)  # a real excess is not taken for rounding
    assert window_ranks(1 - 1e-6, 1e-6, 10**7) == (10**7 - 10, 10**7)


@pytest.mark.parametrize(
    ("alpha", "d", "seen"),
    [
        (-0.1, 0.5, "alpha = -0.1, d = 0.5"),
        (0.2, 0.0, "alpha = 0.2, d = 0.0"),
        (0.2, -0.1, "alpha = 0.2, d = -0.1"),
        (0.6, 0.5, "alpha = 0.6, d = 0.5"),
        (math.nan, 0.5, "alpha = nan, d = 0.5"),
        (0.0, math.nan, "alpha = 0.0, d = nan"),
        (0.11, 0.05, "holds none of the 10 negatives: ranks 2 < j <= 2; use d >= 1 / 10"),
    ],
)
def test_impossible_and_empty_windows_are_refused(alpha: float, d: float, seen: str) -> None:
    with pytest.raises(ValueError, match=seen):
        wpauc(torch.zeros(1), torch.zeros(10), alpha, d)


def test_missing_sides_and_nan_are_refused() -> None:
    some, none = torch.zeros(3), torch.zeros(0)
    for pos, neg, seen in ((none, some, "0 positives and 3 negatives"), (some, none, "3 positives and 0 negatives")):
        with pytest.raises(ValueError, match=seen):
            auc(pos, neg)
    for pos, neg in ((some, torch.tensor([1.0, math.nan])), (torch.tensor([math.nan]), some)):
        with pytest.raises(ValueError, match="NaN"):
            auc(pos, neg)


def test_recall_bounds_by_hand() -> None:
    """P = 3: of 9 pairs won 0, 1, 3, 4, 8 and 9."""
    low, high = recall_bounds(torch.tensor([0, 1, 3, 4, 8, 9]) / 9, 3)
    # won = 3: at least 3 - floor(sqrt(6)) = 1 and at most floor(sqrt(3)) = 1 of 3
    # won = 8: at least 3 - floor(sqrt(1)) = 2 and at most floor(sqrt(8)) = 2 of 3
    assert (3 * low).tolist() == pytest.approx([0, 1, 1, 1, 2, 3])
    assert (3 * high).tolist() == pytest.approx([0, 1, 1, 2, 2, 3])


@pytest.mark.parametrize(("w", "num_positives"), [(0.5, 1), (0.3, 2), (1.25, 2), (-0.25, 2), (math.nan, 2)])
def test_recall_bounds_refuse_what_no_ranking_gives(w: float, num_positives: int) -> None:
    with pytest.raises(ValueError, match=rf"WPAUC = {w:.6g} is no number of pairs over {num_positives}\^2"):
        recall_bounds(w, num_positives)


@pytest.mark.parametrize(("k", "num_positives", "num_negatives"), [(2, 3, 9), (10, 3, 9), (3, 0, 9)])
def test_recall_window_needs_a_cutoff_between_positives_and_negatives(
    k: int, num_positives: int, num_negatives: int
) -> None:
    with pytest.raises(ValueError, match=f"k = {k} with {num_positives} positives and {num_negatives} negatives"):
        recall_window(k, num_positives, num_negatives)
