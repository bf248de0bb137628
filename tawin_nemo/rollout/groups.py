"""Rollouts as lists of groups: take some, put several rollouts together (for DAPO's dynamic sampling)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tawin_nemo.types import PromptBatch, Rollout, TokenRows


def take_groups(rollout: Rollout, rows: Tensor) -> Rollout:
    """The groups ``rows`` (indices into B), in that order."""
    prompts = rollout.prompts
    return replace(
        rollout,
        prompts=PromptBatch(prompts.row_B[rows], prompts.prompts.take(rows.cpu().numpy()), prompts.target_B[rows]),
        items_BG=rollout.items_BG[rows],
        tokens_BGT=rollout.tokens_BGT[rows],
        lengths_BG=rollout.lengths_BG[rows],
        scores_BG=rollout.scores_BG[rows],
        logprobs_BGT=None if rollout.logprobs_BGT is None else rollout.logprobs_BGT[rows],
        is_target_BG=rollout.is_target_BG[rows],
        inserted_BG=None if rollout.inserted_BG is None else rollout.inserted_BG[rows],
    )


def join_groups(parts: Sequence[Rollout]) -> Rollout:
    """One rollout with the groups of ``parts``, which come from the same weights and have the same group size.

    Raises ValueError for no parts, or parts of different weight versions.
    """
    versions = {part.weight_version for part in parts}
    if len(versions) != 1:
        raise ValueError(f"rollouts of weight versions {sorted(versions)} cannot be joined; they need one version")
    first = parts[0]
    if len(parts) == 1:
        return first
    longest = max(part.tokens_BGT.shape[2] for part in parts)
    flat = [row for part in parts for row in map(part.prompts.prompts.__getitem__, range(len(part.prompts)))]
    return replace(
        first,
        prompts=PromptBatch(
            torch.cat([part.prompts.row_B for part in parts]),
            TokenRows.from_lists(flat),
            torch.cat([part.prompts.target_B for part in parts]),
        ),
        items_BG=torch.cat([part.items_BG for part in parts]),
        tokens_BGT=torch.cat([_wide(part.tokens_BGT, longest) for part in parts]),
        lengths_BG=torch.cat([part.lengths_BG for part in parts]),
        scores_BG=torch.cat([part.scores_BG for part in parts]),
        logprobs_BGT=_joined([part.logprobs_BGT for part in parts], longest),
        is_target_BG=torch.cat([part.is_target_BG for part in parts]),
        inserted_BG=_joined([part.inserted_BG for part in parts]),
    )


def _joined(parts: Sequence[Tensor | None], longest: int | None = None) -> Tensor | None:
    """None if any part is not known: the actor then finds out for all."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return torch.cat([part if longest is None else _wide(part, longest) for part in known])


def _wide(values_BGT: Tensor, tokens: int) -> Tensor:
    return torch.nn.functional.pad(values_BGT, (0, tokens - values_BGT.shape[2]))
