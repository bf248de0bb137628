"""Rollouts on replicas of another layout: prompts go to the ranks that search, candidates come back to those that
learn from them.

The replicas of training and those of rollouts are different divisions of the same processes, often of different
number. Prompts and candidates are integers and a few floats per token, megabytes at most, so everybody tells everybody
and keeps what is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.data.batches import balanced_shard
from tawin_nemo.rollout.groups import join_groups, take_groups
from tawin_nemo.types import DataParallel, PromptBatch, Rollout, TokenRows


def dispatched(
    generate: Callable[[PromptBatch], Rollout], prompts: PromptBatch, training: DataParallel, rollout: DataParallel
) -> Rollout:
    """The rollout of ``prompts``, this training replica's share, in their order; every process calls it.

    ``generate`` runs once on every process, on the share of all replicas' prompts that its rollout replica searches
    (possibly none). The candidates of a prompt do not depend on how prompts are dealt out.
    """
    shares = training.gather(prompts)
    everything = join_prompts(shares)
    rows = np.arange(len(everything))
    mine = balanced_shard(rows, everything.prompts.lengths, rollout)
    here = generate(take_prompts(everything, mine))
    device = here.items_BG.device
    parts = rollout.gather((mine, _moved(here, torch.device("cpu"))))
    order = np.concatenate([places for places, _ in parts]).argsort(kind="stable")
    first = sum(len(share) for share in shares[: training.rank])
    own = torch.from_numpy(order[first : first + len(prompts)])
    return _moved(take_groups(join_groups([part for _, part in parts]), own), device)


def take_prompts(prompts: PromptBatch, rows: np.ndarray) -> PromptBatch:
    """The named prompts, in that order."""
    index = torch.from_numpy(rows)
    return PromptBatch(prompts.row_B[index], prompts.prompts.take(rows), prompts.target_B[index])


def join_prompts(parts: Sequence[PromptBatch]) -> PromptBatch:
    """The prompts of all parts, one part after another."""
    flat = [row for part in parts for row in map(part.prompts.__getitem__, range(len(part)))]
    return PromptBatch(
        torch.cat([part.row_B for part in parts]),
        TokenRows.from_lists(flat),
        torch.cat([part.target_B for part in parts]),
    )


def _moved(rollout: Rollout, device: torch.device) -> Rollout:
    values: dict[str, Any] = {item.name: getattr(rollout, item.name) for item in fields(rollout)}
    moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return Rollout(**(values | moved))
