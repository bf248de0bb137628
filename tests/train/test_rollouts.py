"""DAPO's dynamic sampling and what it is made of: groups taken out of rollouts and put together."""

from __future__ import annotations

import torch

from tawin_nemo.train.rollouts import informative, refilled
from tawin_nemo.types import DataParallel, PromptBatch, Rollout, TokenRows

G = 3
ALONE = DataParallel()


def rollout(hits: list[int], first_row: int, tokens: int = 2, version: int = 4) -> Rollout:
    """One group per entry; ``hits`` says how many of its candidates are the target."""
    B = len(hits)
    is_target_BG = torch.arange(G)[None, :] < torch.tensor(hits)[:, None]
    row_B = torch.arange(first_row, first_row + B)
    return Rollout(
        prompts=PromptBatch(row_B, TokenRows.from_lists([[int(row), 7] for row in row_B]), row_B * 10),
        items_BG=row_B[:, None] * 100 + torch.arange(G),
        tokens_BGT=row_B[:, None, None].expand(B, G, tokens).clone(),
        lengths_BG=torch.full((B, G), tokens),
        scores_BG=-torch.arange(G, dtype=torch.float32).expand(B, G),
        logprobs_BGT=row_B[:, None, None].expand(B, G, tokens).float(),
        is_target_BG=is_target_BG,
        weight_version=version,
    )


def reward(subject: Rollout) -> torch.Tensor:
    return subject.is_target_BG.float()


def pair(hits: list[int], first_row: int, tokens: int = 2) -> tuple[Rollout, torch.Tensor]:
    subject = rollout(hits, first_row, tokens)
    return subject, reward(subject)


def rows(subject: Rollout) -> list[int]:
    return subject.prompts.row_B.tolist()


def test_only_groups_with_different_rewards_are_informative() -> None:
    kept, rewards = informative(*pair([0, 1, 3, 2], 10))  # none, one, all, two
    assert rows(kept) == [11, 13]
    assert torch.equal(rewards, reward(kept))
    assert kept.items_BG[:, 0].tolist() == [1100, 1300]
    assert kept.prompts.prompts[1].tolist() == [13, 7]


def test_refills_until_enough_are_found() -> None:
    further = iter([pair([0, 0, 0], 20), pair([1, 1, 0], 30), pair([1, 1, 1], 40)])
    got, rewards, added = refilled(*pair([0, 1, 0], 10), lambda: next(further), wanted=3, most=5, dp=ALONE)
    assert added == 2
    assert rows(got) == [11, 30, 31]
    assert torch.equal(rewards, reward(got))
    assert got.weight_version == 4


def test_refills_are_bounded_and_paid_groups_stay() -> None:
    further = iter([pair([0, 0], 20), pair([0, 0], 30)])
    got, _, added = refilled(*pair([0, 1, 0], 10), lambda: next(further), wanted=3, most=2, dp=ALONE)
    assert (added, rows(got)) == (2, [11])
    got, _, added = refilled(*pair([1, 1, 1], 10), lambda: next(further), wanted=2, most=2, dp=ALONE)
    assert (added, rows(got)) == (0, [10, 11, 12])


def test_without_any_informative_group_the_first_rollout_stays() -> None:
    got, rewards, added = refilled(*pair([0, 3], 10), lambda: pair([0, 0], 20), wanted=1, most=2, dp=ALONE)
    assert (added, rows(got)) == (2, [10, 11])
    assert torch.equal(rewards, reward(got))


def test_replicas_count_together() -> None:
    """The other replica found five groups: this one, with none, asks for nothing more and has an empty rollout."""
    together = DataParallel(0, 2, lambda value: [value, 5])
    got, rewards, added = refilled(*pair([0, 0], 10), lambda: pair([1], 20), wanted=4, most=3, dp=together)
    assert (added, len(got.prompts), tuple(rewards.shape)) == (0, 0, (0, G))
