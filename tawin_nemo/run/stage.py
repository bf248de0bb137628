"""One training stage on disk: metrics, checkpoints, exact resume.

A stage directory (``RUN_DIR/sft``, ``RUN_DIR/rl`` ...) holds ``metrics.jsonl`` (only what the computation determines,
so that two equal runs have equal bytes), ``timings.jsonl`` (wall clock), ``checkpoints/step_N/``, with ``profile`` a
folder of that name and, when the stage has ended, ``done.json``. On resume both logs are cut back to the step of the
checkpoint that is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tawin_nemo.config.schema import TrainerConfig
from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.checkpoint.async_save import AsyncSaver
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run import signals
from tawin_nemo.run.callbacks import Callbacks
from tawin_nemo.run.profile import StepProfiler
from tawin_nemo.run.trained import chosen_checkpoint
from tawin_nemo.util.errors import Preempted
from tawin_nemo.util.files import atomic_path, write_json
from tawin_nemo.util.log import get_logger, progress

log = get_logger(__name__)

#: Receives (stage name, step, metrics) for TensorBoard and friends; see run/logging.py.
MetricSink = Callable[[str, int, dict[str, float]], None]


@dataclass
class Progress:
    """The state of a stage besides weights and optimizer, stored in a checkpoint's ``state.json``."""

    step: int = 0  # finished optimizer steps (SFT) or rollouts (RL)
    batches: int = 0  # batches of prompts that RL has drawn; more than steps where rollouts are refilled
    best_value: float | None = None  # of the validation metric; smaller is better
    best_step: int = -1
    bad_checks: int = 0
    skipped_steps: int = 0  # optimizer steps skipped because loss or gradient was not finite
    facts: dict[str, Any] = field(default_factory=dict)  # what else the next step needs, as JSON


