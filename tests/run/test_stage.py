"""A stage's checkpoints: which metric says what is best, and which stay, written at once or by a thread."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.stage import Progress, Stage, monitored
from tawin_nemo.util.errors import CheckpointError
from tests import failpoints

SHAPE = Backbone("qwen2", 16, 2, 4, 2, 24, 21, rope_theta=1e4, max_position=64)


@pytest.fixture
def actor() -> Trainable:
    runtime.initialize(ModelConfig(), seed=0)
    return Trainable(build_model(SHAPE, ModelConfig(), seed=1), SHAPE, TrainerConfig(), lr=1e-3)


def saved(stage: Stage, actor: Trainable, steps: int, best: int) -> list[str]:
    for step in range(1, steps + 1):
        stage.save(actor, Progress(step=step, best_step=best if step >= best else -1))
    stage.wait_for_save()
    return sorted(path.name for path in stage.checkpoints.iterdir())


def test_the_metric_that_decides():
    assert monitored(TrainerConfig(), [1, 3]) == "ndcg@3"
    assert monitored(TrainerConfig(monitor="recall@1"), [1, 3]) == "recall@1"


@pytest.mark.parametrize("async_save", [False, True], ids=["at once", "by a thread"])
@pytest.mark.parametrize("keep_best", [False, True])
def test_the_newest_and_the_best_stay(actor: Trainable, tmp_path: Path, keep_best: bool, async_save: bool):
    stage = Stage(tmp_path / "rl", TrainerConfig(keep_last=2, keep_best=keep_best, async_save=async_save))
    assert saved(stage, actor, 5, best=2) == [*(["step_2"] if keep_best else []), "step_4", "step_5"]
    assert stage.resume(actor) == Progress(step=5, best_step=2)


def test_sft_keeps_what_it_hands_on(actor: Trainable, tmp_path: Path):
    stage = Stage(tmp_path / "sft", TrainerConfig(keep_last=1, keep_best=False))
    stage.keeps_best = True
    assert saved(stage, actor, 4, best=2) == ["step_2", "step_4"]


def test_a_run_that_fell_back_never_prunes_what_it_stands_on(actor: Trainable, tmp_path: Path):
    """step_3 is damaged: with keep_last=1 the good step_2 must not make room for it when step_3 is written again."""
    stage = Stage(tmp_path / "rl", TrainerConfig(keep_last=2, keep_best=False))
    saved(stage, actor, 3, best=9)
    (stage.checkpoints / "step_3" / "common.pt").unlink()
    again = Stage(tmp_path / "rl", TrainerConfig(keep_last=1, keep_best=False))
    assert again.resume(actor).step == 2
    assert sorted(path.name for path in again.checkpoints.iterdir()) == ["step_2", "step_3.damaged"]
    again.save(actor, Progress(step=3))
    assert [path.name for path in again.checkpoints.iterdir()] == ["step_3"]
    assert again.resume(actor).step == 3


@dataclass
class Clock:
    """Stands for ``time.monotonic`` of the module ``stage``."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def saves(stage: Stage, clock: Clock, seconds: Sequence[float], due: Collection[int] = ()) -> list[int]:
    """The steps after which a checkpoint is written when they take ``seconds``; those in ``due`` save by themselves."""
    written: list[int] = []
    progress = Progress()

    def save() -> None:
        written.append(progress.step)
        stage._saved_step, stage._saved_time = progress.step, clock()  # as ``Stage.save``

    for step in stage.steps(0, len(seconds)):
        clock.seconds += seconds[step]
        progress.step = step + 1
        if progress.step in due:
            save()
        stage.save_or_stop(save, progress)
    return written


def test_a_checkpoint_when_the_last_one_is_old_enough(tmp_path: Path, clock: Clock):
    stage = Stage(tmp_path / "rl", TrainerConfig(save_minutes=2.0))
    clock.seconds += 1000.0  # preparation before the first step
    assert saves(stage, clock, [50, 50, 50, 110, 30, 30, 300, 1]) == [3, 5, 7]
    again = Stage(tmp_path / "again", TrainerConfig(save_minutes=2.0))
    assert saves(again, clock, [50, 50, 50, 50, 50, 50], due=[2, 5]) == [2, 5]  # a save of the interval counts
    assert saves(Stage(tmp_path / "off", TrainerConfig()), clock, [10_000.0] * 3) == []


def test_rank_0_alone_decides_when_the_minutes_are_over(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    """Clocks differ: what another rank measures is not sent, and it saves when rank 0 says so."""
    sent: list[list[bool]] = []
    answers = iter([[False, True], [False, False], [False, True]])

    def exchange(flags: Sequence[bool]) -> list[bool]:
        sent.append(list(flags))
        return next(answers)

    monkeypatch.setattr(runtime, "any_rank_of", exchange)
    other = Stage(tmp_path / "rl", TrainerConfig(save_minutes=1.0))
    other._writer = False
    assert saves(other, clock, [600, 600, 600]) == [1, 3]
    assert sent == [[False, False]] * 3


def test_a_real_save_starts_the_minutes_anew(actor: Trainable, tmp_path: Path, clock: Clock):
    stage = Stage(tmp_path / "rl", TrainerConfig(save_minutes=2.0))
    for _ in stage.steps(0, 1):
        for step, seconds in enumerate((130.0, 100.0, 30.0), start=1):
            clock.seconds += seconds
            progress = Progress(step=step)
            stage.save_or_stop(lambda: stage.save(actor, progress), progress)  # noqa: B023
    assert sorted(path.name for path in stage.checkpoints.iterdir()) == ["step_1", "step_3"]


def test_an_error_of_the_thread_ends_the_next_step(actor: Trainable, tmp_path: Path):
    stage = Stage(tmp_path / "rl", TrainerConfig(async_save=True))
    steps = stage.steps(0, 3)
    next(steps)
    failpoints.arm("save.mid_shard=enospc")
    stage.save(actor, Progress(step=1))
    assert stage._saver is not None
    assert stage._saver._running is not None
    assert stage._saver._running.exception(timeout=60) is not None
    failpoints.arm("")
    with pytest.raises(CheckpointError, match="No space left"):
        next(steps)
