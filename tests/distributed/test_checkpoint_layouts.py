"""Checkpoints under every layout: exact continuation, and weights and optimizer loaded under another layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.checkpoint import flat_pieces
from tawin_nemo.models.megatron.checkpoint.checkpoint import load_checkpoint
from tawin_nemo.models.megatron.hf.io import save_hf
from tawin_nemo.models.megatron.parallel import runtime
from tests.distributed.checkpoint_worker import SHAPE, adam_state, assert_equal, train_and_save, trainable, update
from tests.distributed.launch import launch
from tests.models.megatron.checkpoint import gathered

WORKER = Path(__file__).parent / "checkpoint_worker.py"
#: float32 sums in another order, through two AdamW steps.
STATISTICS_RELATIVE = 1e-4


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_close(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for have, want in zip(got, expected, strict=True):
        assert have == pytest.approx(want, rel=STATISTICS_RELATIVE)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, list[dict[str, float]]]]:
    """Per kind of optimizer: the folder with one process's step_2, and the statistics of its steps 2 and 3."""
    runtime.initialize(ModelConfig(), seed=1)
    made = {}
    for distributed in (False, True):
        root = tmp_path_factory.mktemp("one")
        made[distributed] = root, train_and_save(trainable(ModelConfig(), distributed=distributed, seed=3), root)
    return made


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = [
    pytest.param(True, 2, {}, id="dp2-distributed-optimizer"),
    pytest.param(False, 2, TP2, id="tp2"),
    pytest.param(False, 2, PP2, id="pp2"),
    pytest.param(True, 4, TP2, id="tp2-dp2-distributed-optimizer"),
    pytest.param(True, 4, PP2, id="pp2-dp2-distributed-optimizer", marks=pytest.mark.full),
    pytest.param(True, 4, {**TP2, **PP2, "sequence_parallel": True}, id="tp2-pp2-sp-distributed-optimizer"),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("distributed", "processes", "model"), LAYOUTS)
def test_layout_continues_exactly_and_exchanges_checkpoints(
    distributed: bool,
    processes: int,
    model: dict[str, Any],
    one_process: dict[bool, tuple[Path, list[dict[str, float]]]],
    tmp_path: Path,
) -> None:
    root, statistics = one_process[distributed]
    block = 10 if processes == 2 else flat_pieces.BLOCK  # small ones split what whole rows would not
    options = json.dumps({"model": model, "processes": processes, "distributed_optimizer": distributed, "block": block})
    launch(WORKER, processes, options, str(tmp_path), str(root / "step_2"), folder=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())

    # one process -> this layout
    assert_same_weights(tmp_path / "hf_of_other", root / "hf")
    assert_close(result["other"], statistics)

    # this layout -> one process
    runtime.initialize(ModelConfig(), seed=1)
    actor = trainable(ModelConfig(), distributed=distributed, seed=5)
    assert load_checkpoint(tmp_path / "step_2", model=actor.model, trainable=actor) == {"step": 2}
    save_hf(actor.model, SHAPE, tmp_path / "hf_in_one")
    assert_same_weights(tmp_path / "hf_in_one", tmp_path / "hf")
    if distributed:
        again = trainable(ModelConfig(), distributed=True, seed=6)
        with gathered.loading():
            load_checkpoint(tmp_path / "step_2", model=again.model, trainable=again)
        assert_equal(adam_state(actor), adam_state(again))
    assert_close([update(actor, step) for step in (2, 3)], result["own"])
