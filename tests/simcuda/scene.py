"""What an RL step asks of a device, phase by phase, on a search whose course does not depend on the weights.

Items are three codes of six each, so that every beam of every prompt makes the same choices at the same time: one
prefill, three selections, two extensions.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, RlConfig, RolloutConfig, TrainerConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.train.actor import Actor
from tawin_nemo.train.reference import CopiedReference
from tawin_nemo.types import DataParallel, PromptBatch, Rollout, TokenRows
from tests.simcuda.ledger import Counts, counting

LEVELS, CODES, GROUP, PROMPTS = 3, 6, 4, 4


def shape(layers: int) -> Backbone:
    return Backbone("qwen2", 64, layers, 4, 2, 96, 64, rope_theta=1e4, max_position=64, init_std=0.05)


def catalog() -> Catalog:
    paths = [
        [*(2 + CODES * level + code for level, code in enumerate(codes)), 1]
        for codes in itertools.product(range(CODES), repeat=LEVELS)
    ]
    rows, names = TokenRows.from_lists(paths), [f"item {i}" for i in range(len(paths))]
    return Catalog(names, names, "title", rows, TokenTrie.from_paths(rows))


def prompts(items: int) -> PromptBatch:
    draw = np.random.default_rng(6)
    rows = TokenRows.from_lists([draw.integers(2, 60, size=5 + row) for row in range(PROMPTS)])
    return PromptBatch(torch.arange(PROMPTS), rows, torch.from_numpy(draw.integers(0, items, size=PROMPTS)))


class Phases:
    """Counts and number of calls by phase."""

    def __init__(self) -> None:
        self.counts: dict[str, Counts] = defaultdict(Counts)
        self.calls: dict[str, int] = defaultdict(int)

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` whose events are added to a phase."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with counting() as counts:
                result = function(*args, **kwargs)
            self.counts[name] += counts
            self.calls[name] += 1
            return result

        return counted


class _PhasedLM(MegatronLM):
    def __init__(self, model: Any, given: Backbone, phases: Phases) -> None:
        super().__init__(model, given)
        for name in ("prefill", "extend", "logprobs"):
            setattr(self, name, phases.of(name, getattr(self, name)))


def measured(layers: int) -> Phases:
    """Every phase of a second step (the first one makes the optimizer's state) of a model of so many layers."""
    given = shape(layers)
    cfg = ModelConfig(precision="bf16")
    runtime.initialize(cfg, seed=0)
    model, copied = build_model(given, cfg, seed=3), CopiedReference(build_model(given, cfg, seed=3))
    trainable = Trainable(model, given, TrainerConfig(), lr=1e-3)
    items, rl = catalog(), RlConfig(policy_space="trie", group_size=GROUP, micro_batch_tokens=4096)
    actor, phases = Actor(trainable, items, rl, DataParallel()), Phases()
    for step in range(2):
        phases = Phases()
        rollout = _rollout(model, given, items, phases, step)
        ones_BG = torch.ones_like(rollout.scores_BG, dtype=torch.float32)
        packed = phases.of("pack", actor.pack)(rollout, ones_BG, ones_BG)
        reference = phases.of("reference", copied.logprobs)([part.batch for part in packed])
        _update(trainable, partial(actor.update, rollout, packed, ones_BG, ones_BG, reference, lr=1e-3), phases)
    return phases


def _rollout(model: Any, given: Backbone, items: Catalog, phases: Phases, step: int) -> Rollout:
    engine = RolloutEngine(_PhasedLM(model, given, phases), items, RolloutConfig(), seed=0)
    with counting() as counts:
        rollout = engine.generate(prompts(len(items)), GROUP, negatives="beam", policy_space="trie", step=step)
        rollout = rollout.to("cpu")  # as the RL step does
    for name in ("prefill", "extend", "logprobs"):
        counts = counts - phases.counts[name]
    phases.counts["select"], phases.calls["select"] = counts, LEVELS
    return rollout


def _update(trainable: Trainable, update: Callable[[], Any], phases: Phases) -> None:
    """One update, its two parts counted by themselves."""
    parts = {"accumulate": "update", "step": "optimizer"}
    for name, phase in parts.items():
        setattr(trainable, name, phases.of(phase, getattr(trainable, name)))
    try:
        update()
    finally:
        for name in parts:
            delattr(trainable, name)
