"""Checkpoints of a model with adapters: what they hold, and which models they are loaded into."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tawin_nemo.config.schema import LoraConfig, ModelConfig, TrainerConfig
from tawin_nemo.models.megatron.checkpoint.checkpoint import save_checkpoint
from tawin_nemo.models.megatron.checkpoint.dcp_load import ShardLoad
from tawin_nemo.models.megatron.model.adapters import add_adapters
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.util.errors import CheckpointError, ConfigError
from tests.models.megatron.checkpoint.checkpoint_scene import SHAPE, load, save, trainable, update

LORA = LoraConfig(rank=2, target_modules=["q_proj", "up_proj", "down_proj"])
BASE = {"kind": "pretrained", "source": "folder", "fingerprint": "0123456789abcdef"}

pytestmark = pytest.mark.usefixtures("one_process")


def adapted(
    seed: int, *, distributed: bool = True, lora: LoraConfig = LORA, base: dict[str, object] | None = None
) -> Trainable:
    model = build_model(SHAPE, ModelConfig(), seed=3)
    add_adapters(model, SHAPE, lora, seed=seed, base={**BASE, **(base or {})})
    return Trainable(model, SHAPE, TrainerConfig(distributed_optimizer=distributed), lr=1e-2)


@pytest.mark.parametrize("distributed", [False, True])
def test_they_hold_the_adapters_and_their_moments_and_continue_bit_for_bit(tmp_path: Path, distributed: bool) -> None:
    actor = adapted(5, distributed=distributed)
    for step in (0, 1):
        update(actor, step)
    save(tmp_path / "step_2", actor, step=2)
    record = json.loads((tmp_path / "step_2" / "state.json").read_text())
    names = ShardLoad(record["files"].keys()).load_sharded_metadata(tmp_path / "step_2").keys()
    assert record["lora"] == {"rank": 2, "alpha": 16.0, "target_modules": ["q_proj", "up_proj", "down_proj"]}
    assert record["base"] == BASE
    assert all(".lora." in name for name in names), names
    # A and B of three linear layers, all depths in one; their moments and, of the distributed optimizer, master weights
    assert sum(name.startswith("optimizer.state.") for name in names) == (3 if distributed else 2) * 6
    assert sum(not name.startswith("optimizer.") for name in names) == 6
    expected = [update(actor, step) for step in (2, 3)]
    other = adapted(6, distributed=distributed)
    assert load(tmp_path / "step_2", other) == {"step": 2}
    assert [update(other, step) for step in (2, 3)] == expected
    pairs = zip(actor.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_models_that_are_not_theirs_are_refused(tmp_path: Path) -> None:
    actor = adapted(5)
    save(tmp_path / "step_1", actor, step=1)
    whole = trainable(3, distributed=True)
    save_checkpoint(tmp_path / "step_2", model=whole.model, trainable=whole, state={})
    ours = r"adapters of model\.lora\.rank=2, alpha=16, target_modules=\[q_proj,up_proj,down_proj\]"
    with pytest.raises(CheckpointError, match=rf"step_1 holds {ours}, but this run trains whole weights .*start="):
        load(tmp_path / "step_1", whole)
    with pytest.raises(CheckpointError, match=rf"step_2 holds whole weights .* but this run trains {ours}"):
        load(tmp_path / "step_2", actor)
    with pytest.raises(CheckpointError, match=r"but this run trains adapters of model\.lora\.rank=3"):
        load(tmp_path / "step_1", adapted(5, lora=replace(LORA, rank=3)))
    with pytest.raises(CheckpointError, match=r"but this run trains adapters of .* alpha=8"):
        load(tmp_path / "step_1", adapted(5, lora=replace(LORA, alpha=8.0)))
    load(tmp_path / "step_1", adapted(5, lora=replace(LORA, dropout=0.5)))


def test_a_changed_base_is_refused_by_name_and_fingerprint(tmp_path: Path) -> None:
    save(tmp_path / "step_1", adapted(5), step=1)
    message = r"have changed: it holds adapters to folder \(0123456789ab\), but this run has folder \(fedcba987654\)"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "step_1", adapted(5, base={"fingerprint": "fedcba9876543210"}))
    with pytest.raises(ConfigError, match=r"but this run has random weights of seed 7 \(drawn\); bring those"):
        load(tmp_path / "step_1", adapted(5, base={"kind": "random", "source": "", "fingerprint": "", "seed": 7}))
    load(tmp_path / "step_1", adapted(5, base={"source": "another place"}))
