"""A thread that writes metrics to one sink, so that a slow or broken network costs a training step nothing."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: Lines that may wait for a sink; further ones are dropped, and counted.
MOST_WAITING = 10_000
#: Seconds that a sink gets at the end of a run for what still waits.
CLOSING_S = 30.0


@dataclass(frozen=True)
class Line:
    """What one step of one stage logs; ``time`` in seconds since 1970."""

    stage: str
    step: int
    metrics: dict[str, float]
    time: float = field(default_factory=time.time)


class Sink(Protocol):
    """Writes lines to one place. Both methods are called from one thread and may raise anything."""

    def write(self, lines: Sequence[Line]) -> None:
        """Write some lines, oldest first; at least one."""

    def close(self) -> None:
        """Finish; nothing is written after that."""


class Worker:
    """Hands lines to a sink in a thread; errors of the sink are logged, the first of each kind."""

    def __init__(self, name: str, sink: Sink, *, waiting: int = MOST_WAITING) -> None:
        self._name, self._sink = name, sink
        self._queue: queue.Queue[Line | None] = queue.Queue(waiting)
        self._received, self._written, self._told = 0, 0, set[str]()
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def __call__(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Accept a line; one that finds the queue full is dropped."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        self._received += 1
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(Line(stage, step, numbers))

    def close(self, limit: float = CLOSING_S) -> None:
        """Wait for the lines that are not written yet, at most ``limit`` seconds, and close the sink."""
        end = time.monotonic() + limit
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=limit)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._written < self._received:
            lost = self._received - self._written
            log.warning("metric sink %s: %d of %d lines were not written", self._name, lost, self._received)

    def _work(self) -> None:
        taken: list[Line | None] = []
        while None not in taken:
            taken = [self._queue.get()]
            while not self._queue.empty():
                taken.append(self._queue.get())
            lines = [line for line in taken if line is not None]
            if lines and self._succeeds(partial(self._sink.write, lines)):
                self._written += len(lines)
        self._succeeds(self._sink.close)

    def _succeeds(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:
            if type(error).__name__ not in self._told:
                self._told.add(type(error).__name__)
                log.warning("metric sink %s: %s: %s (the run goes on)", self._name, type(error).__name__, error)
            return False
        return True
