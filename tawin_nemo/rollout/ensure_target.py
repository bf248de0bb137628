"""Put the target into groups that lack it (``rl.ensure_target: replace_last``; ReRe calls it add_gt)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.types import Rollout


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
