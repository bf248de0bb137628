"""Groups of candidates: distinct draws, the target put into groups without it, and counts for the log.

M: groups without their target."""

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


def distinct_first(found: Candidates, target_leaf_B: Tensor, group_size: int) -> Candidates:
    """Keep ``group_size`` of W >= ``group_size`` independent draws of each prompt, as many distinct paths as possible.

    Which ones **[choice]**: the target's path if it was drawn; then every other path that was drawn, once, best
    log-prob first; if these are fewer than ``group_size``, second draws of the same paths in the same order (the
    target's first), then third draws, and so on. What is kept is listed best score first, as everywhere. Every kept
    place is a real draw with its own log-probs: those of the policy at temperature 1, as ``constrained_sample`` gives
    them.

    ReRe's public code orders the wrong paths by how often they were drawn, whose expectation is this order at
    temperature 1; it keeps *every* draw of the target, which can fill a group with targets, while here a path comes
    twice only when there are too few.

    The draws are independent, the kept set is not a sample of the policy: likely wrong paths appear once however often
    they were drawn, unlikely ones are dropped first, and the target never is. A group's mean reward is therefore not
    an estimate of the policy's, and the mean of the surrogate over the group is not an unbiased estimate of its
    expectation; the ratio of each single candidate is exact.

    Args:
        found: Draws, sorted by score (``constrained_sample``).
        target_leaf_B: Leaf of each prompt's target.
        group_size: G.
    """
    leaf_BW = found.leaf_BW
    width = leaf_BW.shape[1]
    place_W = torch.arange(width, device=leaf_BW.device)
    others_later_BW = (leaf_BW != target_leaf_B[:, None]) * width
    preference_BW = repeats_before(leaf_BW) * (2 * width) + others_later_BW + place_W
    kept_BG = preference_BW.argsort(dim=1)[:, :group_size].sort(dim=1).values
    return at_places(found, kept_BG)


def repeats_before(leaf_BW: Tensor) -> Tensor:
    """How many places to the left hold the same leaf. [B, W] int64.

    >>> repeats_before(torch.tensor([[7, 3, 7, 7, 3]]))
    tensor([[0, 0, 1, 2, 1]])
    """
    by_leaf_BW, order_BW = leaf_BW.sort(dim=1, stable=True)
    place_BW = torch.arange(leaf_BW.shape[1], device=leaf_BW.device).expand_as(leaf_BW)
    new_BW = torch.ones_like(leaf_BW, dtype=torch.bool)
    new_BW[:, 1:] = by_leaf_BW[:, 1:] != by_leaf_BW[:, :-1]
    first_BW = torch.where(new_BW, place_BW, 0).cummax(dim=1).values
    return torch.empty_like(leaf_BW).scatter_(1, order_BW, place_BW - first_BW)


def at_places(found: Candidates, place_BG: Tensor) -> Candidates:
    """The candidates at these places of each list."""

    def gather(tensor: Tensor) -> Tensor:
        index = place_BG if tensor.ndim == 2 else place_BG[..., None].expand(*place_BG.shape, tensor.shape[-1])
        return tensor.gather(1, index)

    return found.map(gather)


def ensure_target(rollout: Rollout, catalog: Catalog) -> Rollout:
    """Every group with its target: where it is absent, its token path takes one place of the group.

    A group *holds* its target if any candidate ends at the target's leaf, so also through another item that is written
    alike; such a group stays as it is, even if all its places are hits. In a group that lacks it the target takes the
    first place of padding, so that nothing valid is thrown away, or else the last place, which ranks lowest
    **[choice: the lowest place even if another candidate was drawn twice]**. Like any candidate it is named by the
    first item of its path. It ranks last: it keeps the score of the candidate that it replaces, or takes the lowest
    score of the group (0 in a group without candidates), and equal scores rank in list order.

    ``inserted_BG`` marks what was put in. The policy did not choose these candidates and their score is not theirs:
    a group with one is off-policy (``rl.inserted_weight``). The other candidates keep their behaviour log-probs; those
    of an inserted path are not known from the search and are NaN at each of its tokens, for the actor to fill in.
    """
    lacking_B = ~rollout.is_target_BG.any(dim=1)
    device = lacking_B.device
    inserted_BG = torch.zeros_like(rollout.is_target_BG)
    if not lacking_B.any():
        return replace(rollout, inserted_BG=inserted_BG)
    row_M = lacking_B.nonzero().squeeze(1)
    place_M = _places(rollout.valid_BG[row_M])
    inserted_BG[row_M, place_M] = True
    leaf_M = torch.from_numpy(catalog.leaf_I)[rollout.prompts.target_B.cpu()].to(device)[row_M]
    paths_MT, length_M = catalog.trie.paths_of(leaf_M)
    tokens_BGT, logprobs_BGT = rollout.tokens_BGT, rollout.logprobs_BGT
    longer = max(0, paths_MT.shape[1] - tokens_BGT.shape[2])
    tokens_BGT = _with(pad(tokens_BGT, (0, longer)), row_M, place_M, 0)
    tokens_BGT[row_M, place_M, : paths_MT.shape[1]] = paths_MT
    if logprobs_BGT is not None:
        inside_MT = torch.arange(tokens_BGT.shape[2], device=device) < length_M[:, None]
        unknown_MT = logprobs_BGT.new_zeros(inside_MT.shape).masked_fill(inside_MT, torch.nan)
        logprobs_BGT = _with(pad(logprobs_BGT, (0, longer)), row_M, place_M, unknown_MT)
    return replace(
        rollout,
        items_BG=_with(rollout.items_BG, row_M, place_M, catalog.trie.first_item(leaf_M)),
        tokens_BGT=tokens_BGT,
        lengths_BG=_with(rollout.lengths_BG, row_M, place_M, length_M),
        scores_BG=_with(rollout.scores_BG, row_M, place_M, _lowest_scores(rollout)[row_M]),
        logprobs_BGT=logprobs_BGT,
        is_target_BG=rollout.is_target_BG | inserted_BG,
        inserted_BG=inserted_BG,
    )


def _places(valid_MG: Tensor) -> Tensor:
    """The first place of padding in each group, the last place where all are valid."""
    padding_MG = ~valid_MG
    return torch.where(padding_MG.any(dim=1), padding_MG.int().argmax(dim=1), valid_MG.shape[1] - 1)


def _lowest_scores(rollout: Rollout) -> Tensor:
    """The lowest finite score among each group's candidates; 0 where there is none."""
    scores_BG = rollout.scores_BG
    known_BG = rollout.valid_BG & scores_BG.isfinite()
    lowest_B = scores_BG.masked_fill(~known_BG, torch.inf).min(dim=1).values
    return lowest_B.masked_fill(~known_BG.any(dim=1), 0.0)


def _with(values: Tensor, row_M: Tensor, place_M: Tensor, new: Tensor | int) -> Tensor:
    """A copy with ``new`` at the places."""
    values = values.clone()
    values[row_M, place_M] = new
    return values


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