def soonest_stop(progress: Progress, patience: int, check_every: int) -> int:
    """Steps of a stage that stops after ``patience`` checks without improvement, if none of the next ones improves."""
    return (progress.step // check_every + max(0, patience - progress.bad_checks)) * check_every


class Stage:
    """Owns one stage directory. Every rank calls every method; only world rank 0 writes the logs."""

    def __init__(
        self,
        directory: Path,
        trainer: TrainerConfig,
        *,
        deadline: float | None = None,
        sink: MetricSink | None = None,
        profile: str = "off",
        identity: Mapping[str, str] | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        """``identity``: fingerprints of what the weights belong to, stored in ``state.json`` of every checkpoint."""
        self.directory, self.trainer = directory, trainer
        self._identity = dict(identity or {})
        self.name = directory.name
        self.checkpoints = directory / "checkpoints"
        self._deadline, self._sink = deadline, sink
        self._callbacks = callbacks or Callbacks()
        self._writer = runtime.world_rank() == 0
        self._profiler = StepProfiler(profile, directory / "profile", writer=self._writer)
        self._last_time = time.monotonic()
        self._saved_step = -1  # the newest checkpoint that this process has begun to write
        self._saved_time = time.monotonic()  # when it did, or began to train
        self._saver: AsyncSaver | None = None
        self.keeps_best = trainer.keep_best
        if self._writer:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        runtime.barrier()

    # -- resume ---------------------------------------------------------------------------------------------------
    @property
    def done(self) -> bool:
        """Whether the stage has finished."""
        return (self.directory / "done.json").is_file()

    def resume(self, trainable: Trainable) -> Progress:
        """Load the newest valid checkpoint into ``trainable``; a new stage starts at step 0.

        Raises CheckpointError when there are checkpoints but none is valid.
        """
        newest = checkpoint.newest_valid(self.checkpoints)
        if newest is None:
            self._rewind(-1)
            return Progress()
        state = checkpoint.load_checkpoint(newest, model=trainable.model, trainable=trainable, verified=True)
        progress = Progress(**state["progress"])
        checkpoint.set_aside(self.checkpoints, progress.step)
        self._rewind(progress.step)
        log.info("%s continues after step %d", self.name, progress.step)
        return progress

    def _rewind(self, step: int) -> None:
        """Drop log lines of steps after the loaded checkpoint, and an incomplete last line."""
        if not self._writer:
            return
        for name in ("metrics.jsonl", "timings.jsonl"):
            path = self.directory / name
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue
            with atomic_path(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def steps(self, done: int, total: int, *, soonest: Callable[[], int] | None = None) -> Iterator[int]:
        """0-based steps ``done .. total - 1`` with a progress bar and the profiler.

        ``soonest``: the number of steps after which early stopping may end the stage; the ETA counts to there.
        """
        self._callbacks.call("on_stage_start", self, done)
        self._saved_time = time.monotonic()
        for step in progress(range(done, total), what=self.name, total=total, initial=done, soonest=soonest):
            if self._saver is not None:
                self._saver.check()
            self._profiler.step()
            yield step

    # -- logs -----------------------------------------------------------------------------------------------------
    def write(self, step: int, metrics: dict[str, float], timings: dict[str, float] | None = None) -> None:
        """Append one line to metrics.jsonl and one, with the wall clock and ``timings``, to timings.jsonl."""
        now = time.monotonic()
        seconds, self._last_time = now - self._last_time, now
        if self._writer:
            self._log(step, metrics, seconds, timings or {})
        self._callbacks.call("on_log", self, step, metrics)

    def _log(self, step: int, metrics: dict[str, float], seconds: float, timings: dict[str, float]) -> None:
        self._append("metrics.jsonl", {"step": step, **metrics})
        clock = {"step": step, "seconds": round(seconds, 4), "time": round(time.time(), 3)}
        self._append("timings.jsonl", clock | timings)
        if self._sink is not None:
            self._sink(self.name, step, metrics | timings)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self.directory / name).open("ab") as file:
            file.write((json.dumps(record) + "\n").encode())

    # -- checkpoints ----------------------------------------------------------------------------------------------
    def save(self, trainable: Trainable, progress: Progress) -> None:
        """Write ``checkpoints/step_N`` and remove those that ``keep_last`` and ``keep_best`` do not protect.

        With ``trainer.async_save`` a thread writes while training goes on; its errors are raised here, at the next
        step, or when the stage ends.
        """
        self._flush()
        path = self.checkpoints / f"step_{progress.step}"
        state = {"progress": vars(progress), "stage": self.name, **self._identity}
        keep = {progress.best_step} if self.keeps_best else set()
        prune = partial(checkpoint.prune, self.checkpoints, keep_last=self.trainer.keep_last, keep=keep)
        self._saved_step, self._saved_time = progress.step, time.monotonic()
        if self.trainer.async_save:
            self._saver = self._saver or AsyncSaver()
            self._saver.save(path, model=trainable.model, trainable=trainable, state=state, after=prune)
        else:
            checkpoint.save_checkpoint(path, model=trainable.model, trainable=trainable, state=state)
            prune()
            runtime.barrier()
        self._callbacks.call("on_save", self, progress.step)

    def wait_for_save(self) -> None:
        """Wait until no checkpoint is being written. Raises CheckpointError when the last one failed."""
        if self._saver is not None:
            self._saver.wait()

    def save_beside(self, folder: str, write: Callable[[Path], None], progress: Progress) -> None:
        """Call ``write`` with ``FOLDER/step_N``, for data that belong to the checkpoint that ``save`` writes next.

        Waits for the previous checkpoint, because the folder keeps only one entry more than there are checkpoints.
        """
        self.wait_for_save()
        directory = self.directory / folder
        if self._writer:
            directory.mkdir(exist_ok=True)
        runtime.barrier()
        write(directory / f"step_{progress.step}")
        if self._writer:
            checkpoint.prune(directory, keep_last=self.trainer.keep_last + 1, keep=set())

    def _flush(self) -> None:
        """fsync the logs before a checkpoint of their steps is written."""
        if self._writer:
            for name in ("metrics.jsonl", "timings.jsonl"):
                if (self.directory / name).is_file():
                    with (self.directory / name).open("rb") as file:
                        os.fsync(file.fileno())

    def save_or_stop(self, save: Callable[[], None], progress: Progress) -> None:
        """At the end of a step: ``save`` when ``trainer.save_minutes`` have passed since the last checkpoint.

        Saves and raises Preempted once a signal has come or ``trainer.max_time`` is over, on any rank. The minutes are
        those of rank 0's clock, so that all ranks save after the same step.
        """
        late = self._deadline is not None and time.monotonic() > self._deadline
        reason = signals.received() or ("trainer.max_time is over" if late else "")
        stop, due = runtime.any_rank_of([bool(reason), self._minutes_are_over()])
        if stop:
            self._profiler.stop()
        if (stop or due) and self._saved_step != progress.step:
            save()
        if stop:
            self.wait_for_save()
            reason = reason or "another rank was asked to stop"
            raise Preempted(f"{reason}: {self.name} saved step {progress.step}; run the same command to continue")

    def _minutes_are_over(self) -> bool:
        minutes = self.trainer.save_minutes
        return self._writer and 0.0 < minutes <= (time.monotonic() - self._saved_time) / 60.0

    def stop_before(self, what: str) -> None:
        """Raise Preempted before ``what`` begins when any rank has received a signal; there is nothing to save."""
        reason = signals.received()
        if runtime.any_rank(bool(reason)):
            reason = reason or "another rank was asked to stop"
            raise Preempted(f"{reason}: stopped before {what}; run the same command to continue")

    def finish(self, progress: Progress, chosen_step: int) -> None:
        """Mark the stage as ended; ``chosen_step`` is the checkpoint that later stages and evaluation use."""
        self._profiler.stop()
        self.wait_for_save()
        if self._writer:
            write_json(self.directory / "done.json", {"step": progress.step, "chosen_step": chosen_step})
        runtime.barrier()
        self._callbacks.call("on_stage_end", self, progress.step)

    @property
    def chosen_checkpoint(self) -> Path:
        """The checkpoint of this finished stage that later stages and evaluation use."""
        return chosen_checkpoint(self.directory)


def monitored(trainer: TrainerConfig, ks: Sequence[int]) -> str:
    """The ranking metric on valid that decides which checkpoint is best: ``trainer.monitor``, or NDCG@max(ks)."""
    return trainer.monitor or f"ndcg@{max(ks)}"


def logged_seconds(timings: Path) -> float:
    """Sum of the seconds in a ``timings.jsonl``; an incomplete line counts 0."""
    seconds = 0.0
    for line in timings.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            seconds += float(json.loads(line).get("seconds", 0.0))
    return seconds
