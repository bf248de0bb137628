"""A checkpoint written by a thread: the bytes of a synchronous one, one at a time, its errors raised."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.checkpoint.async_save import AsyncSaver, drain
from tawin_nemo.models.megatron.checkpoint.checkpoint import newest_valid
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.util.errors import CheckpointError
from tests import failpoints
from tests.models.megatron.checkpoint.test_checkpoint import load, save, trainable, update

#: How long a test waits for a thread; it takes milliseconds.
PATIENCE = 60


@pytest.fixture(autouse=True)
def _one_process() -> None:
    runtime.initialize(ModelConfig(), seed=0)


class Held:
    """Holds the writing thread just before the rename, until ``go`` is set."""

    def __init__(self) -> None:
        self.there, self.go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.there.set()
        assert self.go.wait(PATIENCE)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
def test_same_bytes_although_training_goes_on(tmp_path: Path, distributed: bool) -> None:
    actor = trainable(3, distributed=distributed)
    update(actor, 0)
    save(tmp_path / "sync" / "step_1", actor, step=1)
    held, saver = Held(), AsyncSaver()
    with failpoints.calling("save.before_rename", held):
        saver.save(tmp_path / "async" / "step_1", model=actor.model, trainable=actor, state={"step": 1})
        expected = [update(actor, step) for step in (1, 2)]  # the file may not see these
        assert held.there.wait(PATIENCE)
        saver.check()  # in flight: says nothing, waits for nothing
        assert not (tmp_path / "async" / "step_1").exists()
        held.go.set()
        saver.wait()
    for name in ("__0_0.distcp", "common.pt"):
        one, other = ((tmp_path / kind / "step_1" / name).read_bytes() for kind in ("sync", "async"))
        assert one == other, name
    second = trainable(4, distributed=distributed)
    assert load(tmp_path / "async" / "step_1", second) == {"step": 1}
    assert [update(second, step) for step in (1, 2)] == expected


def test_one_at_a_time_and_in_order(tmp_path: Path) -> None:
    actor, saver, order = trainable(3), AsyncSaver(), []
    for step in (1, 2, 3):
        saver.save(tmp_path / f"step_{step}", model=actor.model, state={}, after=lambda step=step: order.append(step))
        assert order == list(range(1, step))[: len(order)]
        assert len(order) >= step - 1  # the one before is finished
    saver.wait()
    assert order == [1, 2, 3]
    assert newest_valid(tmp_path) == tmp_path / "step_3"


def test_an_error_of_the_thread_is_raised_by_the_next_call(tmp_path: Path) -> None:
    actor, saver = trainable(3), AsyncSaver()
    saver.save(tmp_path / "step_1", model=actor.model, trainable=actor, state={})
    saver.wait()
    for raised_by in (saver.wait, lambda: saver.save(tmp_path / "step_3", model=actor.model, state={})):
        failpoints.arm("save.mid_shard=enospc")
        saver.save(tmp_path / "step_2", model=actor.model, trainable=actor, state={})
        with pytest.raises(CheckpointError, match=r"step_2 could not be written .*No space left"):
            raised_by()
    failpoints.arm("")
    saver.wait()  # said once
    assert newest_valid(tmp_path) == tmp_path / "step_1"


def test_check_raises_as_soon_as_it_has_failed(tmp_path: Path) -> None:
    actor, saver = trainable(3), AsyncSaver()
    failpoints.arm("save.mid_shard=enospc")
    saver.save(tmp_path / "step_1", model=actor.model, trainable=actor, state={})
    failed = threading.Event()
    assert saver._running is not None
    saver._running.add_done_callback(lambda _: failed.set())
    assert failed.wait(PATIENCE)
    failpoints.arm("")
    with pytest.raises(CheckpointError, match="No space left"):
        saver.check()
    saver.check()


def test_drain_waits_and_is_silent(tmp_path: Path) -> None:
    actor, saver = trainable(3), AsyncSaver()
    failpoints.arm("save.before_rename=raise")
    saver.save(tmp_path / "step_1", model=actor.model, trainable=actor, state={})
    drain()
    failpoints.arm("")
    assert saver._running is None
    assert torch.isfinite(next(iter(actor.model.parameters()))).all()
