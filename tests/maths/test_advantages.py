"""Group advantages against the standard library's statistics."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.maths.advantages import frac_zero_std_groups, group_advantages, zero_std_groups

EPS = 1e-4


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.sampled_from(["population", "sample"]))
def test_advantages_equal_the_textbook(seed: int, std: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards_BG = torch.randint(-1, 3, (6, 5), generator=generator).double() / 3
    valid_BG = torch.rand(6, 5, generator=generator) < 0.8
    advantages_BG = group_advantages(rewards_BG, EPS, std=std, valid_BG=valid_BG)
    for b in range(6):
        rewards = rewards_BG[b][valid_BG[b]].tolist()
        if len(set(rewards)) < 2:
            assert advantages_BG[b].tolist() == [0.0] * 5
            continue
        spread = statistics.pstdev(rewards) if std == "population" else statistics.stdev(rewards)
        expected = [(r - statistics.fmean(rewards)) / (spread + EPS) for r in rewards]
        assert advantages_BG[b][valid_BG[b]].tolist() == pytest.approx(expected, abs=1e-9)
        assert advantages_BG[b][~valid_BG[b]].tolist() == [0.0] * int((~valid_BG[b]).sum())


@pytest.mark.parametrize("std", ["population", "sample"])
def test_equal_rewards_give_exactly_zero_though_their_mean_is_rounded(std: str) -> None:
    rewards_BG = torch.full((1, 7), 0.1)
    assert (rewards_BG - rewards_BG.sum() / 7).abs().max() > 0  # the reason for the rule
    assert group_advantages(rewards_BG, 0.0, std=std).tolist() == [[0.0] * 7]


def test_zero_std_groups_are_counted() -> None:
    rewards_BG = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 9.0], [5.0, 5.0, 5.0]])
    valid_BG = torch.tensor([[True] * 3, [True] * 3, [True, True, False], [False] * 3])
    assert zero_std_groups(rewards_BG, valid_BG).tolist() == [True, False, True, True]
    assert frac_zero_std_groups(rewards_BG, valid_BG).item() == 3 / 4
    assert frac_zero_std_groups(rewards_BG).item() == 2 / 4


def test_unknown_std() -> None:
    with pytest.raises(ValueError, match="std = 'robust', but it must be one of population, sample"):
        group_advantages(torch.zeros(1, 2), std="robust")
