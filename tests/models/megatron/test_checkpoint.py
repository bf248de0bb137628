"""Checkpoints in one process: exact continuation, damage, names, other models (layouts are in tests/distributed)."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from tawin_nemo.backbones import Backbone
from tawin_nemo.config import ModelConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.errors import CheckpointError
from tawin_nemo.models.megatron import checkpoint, checkpoint_files, parallel
from tawin_nemo.models.megatron.build import build_model
from tawin_nemo.models.megatron.checkpoint import (
    find_problem,
    list_checkpoints,
    load_checkpoint,
    newest_valid,
    prune,
    save_checkpoint,
)
from tawin_nemo.models.megatron.trainable import MicroBatch, Trainable
from tawin_nemo.types import TokenRows

SHAPE = Backbone("qwen2", 16, 2, 4, 2, 24, 21, rope_theta=1e4, max_position=64)
ROWS, LENGTH = 3, 7


@pytest.fixture(autouse=True)
def _one_process() -> None:
    parallel.initialize(ModelConfig(), seed=0)


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


def test_no_writer_process_is_started(tmp_path: Path) -> None:
    save(tmp_path / "step_1", trainable(3))
    assert multiprocessing.active_children() == []
    assert filesystem_async._results_queue is None  # megatron-core's own strategy would have spawned a manager


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path / "step_1", trainable(3), rng=torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Trainable]:
    """A folder with step_1 and step_2, and the model of step_2."""
    actor = trainable(3)
    save(tmp_path / "step_1", actor, step=1)
    update(actor, 0)
    save(tmp_path / "step_2", actor, step=2)
    return tmp_path, actor


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the checkpoint module logs."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(checkpoint.__name__)
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _edit_state(path: Path) -> None:
    record = json.loads(path.read_text())
    record["state"]["step"] = 7
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("__0_0.distcp", _truncate, "bytes instead of"),
        ("__0_0.distcp", _flip, "checksum of __0_0.distcp is wrong"),
        (".metadata", _flip, "checksum of .metadata is wrong"),
        ("common.pt", Path.unlink, "common.pt is missing"),
        ("state.json", Path.unlink, "state.json is missing"),
        ("state.json", _truncate, "state.json is damaged"),
        ("state.json", _edit_state, "checksum of state.json is wrong"),
    ],
)
def test_damage_is_found_and_the_previous_one_used(
    two: tuple[Path, Trainable], messages: list[str], name: str, damage: Callable[[Path], None], said: str
) -> None:
    folder, actor = two
    assert newest_valid(folder) == folder / "step_2"
    assert messages == []
    damage(folder / "step_2" / name)
    with pytest.raises(CheckpointError, match=said):
        load(folder / "step_2", actor)
    assert newest_valid(folder) == folder / "step_1"
    assert len(messages) == 1
    assert str(folder / "step_2") in messages[0]
    assert f"continuing from {folder / 'step_1'}" in messages[0]
    assert said in messages[0]
    assert load(folder / "step_1", actor) == {"step": 1}


def test_nothing_valid(two: tuple[Path, Trainable], messages: list[str], tmp_path: Path) -> None:
    folder, _ = two
    assert newest_valid(tmp_path / "absent") is None
    for step in (1, 2):
        (folder / f"step_{step}" / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"is whole: .*step_2 .*common.pt is missing.*step_1 .*remove") as raised:
        newest_valid(folder)
    assert str(folder.parent) in str(raised.value)
    assert messages == []


@pytest.mark.parametrize(
    ("module", "name"), [(checkpoint, "sharded_state"), (checkpoint_files, "digests"), (checkpoint_files, "_fsync")]
)
def test_an_interrupted_save_leaves_the_old_one(
    two: tuple[Path, Trainable], monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    folder, actor = two

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for step in (2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                save(folder / f"step_{step}", actor, step=30)
    assert [step for step, _ in list_checkpoints(folder)] == [1, 2]
    assert find_problem(folder / "step_2") is None
    assert load(folder / "step_2", actor) == {"step": 2}
    save(folder / "step_3", actor, step=3)  # over the left-over temporary
    assert load(newest_valid(folder) or folder, actor) == {"step": 3}


def test_a_kill_between_the_two_renames_loses_nothing(
    two: tuple[Path, Trainable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old step_2 has been moved away, the new one is not in its place yet."""
    folder, actor = two

    def killed(point: str) -> None:
        if point == "save.replacing":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files.failpoints, "reach", killed)
        with pytest.raises(KeyboardInterrupt):
            save(folder / "step_2", actor, step=20)
    assert [step for step, _ in list_checkpoints(folder)] == [1]
    assert newest_valid(folder) == folder / "step_2"
    assert load(folder / "step_2", actor) == {"step": 2}


def test_what_was_passed_over_is_set_aside_until_the_next_save(two: tuple[Path, Trainable]) -> None:
    folder, _ = two
    _truncate(folder / "step_2" / "__0_0.distcp")
    assert newest_valid(folder) == folder / "step_1"
    checkpoint.set_aside(folder, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["step_1", "step_2.damaged"]
    prune(folder, keep_last=1, keep=set())
    assert [path.name for path in folder.iterdir()] == ["step_1"]


def test_a_full_disk_is_explained_and_leaves_the_old_one(two: tuple[Path, Trainable]) -> None:
    folder, actor = two
    checkpoint_files.failpoints.arm("save.mid_shard=enospc")
    try:
        with pytest.raises(
            CheckpointError, match=r"step_3 could not be written .*No space left.*untouched.*free space"
        ):
            save(folder / "step_3", actor)
    finally:
        checkpoint_files.failpoints.arm("")
    assert newest_valid(folder) == folder / "step_2"


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
