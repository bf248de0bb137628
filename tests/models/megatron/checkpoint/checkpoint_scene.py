"""A small model with its optimizer and updates of it: for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.types import TokenRows

SHAPE = Backbone("qwen2", 16, 2, 4, 2, 24, 21, rope_theta=1e4, max_position=64)
ROWS, LENGTH = 3, 7


def trainable(seed: int, *, shape: Backbone = SHAPE, distributed: bool = False, precision: str = "fp32") -> Trainable:
    cfg = ModelConfig(precision=precision)
    trainer = TrainerConfig(distributed_optimizer=distributed)
    return Trainable(build_model(shape, cfg, seed=seed), shape, trainer, lr=1e-2)


def update(actor: Trainable, step: int) -> dict[str, float]:
    """One update on rows that are a function of the step."""
    tokens = torch.randint(0, SHAPE.vocab, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    first, others = (TokenRows.from_lists(list(part.numpy())) for part in (tokens[:, :1], tokens[:, 1:]))
    batch, _ = tree_batch(first, others, np.arange(ROWS), None)
    return actor.update([MicroBatch(batch, lambda logp_N: (-logp_N.mean(), {}))], lr=1e-2)


def save(path: Path, actor: Trainable, **state: Any) -> None:
    save_checkpoint(path, model=actor.model, trainable=actor, state=state)


def load(path: Path, actor: Trainable) -> dict:
    return load_checkpoint(path, model=actor.model, trainable=actor)


def assert_same_weights(one: Trainable, other: Trainable) -> None:
    for (name, left), right in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(left, right), name
