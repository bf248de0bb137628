"""Checkpoints written by a thread while training goes on.

The calling thread copies the shards to CPU memory and returns; the thread writes the same files as a synchronous save,
takes their checksums and renames. It talks to the other ranks over a gloo group of its own, so that its messages never
mix with training's. At most one save is in flight.

A thread, not megatron-core's forked writers: forking a process that runs threads (and a CUDA context) is unsafe, and
its writers are collected through a spawned manager that re-imports the main module. Writing and hashing release the
interpreter's lock.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from tawin_nemo.models.megatron.checkpoint.checkpoint import begin_save
from tawin_nemo.models.megatron.checkpoint.files import Ranks
from tawin_nemo.models.megatron.checkpoint.sharded_state import HasOptimizer
from tawin_nemo.models.megatron.parallel.groups import time_limit
from tawin_nemo.util.errors import CheckpointError

_savers: weakref.WeakSet[AsyncSaver] = weakref.WeakSet()


class AsyncSaver:
    """Every rank makes one and calls ``save`` at the same steps; making it is collective."""

    def __init__(self) -> None:
        group = dist.new_group(backend="gloo", timeout=time_limit()) if dist.is_initialized() else None
        self._ranks = Ranks(group)
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint", initializer=_on_device, initargs=_device()
        )
        self._running: Future[None] | None = None
        _savers.add(self)

    def save(
        self,
        path: Path,
        *,
        model: GPTModel,
        trainable: HasOptimizer | None = None,
        state: dict,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """``save_checkpoint`` with the writing left to the thread, then ``after()`` in the thread.

        Waits for the save before it. Raises CheckpointError when that one failed.
        """
        self.wait()
        finish = begin_save(path, model=model, trainable=trainable, state=state, ranks=self._ranks, snapshot=True)

        def rest() -> None:
            finish()
            after()

        self._running = self._thread.submit(rest)

    def check(self) -> None:
        """Raises CheckpointError when the save in flight has failed; never waits."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is in flight. Raises CheckpointError when the last save failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def drain() -> None:
    """Wait for every saver and ignore its errors; called before the process groups are destroyed after an error."""
    for saver in list(_savers):
        with contextlib.suppress(CheckpointError, OSError, RuntimeError):
            saver.wait()


def _device() -> tuple[int | None]:
    return (torch.cuda.current_device() if torch.cuda.is_available() else None,)


def _on_device(device: int | None) -> None:
    """Select this rank's GPU: a new thread starts on GPU 0."""
    if device is not None:
        torch.cuda.set_device(device)
