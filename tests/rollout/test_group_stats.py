"""Counts of groups: by hand, against sets, and additive."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tawin_nemo.rollout.groups import GroupStats, all_target_groups, distinct_items
from tawin_nemo.types import NO_ITEM, PromptBatch, Rollout, TokenRows


def rollout_of(groups: list[list[int]], targets: list[int]) -> Rollout:
    items_BG, target_B = torch.tensor(groups), torch.tensor(targets)
    rows = len(groups)
    prompts = PromptBatch(torch.arange(rows), TokenRows.from_lists([[1]] * rows), target_B)
    return Rollout(
        prompts, items_BG, items_BG[..., None], (items_BG != NO_ITEM).long(), torch.zeros(items_BG.shape), None,
        (items_BG == target_B[:, None]) & (items_BG != NO_ITEM), 0,
    )  # fmt: skip


GROUPS = [
    [4, 2, 4, 4],  # two items, the target among them
    [7, 7, 7, 7],  # nothing but the target
    [7, NO_ITEM, NO_ITEM, NO_ITEM],  # the same, short
    [1, 2, 3, NO_ITEM],  # short, without target
    [NO_ITEM] * 4,
]
TARGETS = [2, 7, 7, 9, 9]


def test_by_hand() -> None:
    rollout = rollout_of(GROUPS, TARGETS)
    assert distinct_items(rollout.items_BG).tolist() == [2, 1, 1, 3, 0]
    assert all_target_groups(rollout.is_target_BG, rollout.valid_BG).tolist() == [False, True, True, False, False]
    facts = GroupStats.of(rollout)
    assert facts == GroupStats(groups=5, candidates=12, without_target=2, all_target=2, short=3, distinct=7, inserted=0)
    assert facts.means() == pytest.approx(
        {
            "frac_groups_without_target": 2 / 5,
            "frac_all_target_groups": 2 / 5,
            "frac_short_groups": 3 / 5,
            "frac_inserted_groups": 0,
            "distinct_items_per_group": 7 / 5,
            "frac_duplicate_candidates": 5 / 12,
        }
    )


def test_inserted_groups_count_once() -> None:
    inserted_BG = torch.zeros((5, 4), dtype=torch.bool)
    inserted_BG[1, 3] = inserted_BG[4, 0] = True
    assert GroupStats.of(replace(rollout_of(GROUPS, TARGETS), inserted_BG=inserted_BG)).inserted == 2


def test_random_groups_against_sets() -> None:
    rng = np.random.default_rng(0)
    groups = [[int(x) for x in rng.integers(-1, 5, 6)] for _ in range(200)]
    targets = rng.integers(0, 5, 200).tolist()
    valid = [[item for item in group if item != NO_ITEM] for group in groups]
    facts = GroupStats.of(rollout_of(groups, targets))
    assert facts.distinct == sum(len(set(group)) for group in valid)
    assert facts.candidates == sum(len(group) for group in valid)
    assert facts.short == sum(len(group) < 6 for group in valid)
    assert facts.without_target == sum(t not in group for group, t in zip(valid, targets, strict=True))
    assert facts.all_target == sum(set(group) == {t} for group, t in zip(valid, targets, strict=True))


def test_parts_add_up() -> None:
    whole = GroupStats.of(rollout_of(GROUPS, TARGETS))
    parts = [GroupStats.of(rollout_of(GROUPS[:2], TARGETS[:2])), GroupStats.of(rollout_of(GROUPS[2:], TARGETS[2:]))]
    assert sum(parts, GroupStats()) == whole
    assert set(GroupStats().means().values()) == {0.0}
