"""Theorem 3.4 and Lemma 3.5 of TAWin (arXiv 2604.22504): what WPAUC says about Recall@K, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tawin_nemo.maths.auc import auc, recall_bounds, recall_window, wpauc
from tawin_nemo.maths.ranking import recall_at_k


def ranked_scores(is_positive: list[bool]) -> tuple[Tensor, Tensor]:
    """Scores of the positives and of the negatives of a ranked list, best first, without ties."""
    score = -torch.arange(len(is_positive), dtype=torch.float64)
    mask = torch.tensor(is_positive)
    return score[mask], score[~mask]


def assert_recall_is_within_bounds(is_positive: list[bool], k: int) -> tuple[float, float, float]:
    pos, neg = ranked_scores(is_positive)
    low, high = recall_bounds(wpauc(pos, neg, *recall_window(k, len(pos), len(neg))), len(pos))
    recall = sum(is_positive[:k]) / len(pos)
    assert low <= recall <= high
    return low.item(), recall, high.item()


@settings(max_examples=300)
@given(st.integers(1, 12), st.integers(0, 30), st.data())
def test_theorem_3_4(num_positives: int, surplus: int, data: st.DataObject) -> None:
    """Random rankings, and rankings that nearly sort the positives to one end."""
    num_negatives = num_positives + surplus
    k = data.draw(st.integers(num_positives, num_negatives))
    labels = [True] * num_positives + [False] * num_negatives
    ordered = data.draw(st.permutations(labels))
    assert_recall_is_within_bounds(ordered, k)
    swaps = data.draw(st.lists(st.integers(0, len(labels) - 2), max_size=12))
    for start in (labels, labels[::-1], [False] * (k - num_positives) + labels[: len(labels) - k + num_positives]):
        near = list(start)
        for i in swaps:
            near[i], near[i + 1] = near[i + 1], near[i]
        assert_recall_is_within_bounds(near, k)


@pytest.mark.parametrize(("num_positives", "num_negatives"), [(1, 4), (2, 5), (3, 6), (4, 6)])
def test_theorem_3_4_for_every_ranking_and_its_bounds_are_reached(num_positives: int, num_negatives: int) -> None:
    n = num_positives + num_negatives
    for k in range(num_positives, num_negatives + 1):
        low_reached = high_reached = open_cases = 0
        for places in itertools.combinations(range(n), num_positives):
            low, recall, high = assert_recall_is_within_bounds([i in places for i in range(n)], k)
            if low < high:
                open_cases += 1
                low_reached += recall == low
                high_reached += recall == high
        assert (open_cases > 0) == (num_positives > 2)  # up to two positives the window decides
        assert not open_cases or (low_reached > 0 and high_reached > 0)


@settings(max_examples=200)
@given(st.integers(1, 60), st.data())
def test_lemma_3_5(num_negatives: int, data: st.DataObject) -> None:
    """One positive: WPAUC((K - 1) / n-, 1 / n-) is Recall@K, for every K."""
    rank = data.draw(st.integers(0, num_negatives))
    pos, neg = ranked_scores([i == rank for i in range(num_negatives + 1)])
    for k in range(1, num_negatives + 1):
        recall = recall_at_k(torch.tensor([rank]), k).item()
        assert wpauc(pos, neg, (k - 1) / num_negatives, 1 / num_negatives).item() == recall
        low, high = recall_bounds(recall, 1)
        assert low == high == recall


def test_auc_is_blind_where_the_window_sees() -> None:
    """Two rankings of equal AUC and different Recall@K: the reason for windows."""
    spread = [True, False, False, False, False, True, False, False]
    packed = [False, False, True, True, False, False, False, False]
    a, b = ranked_scores(spread), ranked_scores(packed)
    assert auc(*a) == auc(*b) == 8 / 12
    window = recall_window(4, 2, 6)
    assert wpauc(*a, *window) < wpauc(*b, *window)
    assert sum(spread[:4]) < sum(packed[:4])
