"""Groups of candidates: distinct draws, the target put into groups without it, counts and comparisons for the log.

M groups without their target.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.types import NO_ITEM, Candidates, Rollout
from tawin_nemo.util.errors import ConfigError

# -- Distinct candidates out of more draws than are needed: the dynamic sampling of ReRe (arXiv 2510.12211).


def draws_for(group_size: int, oversample: float) -> int:
    """Draws from which ``group_size`` candidates are kept: ``ceil(oversample * group_size)``.

    Raises ConfigError for an ``oversample`` below 1.

    >>> draws_for(16, 1.5), draws_for(10, 1.1)
    (24, 11)
    """
    if not (math.isfinite(oversample) and oversample >= 1):
        raise ConfigError(f"rl.oversample={oversample} must be at least 1: draws per candidate that is kept")
    return math.ceil(round(oversample * group_size, 9))  # 1.1 * 10 is a little above 11


def keep_distinct(candidates: Candidates, target_leaf_B: Tensor, group_size: int) -> Candidates:
    """Keep ``group_size`` of W >= ``group_size`` independent draws of each prompt, as many distinct paths as possible.

    Which ones **[choice]**: the target's path if it was drawn; then every other path that was drawn, once, best
    log-prob first; if these are fewer than ``group_size``, second draws of the same paths in the same order (the
    target's first), then third draws, and so on. What is kept is listed best score first, as everywhere. Every kept
    slot is a real draw with its own log-probs: those of the policy at temperature 1, as ``constrained_sample`` gives
    them.

    ReRe's public code orders the wrong paths by how often they were drawn, whose expectation is this order at
    temperature 1; it keeps *every* draw of the target, which can fill a group with targets, while here a path comes
    twice only when there are too few.

    The draws are independent, the kept set is not a sample of the policy: likely wrong paths appear once however often
    they were drawn, unlikely ones are dropped first, and the target never is. A group's mean reward is therefore not
    an estimate of the policy's, and the mean of the surrogate over the group is not an unbiased estimate of its
    expectation; the ratio of each single candidate is exact.

    Args:
        candidates: Draws, sorted by score (``constrained_sample``).
        target_leaf_B: Leaf of each prompt's target.
        group_size: G.
    """
    leaf_BW = candidates.leaf_BW
    width = leaf_BW.shape[1]
    slot_W = torch.arange(width, device=leaf_BW.device)
    others_later_BW = (leaf_BW != target_leaf_B[:, None]) * width
    preference_BW = repeats_before(leaf_BW) * (2 * width) + others_later_BW + slot_W
    kept_BG = preference_BW.argsort(dim=1)[:, :group_size].sort(dim=1).values
    return gather_candidates(candidates, kept_BG)


def repeats_before(leaf_BW: Tensor) -> Tensor:
    """Number of slots further left in the row that hold the same leaf. [B, W] int64.

    >>> repeats_before(torch.tensor([[7, 3, 7, 7, 3]]))
    tensor([[0, 0, 1, 2, 1]])
    """
    by_leaf_BW, order_BW = leaf_BW.sort(dim=1, stable=True)
    slot_BW = torch.arange(leaf_BW.shape[1], device=leaf_BW.device).expand_as(leaf_BW)
    new_BW = torch.ones_like(leaf_BW, dtype=torch.bool)
    new_BW[:, 1:] = by_leaf_BW[:, 1:] != by_leaf_BW[:, :-1]
    first_BW = torch.where(new_BW, slot_BW, 0).cummax(dim=1).values
    return torch.empty_like(leaf_BW).scatter_(1, order_BW, slot_BW - first_BW)


def gather_candidates(candidates: Candidates, slot_BG: Tensor) -> Candidates:
    """The candidates at indices ``slot_BG`` of each prompt's list."""

    def gather(tensor: Tensor) -> Tensor:
        index = slot_BG if tensor.ndim == 2 else slot_BG[..., None].expand(*slot_BG.shape, tensor.shape[-1])
        return tensor.gather(1, index)

    return candidates.map(gather)


def ensure_target(rollout: Rollout, catalog: Catalog) -> Rollout:
    """Insert the target into every group that lacks it, in place of one of the group's candidates.

    A group *holds* its target if any candidate ends at the target's leaf, so also through another item that is written
    alike; such a group stays as it is, even if all its slots are hits. In a group that lacks it the target takes the
    first slot of padding, so that nothing valid is thrown away, or else the last slot, which ranks lowest
    **[choice: the lowest slot even if another candidate was drawn twice]**. Like any candidate it is named by the
    first item of its path. It ranks last: it keeps the score of the candidate that it replaces, or takes the lowest
    score of the group (0 in a group without candidates), and equal scores rank in list order.

    ``inserted_BG`` marks what was put in. The policy did not choose these candidates and their score is not theirs:
    a group with one is off-policy (``rl.inserted_weight``). The other candidates keep their behaviour log-probs; those
    of an inserted path are not known from the search and are NaN at each of its tokens, for the actor to fill in.
    """
    missing_B = ~rollout.is_target_BG.any(dim=1)
    device = missing_B.device
    inserted_BG = torch.zeros_like(rollout.is_target_BG)
    if not missing_B.any():
        return replace(rollout, inserted_BG=inserted_BG)
    row_M = missing_B.nonzero().squeeze(1)
    slot_M = _free_slots(rollout.valid_BG[row_M])
    inserted_BG[row_M, slot_M] = True
    leaf_M = torch.from_numpy(catalog.leaf_I)[rollout.prompts.target_B.cpu()].to(device)[row_M]
    paths_MT, length_M = catalog.trie.paths_of(leaf_M)
    tokens_BGT, logprobs_BGT = rollout.tokens_BGT, rollout.logprobs_BGT
    longer = max(0, paths_MT.shape[1] - tokens_BGT.shape[2])
    tokens_BGT = _with(pad(tokens_BGT, (0, longer)), row_M, slot_M, 0)
    tokens_BGT[row_M, slot_M, : paths_MT.shape[1]] = paths_MT
    if logprobs_BGT is not None:
        inside_MT = torch.arange(tokens_BGT.shape[2], device=device) < length_M[:, None]
        unknown_MT = logprobs_BGT.new_zeros(inside_MT.shape).masked_fill(inside_MT, torch.nan)
        logprobs_BGT = _with(pad(logprobs_BGT, (0, longer)), row_M, slot_M, unknown_MT)
    return replace(
        rollout,
        items_BG=_with(rollout.items_BG, row_M, slot_M, catalog.trie.first_item(leaf_M)),
        tokens_BGT=tokens_BGT,
        lengths_BG=_with(rollout.lengths_BG, row_M, slot_M, length_M),
        scores_BG=_with(rollout.scores_BG, row_M, slot_M, _lowest_scores(rollout)[row_M]),
        logprobs_BGT=logprobs_BGT,
        is_target_BG=rollout.is_target_BG | inserted_BG,
        inserted_BG=inserted_BG,
    )


def _free_slots(valid_MG: Tensor) -> Tensor:
    """The first slot of padding in each group, the last slot where all are valid."""
    padding_MG = ~valid_MG
    return torch.where(padding_MG.any(dim=1), padding_MG.int().argmax(dim=1), valid_MG.shape[1] - 1)


def _lowest_scores(rollout: Rollout) -> Tensor:
    """The lowest finite score among each group's candidates; 0 where there is none."""
    scores_BG = rollout.scores_BG
    known_BG = rollout.valid_BG & scores_BG.isfinite()
    lowest_B = scores_BG.masked_fill(~known_BG, torch.inf).min(dim=1).values
    return lowest_B.masked_fill(~known_BG.any(dim=1), 0.0)


def _with(values: Tensor, row_M: Tensor, slot_M: Tensor, new: Tensor | int) -> Tensor:
    """A copy of ``values`` with ``new`` at [row_M, slot_M]."""
    values = values.clone()
    values[row_M, slot_M] = new
    return values


def distinct_items(items_BG: Tensor) -> Tensor:
    """Number of different items in each group, padding not counted. [B] int64.

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
class GroupStats:
    """Counts over the groups of one or more rollouts; those of several processes or steps are added with ``+``."""

    groups: int = 0
    candidates: int = 0  # valid ones
    without_target: int = 0  # groups in which no candidate is the target
    all_target: int = 0  # groups in which every candidate is (groups of one hit are among them)
    short: int = 0  # groups with fewer candidates than slots
    distinct: int = 0  # sum over groups of their different items
    inserted: int = 0  # groups into which ensure_target put the target

    @classmethod
    def of(cls, rollout: Rollout) -> GroupStats:
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

    def __add__(self, other: GroupStats) -> GroupStats:
        return GroupStats(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def means(self) -> dict[str, float]:
        """Means over groups (or candidates) by their names in metrics.jsonl; zeros without groups."""
        groups = max(1, self.groups)
        return {
            "frac_groups_without_target": self.without_target / groups,
            "frac_all_target_groups": self.all_target / groups,
            "frac_short_groups": self.short / groups,
            "frac_inserted_groups": self.inserted / groups,
            "distinct_items_per_group": self.distinct / groups,
            "frac_duplicate_candidates": (self.candidates - self.distinct) / max(1, self.candidates),
        }


def found_in_both(rollout: Rollout, other: Rollout) -> tuple[int, int]:
    """Candidates of ``rollout`` that ``other`` has for the same prompt as well, and all of them; of the same prompts.

    Targets that were put in (``ensure_target``) do not count.
    """
    own_BG = rollout.valid_BG if rollout.inserted_BG is None else rollout.valid_BG & ~rollout.inserted_BG
    shared_BG = (rollout.items_BG[:, :, None] == other.items_BG[:, None, :]).any(dim=2) & own_BG
    return int(shared_BG.sum()), int(own_BG.sum())
