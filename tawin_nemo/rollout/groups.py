"""Counts over the groups of a rollout, for the log: how many are short, repeat items, lack or are full of targets."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from tawin_nemo.types import NO_ITEM, Rollout


def distinct_items(items_BG: Tensor) -> Tensor:
    """Different items in each group, padding aside. [B] int64.

    A search names a candidate by the first item of its path, so items written alike count once.

    >>> distinct_items(torch.tensor([[4, 2, 4, 4], [3, -1, -1, -1]])).tolist()
    [2, 1]
    """
    sorted_BG = items_BG.sort(dim=-1).values
    new_BG = torch.ones_like(sorted_BG, dtype=torch.bool)
    new_BG[:, 1:] = sorted_BG[:, 1:] != sorted_BG[:, :-1]
    return (new_BG & (sorted_BG != NO_ITEM)).sum(-1)


def all_target_groups(is_target_BG: Tensor, valid_BG: Tensor) -> Tensor:
    """bool [B]: the group has candidates and each of them is the target (or written like it): no reward differs.

    Only groups with repeated draws can be so; padding does not count.

    >>> hits = torch.tensor([[True, True], [True, False], [True, False]])
    >>> all_target_groups(hits, torch.tensor([[True, True], [True, True], [True, False]])).tolist()
    [True, False, True]
    """
    return valid_BG.any(-1) & (is_target_BG | ~valid_BG).all(-1)


@dataclass(frozen=True)
class GroupFacts:
    """Counts over the groups of one or more rollouts; those of several processes or steps are added with ``+``."""

    groups: int = 0
    candidates: int = 0  # valid ones
    without_target: int = 0  # groups in which no candidate is the target
    all_target: int = 0  # groups in which every candidate is (groups of one hit are among them)
    short: int = 0  # groups with fewer candidates than places
    distinct: int = 0  # sum over groups of their different items
    inserted: int = 0  # groups into which ensure_target put the target

    @classmethod
    def of(cls, rollout: Rollout) -> GroupFacts:
        """Count the groups of one rollout, on the device where it lies."""
        valid_BG, hit_BG = rollout.valid_BG, rollout.is_target_BG & rollout.valid_BG
        inserted_BG = torch.zeros_like(hit_BG) if rollout.inserted_BG is None else rollout.inserted_BG
        return cls(
            groups=len(valid_BG),
            candidates=int(valid_BG.sum()),
            without_target=int((~hit_BG.any(-1)).sum()),
            all_target=int(all_target_groups(hit_BG, valid_BG).sum()),
            short=int((~valid_BG).any(-1).sum()),
            distinct=int(distinct_items(rollout.items_BG).sum()),
            inserted=int(inserted_BG.any(-1).sum()),
        )

    def __add__(self, other: GroupFacts) -> GroupFacts:
        return GroupFacts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def shares(self) -> dict[str, float]:
        """The facts as means over groups (or candidates): names for the log and values; zeros without groups."""
        groups = max(1, self.groups)
        return {
            "frac_groups_without_target": self.without_target / groups,
            "frac_all_target_groups": self.all_target / groups,
            "frac_short_groups": self.short / groups,
            "frac_inserted_groups": self.inserted / groups,
            "distinct_items_per_group": self.distinct / groups,
            "frac_duplicate_candidates": (self.candidates - self.distinct) / max(1, self.candidates),
        }
