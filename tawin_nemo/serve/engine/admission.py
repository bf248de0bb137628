"""When waiting requests join: a model call costs nearly the same for one prompt as for eight.

With requests let in one by one as they come, each call runs for the newest of them alone. So those that wait join
together: when nothing runs, when they are more than those that run, or when ``join_after`` model calls went by without
them. And where a group of requests was answered at once, its clients' next ones follow within moments of each other:
with nothing left to run the engine waits for as many again, at most ``gather_s``. A single client never waits: it is a
group of one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tawin_nemo.config.schema import ServeConfig


@dataclass(frozen=True)
class Limits:
    """What may wait and run at once, and how long requests wait to join together (0 and 0: not at all)."""

    queue: int
    tokens: int
    rows: int
    join_after: int = 0
    gather_s: float = 0.0

    @classmethod
    def of(cls, settings: ServeConfig) -> Limits:
        return cls(
            settings.max_queue, settings.token_budget, settings.row_budget, settings.join_after,
            settings.gather_ms / 1000,
        )  # fmt: skip


class Gate:
    """Told of every model call, asked before it. Not safe for threads by itself."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._group, self._most = 1, 1  # requests there at once: in the last busy time, and in this one so far
        self._idle_since = 0.0
        self._passed = 0  # model calls that the first of the waiting was not let into

    def called(self, ran: int, left: int, waiting: int) -> None:
        """A model call is over: so many requests ran in it, run on, and wait."""
        if not ran:
            return
        self._most = max(self._most, ran + waiting)
        if not left:
            self._group, self._most, self._idle_since = self._most, 1, time.monotonic()

    def opens(self, waiting: int, running: int) -> bool:
        """Whether those that wait join now; the next ones are counted anew then."""
        if not waiting:
            return False
        if running:
            opens = waiting > running or self._passed >= self._limits.join_after
        else:
            opens = self.seconds(waiting) <= 0
        self._passed = 0 if opens else self._passed + 1
        return opens

    def seconds(self, waiting: int) -> float:
        """How long an engine with nothing to run still waits for more than these."""
        if not waiting or waiting >= self._group:
            return 0.0
        return max(0.0, self._idle_since + self._limits.gather_s - time.monotonic())
