"""Fixtures of the checkpoint tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tests.models.megatron.checkpoint.checkpoint_scene import save, trainable, update


@pytest.fixture
def one_process() -> None:
    runtime.initialize(ModelConfig(), seed=0)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Trainable]:
    """A folder with step_1 and step_2, and the model of step_2."""
    actor = trainable(3)
    save(tmp_path / "step_1", actor, step=1)
    update(actor, 0)
    save(tmp_path / "step_2", actor, step=2)
    return tmp_path, actor
