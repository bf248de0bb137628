"""Checkpoints in one process: exact continuation, damage, names, other models (layouts are in tests/distributed)."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import platform
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core
import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

import tawin_nemo
from tawin_nemo.models.megatron.checkpoint.checkpoint import list_checkpoints, load_checkpoint, prune, save_checkpoint
from tawin_nemo.models.megatron.checkpoint.sharded_state import complete_adam_state
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.util.errors import CheckpointError
from tests.models.megatron.checkpoint.checkpoint_scene import (
    SHAPE,
    assert_same_weights,
    load,
    save,
    trainable,
    update,
)

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
@pytest.mark.parametrize("steps", [0, 2], ids=["before-the-first-step", "after-two-steps"])
def test_continues_bit_for_bit(tmp_path: Path, steps: int, distributed: bool, precision: str) -> None:
    first = trainable(3, distributed=distributed, precision=precision)
    for step in range(steps):
        update(first, step)
    save(tmp_path / "step_2", first, step=steps)
    expected = [update(first, step) for step in (2, 3)]
    second = trainable(4, distributed=distributed, precision=precision)
    update(second, 9)  # its own moments and step counter must be overwritten
    assert load(tmp_path / "step_2", second) == {"step": steps}
    assert [update(second, step) for step in (2, 3)] == expected
    assert_same_weights(first, second)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
def test_loads_into_an_optimizer_that_has_not_stepped(tmp_path: Path, distributed: bool) -> None:
    first = trainable(3, distributed=distributed)
    update(first, 0)
    save(tmp_path / "step_1", first)
    expected = [update(first, step) for step in (1, 2, 3)]
    second = trainable(4, distributed=distributed)
    load(tmp_path / "step_1", second)
    assert [update(second, step) for step in (1, 2, 3)] == expected


def test_weights_alone(tmp_path: Path) -> None:
    first, second = trainable(3), trainable(4)
    save(tmp_path / "step_1", first)
    load_checkpoint(tmp_path / "step_1", model=second.model)
    assert_same_weights(first, second)
    save_checkpoint(tmp_path / "step_2", model=first.model, state={})
    load_checkpoint(tmp_path / "step_2", model=trainable(5).model)
    with pytest.raises(CheckpointError, match="optimizer None"):
        load(tmp_path / "step_2", second)


def test_saves_from_a_checkout_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing_installed)
    save(tmp_path / "step_1", trainable(3))
    versions = json.loads((tmp_path / "step_1" / "state.json").read_text())["versions"]
    expected = {
        "tawin-nemo": tawin_nemo.__version__,
        "torch": torch.__version__,
        "megatron-core": megatron.core.__version__,
    }
    assert versions == {"python": platform.python_version(), **expected}
    load(tmp_path / "step_1", trainable(4))


@pytest.mark.parametrize("loaded", [False, True], ids=["before-the-first-step", "loaded"])
@pytest.mark.parametrize("fused", [False, True])
def test_step_counters_lie_where_adam_reads_them(fused: bool, loaded: bool) -> None:
    """A fused kernel gets the counter's address: on the CPU beside parameters on a GPU it is an illegal access."""
    weights = [torch.nn.Parameter(torch.zeros(2, device="meta")) for _ in range(2)]  # meta: any device but the CPU
    adam = torch.optim.AdamW(weights)
    adam.param_groups[0].update(fused=fused, foreach=False)  # as ``model.fused.fuse`` does
    shared = torch.tensor(3.0)

    def init_state(optimizer: torch.optim.Optimizer, config: Any) -> None:
        for weight in weights:
            optimizer.state[weight] |= {"exp_avg": torch.zeros_like(weight), **({"step": shared} if loaded else {})}

    complete_adam_state(SimpleNamespace(optimizer=adam, init_state_fn=init_state, config=None))
    steps = [adam.state[weight]["step"] for weight in weights]
    assert {step.device.type for step in steps} == {"meta" if fused else "cpu"}
    assert len({id(step) for step in [shared, *steps]}) == 3  # no two parameters share one
    if not fused:
        assert [float(step) for step in steps] == [3.0 if loaded else 0.0] * 2


def test_no_writer_process_is_started(tmp_path: Path) -> None:
    save(tmp_path / "step_1", trainable(3))
    assert multiprocessing.active_children() == []
    assert filesystem_async._results_queue is None  # megatron-core's own strategy would have spawned a manager


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path / "step_1", trainable(3), rng=torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces(two: tuple[Path, Trainable]) -> None:
    folder, actor = two
    save(folder / "step_2", actor, step=20)
    assert load(folder / "step_2", actor) == {"step": 20}
    assert sorted(path.name for path in folder.iterdir()) == ["step_1", "step_2"]


def test_steps_are_ordered_as_numbers_and_other_names_ignored(tmp_path: Path) -> None:
    for name in ("step_10", "step_9", ".step_11.tmp", "step_x", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_12").write_text("a file")
    assert list_checkpoints(tmp_path) == [(9, tmp_path / "step_9"), (10, tmp_path / "step_10")]


def test_prune_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    for step in range(1, 7):
        (tmp_path / f"step_{step}").mkdir()
    (tmp_path / ".step_7.tmp").mkdir()
    (tmp_path / "best").mkdir()
    prune(tmp_path, keep_last=2, keep={1, 3, 99})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step_1", "step_3", "step_5", "step_6"]
    prune(tmp_path, keep_last=9, keep=set())
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 3, 5, 6]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 3}, "layers 2 instead of 3"),
        ({"vocab": 22}, "vocab 21 instead of 22"),
        ({"family": "llama"}, "qkv_bias True instead of False"),
        ({"tied": False}, "tied True instead of False"),
        ({"kv_heads": 4}, "kv_heads 2 instead of 4"),
    ],
)
def test_another_model_is_refused(two: tuple[Path, Trainable], change: dict[str, Any], said: str) -> None:
    other = trainable(3, shape=dataclasses.replace(SHAPE, **change))
    before = [parameter.clone() for parameter in other.model.parameters()]
    with pytest.raises(CheckpointError, match=said):
        load(two[0] / "step_2", other)
    assert all(torch.equal(one, two) for one, two in zip(before, other.model.parameters(), strict=True))


def test_another_kind_of_optimizer_is_refused(two: tuple[Path, Trainable]) -> None:
    with pytest.raises(
        CheckpointError, match=r"FP32Optimizer, this run uses DistributedOptimizer.*distributed_optimizer"
    ):
        load(two[0] / "step_2", trainable(3, distributed=True))
