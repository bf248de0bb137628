"""Rewards against loops, and TAWin's Prop. H.1: the ranking reward is a reweighting of the rule reward."""

from __future__ import annotations

import math

import pytest
import torch

from tawin_nemo.maths.rewards import ranking_reward, rule_reward
from tawin_nemo.types import NO_ITEM


def looped_ranking_reward(scores: list[float], target: list[bool], valid: list[bool]) -> list[float]:
    members = sorted((g for g in range(len(scores)) if valid[g]), key=lambda g: -scores[g])
    norm = sum(1 / math.log2(j + 2) for j in range(len(members)))
    rewards = [0.0] * len(scores)
    if any(target[g] for g in members):
        for rank, g in enumerate(members):
            rewards[g] = 1.0 if target[g] else -1 / math.log2(rank + 2) / norm
    return rewards


def test_rule_reward_compares_items_and_never_rewards_padding() -> None:
    items_BG = torch.tensor([[4, 2, 4], [1, NO_ITEM, NO_ITEM]])
    assert rule_reward(items_BG, torch.tensor([4, NO_ITEM])).tolist() == [[1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_ranking_reward_equals_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_BG = torch.randint(0, 9, (30, 8), generator=generator).double()
    is_target_BG = torch.rand(30, 8, generator=generator) < 0.15
    valid_BG = torch.rand(30, 8, generator=generator) < 0.8
    rewards_BG = ranking_reward(scores_BG, is_target_BG, valid_BG)
    for b in range(30):
        expected = looped_ranking_reward(scores_BG[b].tolist(), is_target_BG[b].tolist(), valid_BG[b].tolist())
        assert rewards_BG[b].tolist() == pytest.approx(expected, abs=1e-12)


def test_ranking_reward_by_hand() -> None:
    norm = 1 + 1 / math.log2(3) + 1 / 2
    scores_BG = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    is_target_BG = torch.tensor([[False, True, False], [False, False, False]])
    rewards_BG = ranking_reward(scores_BG, is_target_BG)
    assert rewards_BG[0].tolist() == pytest.approx([-(1 / 2) / norm, 1, -(1 / math.log2(3)) / norm])
    assert rewards_BG[1].tolist() == [0, 0, 0]  # no target: nothing is penalised


def test_padding_is_not_part_of_the_group() -> None:
    scores_BG = torch.tensor([[3.0, 2.0, 1.0, -math.inf, -math.inf]])
    is_target_BG = torch.tensor([[False, True, False, False, False]])
    padded_BG = ranking_reward(scores_BG, is_target_BG, scores_BG > -math.inf)
    torch.testing.assert_close(padded_BG[:, :3], ranking_reward(scores_BG[:, :3], is_target_BG[:, :3]))
    assert padded_BG[0, 3:].tolist() == [0, 0]
    empty_BG = ranking_reward(scores_BG, is_target_BG, torch.zeros(1, 5, dtype=torch.bool))
    assert empty_BG.tolist() == [[0] * 5]


@pytest.mark.parametrize("target_rank", [0, 3, 15])
def test_prop_h1_ranking_reward_reweights_rule_advantages(target_rank: int) -> None:
    """With the mean as only baseline: w_+ = (G - 1 + P) / (G - 1), w_j = G p_j + 1 - P."""
    G = 16
    scores_BG = torch.linspace(0, -4, G, dtype=torch.float64).unsqueeze(0)
    is_target_BG = (torch.arange(G) == target_rank).unsqueeze(0)
    ranking_BG = ranking_reward(scores_BG, is_target_BG)
    rule_BG = is_target_BG.double()
    penalty_BG = rule_BG - ranking_BG
    assert (penalty_BG[~is_target_BG] > 0).all()
    P = penalty_BG.sum()
    weight_BG = torch.where(is_target_BG, (G - 1 + P) / (G - 1), G * penalty_BG + 1 - P)
    torch.testing.assert_close(
        ranking_BG - ranking_BG.mean(), weight_BG * (rule_BG - rule_BG.mean()), rtol=0, atol=1e-12
    )
