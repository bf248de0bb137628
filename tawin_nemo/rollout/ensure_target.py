"""Put the target into groups that lack it (``rl.ensure_target: replace_last``; ReRe calls it add_gt)."""

from __future__ import annotations

from dataclasses import replace

import torch

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.types import Rollout


def ensure_target(rollout: Rollout, catalog: Catalog) -> Rollout:
    """Replace the lowest-ranked place of every group without the target by the target's own token path.

    The place keeps its score, so the target ranks last; its behaviour log-probs are not known from the search, so the
    rollout loses them and the actor scores all candidates before its first update.
    """
    lacking_B = ~rollout.is_target_BG.any(dim=1)
    if not lacking_B.any():
        return rollout
    rows = lacking_B.nonzero().squeeze(1)
    target_M = rollout.prompts.target_B[rows]
    paths_MT, lengths_M = catalog.paths.take(target_M.numpy()).padded()
    tokens_BGT = rollout.tokens_BGT
    if paths_MT.shape[1] > tokens_BGT.shape[2]:
        tokens_BGT = torch.nn.functional.pad(tokens_BGT, (0, paths_MT.shape[1] - tokens_BGT.shape[2]))
    tokens_BGT = tokens_BGT.clone()
    tokens_BGT[rows, -1] = 0
    tokens_BGT[rows, -1, : paths_MT.shape[1]] = paths_MT
    items_BG, lengths_BG, is_target_BG, scores_BG = (
        rollout.items_BG.clone(), rollout.lengths_BG.clone(), rollout.is_target_BG.clone(), rollout.scores_BG.clone(),
    )  # fmt: skip
    items_BG[rows, -1], lengths_BG[rows, -1], is_target_BG[rows, -1] = target_M, lengths_M, True
    # a group with fewer than G valid items has -inf in its last place; the target is a real candidate there
    lowest_B = scores_BG.masked_fill(~rollout.valid_BG, torch.inf).min(dim=1).values
    scores_BG[rows, -1] = torch.minimum(scores_BG[rows, -1], lowest_B[rows]).clamp(min=-1e30)
    return replace(
        rollout, items_BG=items_BG, tokens_BGT=tokens_BGT, lengths_BG=lengths_BG, is_target_BG=is_target_BG,
        scores_BG=scores_BG, logprobs_BGT=None,
    )  # fmt: skip
