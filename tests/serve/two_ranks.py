"""Two ranks of one server as two threads: a leader with its engine, and a follower, over queues."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tawin_nemo.serve.engine.ranks import follow
from tawin_nemo.serve.engine.replica import Replica

LIMIT_S = 20


@dataclass
class Wire:
    """What connects the two ranks."""

    down: queue.Queue[bytes] = field(default_factory=queue.Queue)
    meet: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=LIMIT_S))
    problems: list[str] = field(default_factory=lambda: ["", ""])
    tensors: queue.Queue[Tensor] = field(default_factory=queue.Queue)


@dataclass
class OneOfTwo:
    """The ``Ranks`` of rank 0 or 1. A rank that does not come to a collective raises RuntimeError on the other."""

    wire: Wire
    rank: int
    size: int = 2

    def send(self, data: bytes) -> None:
        self.wire.down.put(data)

    def receive(self) -> bytes:
        return self.wire.down.get(timeout=600)

    def barrier(self) -> None:
        self.wire.meet.wait()  # BrokenBarrierError is a RuntimeError

    def first_problem(self, problem: str) -> str:
        self.wire.problems[self.rank] = problem
        self.wire.meet.wait()
        first = next((text for text in self.wire.problems if text), "")
        self.wire.meet.wait()
        return first

    def broadcast_tensor(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if tensor is None:
            return self.wire.tensors.get(timeout=LIMIT_S)
        self.wire.tensors.put(tensor)
        return tensor


@contextmanager
def following(replica: Replica) -> Iterator[tuple[OneOfTwo, Callable[[], BaseException | None]]]:
    """The ``Ranks`` of rank 0 while a thread follows with ``replica``; and what ended that thread, if anything did."""
    wire, ended = Wire(), []

    def run() -> None:
        try:
            follow(replica, OneOfTwo(wire, 1))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield OneOfTwo(wire, 0), lambda: ended[0] if ended else None
    thread.join(LIMIT_S)
