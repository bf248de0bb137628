"""Dispatch between layouts: prompts are sent to the rollout replicas, candidates are returned to the training replicas.

Training and rollouts may divide the same processes into different numbers of replicas. Prompts and candidates are
integers and a few floats per token, megabytes at most, so they are all-gathered, and every rank keeps its own share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tawin_nemo.config.schema import RlConfig
from tawin_nemo.data.batches import balanced_shard
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.types import Candidates, DataParallel, PromptBatch, Rollout, TokenRows


def dispatch_rollout(
    generate: Callable[[PromptBatch], Rollout], prompts: PromptBatch, training: DataParallel, rollout: DataParallel
) -> Rollout:
    """The rollout of ``prompts``, this training replica's share, in their order. Collective over all processes.

    ``generate`` is called once on every process, with its rollout replica's share of the prompts of all training
    replicas (possibly none). The candidates of a prompt do not depend on how prompts are divided.
    """
    shares = training.gather(prompts)
    everything = PromptBatch.cat(shares)
    rows = np.arange(len(everything))
    mine = balanced_shard(rows, everything.prompts.lengths, rollout)
    here = generate(everything.take(torch.from_numpy(mine)))
    device = here.items_BG.device
    parts = rollout.gather((mine, here.to("cpu")))
    order = np.concatenate([indices for indices, _ in parts]).argsort(kind="stable")
    first = sum(len(share) for share in shares[: training.rank])
    own = torch.from_numpy(order[first : first + len(prompts)])
    return Rollout.cat([part for _, part in parts]).take(own).to(device)


def dispatch_search(engine: Engine, prompts: TokenRows, width: int, token_budget: int | None) -> Candidates:
    """``engine.search`` with the prompts divided among the engine's replicas.

    Every replica passes all prompts and gets all results.
    """
    assert engine.dp is not None
    mine = balanced_shard(np.arange(len(prompts)), prompts.lengths, engine.dp)
    here = engine.search(prompts.take(mine), width, token_budget=token_budget).to("cpu")
    parts = engine.dp.gather((mine, here))
    order = np.concatenate([indices for indices, _ in parts]).argsort(kind="stable")
    return Candidates.cat([part for _, part in parts]).take(torch.from_numpy(order))


def generate_options(rl: RlConfig, step: int) -> dict[str, Any]:
    """The keyword arguments of ``Engine.generate`` for a step of a recipe."""
    return {
        "group_size": rl.group_size,
        "negatives": rl.negatives,
        "oversample": rl.oversample,
        "policy_space": rl.policy_space,
        "step": step,
    }
