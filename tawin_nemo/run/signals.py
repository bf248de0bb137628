"""Stopping on request: after a signal of Slurm or a user a run finishes its current step, saves and stops.

SIGTERM: a time limit, a preemption, ``scancel``. SIGUSR1: Slurm's ``--signal=USR1@300``, sent that many seconds before
the limit. Slurm may send either to one task only, so the ranks agree after every step
(``Stage.save_or_stop``). Until the step ends, further signals of these kinds change nothing; SIGKILL, which
follows when the grace time is over, costs the steps since the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from tawin_nemo.util.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: list[str] = []


def received() -> str:
    """Name of the first signal received inside ``listening``; empty when there was none."""
    return _received[0] if _received else ""


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Record the signals inside the block instead of ending the process. No effect outside the main thread."""
    _received.clear()
    with _handled_by(_note):
        yield


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """End the process at once on a signal inside the block, with the exit code of a stop on request (75).

    For start-up (imports, data), where there is nothing to save. No effect outside the main thread.
    """
    with _handled_by(_leave):
        yield


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _note(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if not _received:  # os.write: printing is not safe inside a handler
        os.write(2, f"{name}: this run saves after its current step and stops\n".encode())
    _received.append(name)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{signal.Signals(number).name}: stopped between stages; run the same command to continue\n".encode())
    os._exit(Preempted.exit_code)
