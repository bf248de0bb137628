"""Semantic and collaborative rewards: values by hand and by plain loops, bounds, padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.maths.rewards import collaborative_reward, semantic_reward
from tawin_nemo.types import NO_ITEM


def groups(seed: int, items: int = 12, rows: int = 7, size: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random items_BG (with padding at the end of some rows), target_B, is_target_BG; some groups lack the target."""
    rng = np.random.default_rng(seed)
    items_BG = rng.integers(0, items, (rows, size))
    target_B = rng.integers(0, items, rows)
    items_BG[::2, 1] = target_B[::2]
    for row, count in enumerate(rng.integers(0, size + 1, rows)):
        items_BG[row, count:] = NO_ITEM
    items, target = torch.from_numpy(items_BG), torch.from_numpy(target_B)
    return items, target, items == target[:, None]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.5])
def test_semantic_reward_equals_a_loop(weight: float) -> None:
    vectors_ID = np.random.default_rng(3).normal(size=(12, 6))
    for seed in range(5):
        items_BG, target_B, _ = groups(seed)
        found = semantic_reward(items_BG, target_B, torch.from_numpy(vectors_ID), weight=weight)
        for row, target in enumerate(target_B.tolist()):
            for place, item in enumerate(items_BG[row].tolist()):
                expected = 0.0
                if item == target:
                    expected = 1 + weight
                elif item != NO_ITEM:
                    expected = weight * cosine(vectors_ID[item], vectors_ID[target])
                assert float(found[row, place]) == pytest.approx(expected, abs=1e-12)


def test_only_directions_count_and_zero_resembles_nothing() -> None:
    vectors_ID = torch.tensor([[1.0, 0.0], [-4.0, 0.0], [5.0, 5.0], [0.0, 0.0]])
    items_BG, target_B = torch.tensor([[0, 1, 2, 3]]), torch.tensor([0])
    found = semantic_reward(items_BG, target_B, vectors_ID, weight=0.5)
    assert found[0].tolist() == pytest.approx([1.5, -0.5, 0.5 * math.sqrt(0.5), 0.0])
    scaled = semantic_reward(items_BG, target_B, 100 * vectors_ID, weight=0.5)
    torch.testing.assert_close(found, scaled)
    nothing = semantic_reward(items_BG, torch.tensor([3]), vectors_ID)
    assert nothing[0].tolist() == [0, 0, 0, 2]  # also when the target's vector is zero


def test_an_item_written_like_the_target_counts_as_the_target() -> None:
    vectors_ID = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    hits_BG = torch.tensor([[False, True]])
    found = semantic_reward(torch.tensor([[0, 2]]), torch.tensor([0]), vectors_ID, is_target_BG=hits_BG)
    assert found.tolist() == [[1.0, 2.0]]  # item 0 has cosine 1 but is not called a hit
    with pytest.raises(IndexError):
        semantic_reward(torch.tensor([[3]]), torch.tensor([0]), vectors_ID)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.5])
def test_collaborative_reward_equals_a_loop(weight: float) -> None:
    for seed in range(5):
        items_BG, _, is_target_BG = groups(seed)
        scores_BI = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (len(items_BG), 12)))
        found = collaborative_reward(scores_BI, items_BG, is_target_BG, weight=weight)
        for row in range(len(items_BG)):
            valid = [item for item in items_BG[row].tolist() if item != NO_ITEM]
            total = sum(math.exp(float(scores_BI[row, item])) for item in valid)
            for place, item in enumerate(items_BG[row].tolist()):
                expected = 0.0
                if item != NO_ITEM:
                    share = math.exp(float(scores_BI[row, item])) / total
                    expected = float(is_target_BG[row, place]) + weight * share
                assert float(found[row, place]) == pytest.approx(expected, abs=1e-12)


def test_scores_of_items_outside_the_group_and_a_common_shift_change_nothing() -> None:
    items_BG, is_target_BG = torch.tensor([[4, 0, 2]]), torch.tensor([[False, False, True]])
    scores_BI = torch.tensor([[1.0, 9.0, -2.0, 7.0, 0.5]])
    found = collaborative_reward(scores_BI, items_BG, is_target_BG)
    other = scores_BI.clone()
    other[0, [1, 3]] = torch.tensor([-50.0, 80.0])
    torch.testing.assert_close(collaborative_reward(other + 30, items_BG, is_target_BG), found)
    swapped = scores_BI[:, [4, 1, 2, 3, 0]]
    assert not torch.allclose(collaborative_reward(swapped, items_BG, is_target_BG), found)


@given(st.integers(0, 10_000), st.floats(0.1, 30.0), st.sampled_from([0.5, 0.99, 1.0]))
def test_up_to_weight_one_no_wrong_candidate_beats_the_target(seed: int, spread: float, weight: float) -> None:
    items_BG, target_B, is_target_BG = groups(seed)
    rng = np.random.default_rng(seed)
    scores_BI = torch.from_numpy(rng.normal(0, spread, (len(items_BG), 12)))
    vectors_ID = torch.from_numpy(rng.normal(size=(12, 3)))
    for rewards_BG in (
        collaborative_reward(scores_BI, items_BG, is_target_BG, weight=weight),
        semantic_reward(items_BG, target_B, vectors_ID, weight=weight),
    ):
        assert rewards_BG.isfinite().all()
        for row in range(len(items_BG)):
            wrong = rewards_BG[row][(items_BG[row] != NO_ITEM) & ~is_target_BG[row]]
            if is_target_BG[row].any() and len(wrong):
                assert wrong.max() <= rewards_BG[row][is_target_BG[row]].min()
                if weight < 1:
                    assert wrong.max() < rewards_BG[row][is_target_BG[row]].min()


def test_above_weight_one_the_recommender_may_overrule_the_target() -> None:
    scores_BI = torch.tensor([[0.0, 20.0]])
    rewards_BG = collaborative_reward(scores_BI, torch.tensor([[0, 1]]), torch.tensor([[True, False]]), weight=2.0)
    assert rewards_BG[0, 1] > rewards_BG[0, 0]


def test_groups_of_padding_get_nothing() -> None:
    items_BG = torch.full((2, 3), NO_ITEM)
    no_BG = torch.ones((2, 3), dtype=torch.bool)  # whatever is said of padding
    assert not collaborative_reward(torch.randn(2, 4), items_BG, no_BG).any()
    assert not semantic_reward(items_BG, torch.tensor([0, 1]), torch.randn(4, 2), is_target_BG=no_BG).any()


def test_items_that_the_recommender_does_not_list_get_nothing_more() -> None:
    items_BG = torch.tensor([[0, 1, 2], [0, 1, NO_ITEM]])
    scores_BI = torch.tensor([[-torch.inf, 0.0, 0.0], [-torch.inf, -torch.inf, 5.0]])
    hits_BG = torch.tensor([[True, False, False], [True, False, False]])
    assert collaborative_reward(scores_BI, items_BG, hits_BG).tolist() == [[1, 0.5, 0.5], [1, 0, 0]]


def test_a_score_that_is_not_a_number_is_not_hidden() -> None:
    found = collaborative_reward(
        torch.tensor([[torch.nan, 0.0]]), torch.tensor([[0, 1]]), torch.tensor([[True, False]])
    )
    assert found.isnan().any()


def test_the_weight_cancels_in_groups_without_target_only() -> None:
    """What the module's head warns of."""
    items_BG, target_B = torch.tensor([[1, 2, 3, 4], [0, 1, 2, 3]]), torch.tensor([0, 0])
    vectors_ID = torch.from_numpy(np.random.default_rng(2).normal(size=(5, 3)))
    weak, strong = (
        group_advantages(semantic_reward(items_BG, target_B, vectors_ID, weight=weight), eps=0.0)
        for weight in (0.1, 1.0)
    )
    torch.testing.assert_close(weak[0], strong[0])
    assert weak[1, 1:].std() < 0.5 * strong[1, 1:].std()  # beside a hit it does count
