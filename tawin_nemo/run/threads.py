"""CPU threads of a process: how many it may use, and how many are fastest for the steps that it runs.

Threads meet at a barrier after every operation. A small model has thousands of short operations a step, so a thread
that another program holds up for a moment holds up all of them: beside one busy process on two cores, two threads can
be several times slower than one. No rule on sizes sees such neighbours, so ``ThreadTuner`` measures: it runs a few
steps with every number of threads that may be best, keeps the best one, and measures again when steps become slow.

Threads never wait actively: ``cli.main`` sets ``OMP_WAIT_POLICY=PASSIVE`` (unless it is set) before torch is imported,
because OpenMP reads its environment once.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from tawin_nemo.util.launch import ranks_of_node
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: Steps that one number of threads is measured for; their median counts.
STEPS_EACH = 3
#: Steps before the first measurement: allocations and caches of the first ones say nothing about later ones.
WARM_UP = 2
#: More threads must be at least this much faster than fewer, which leave the other cores to others.
MARGIN = 1.05
#: A measurement is repeated when the median of the newest ``WINDOW`` steps is ``SLOWER`` times what was measured ...
SLOWER, WINDOW = 1.5, 8
#: ... but not before this many steps have passed: repeated measurements must not become the work.
STEPS_BETWEEN = 50


def available_threads(
    env: Mapping[str, str] | None = None, cores: int | None = None, machine: int | None = None
) -> int:
    """Threads that this process may use: its cores, shared fairly with the other ranks of its node; at least 1.

    ``OMP_NUM_THREADS`` is an upper bound. Under srun, cores that are bound to the task are its own; unbound ones, and
    all cores under torchrun, are divided by the ranks of the node. ``cores`` (of this process) and ``machine`` (all)
    are read from the system unless given.
    """
    env = os.environ if env is None else env
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    machine = (os.cpu_count() or cores) if machine is None else machine
    bound = bool(env.get("SLURM_STEP_ID")) and "RANK" not in env and cores < machine
    own = cores if bound else cores // max(1, ranks_of_node(env))
    if asked := env.get("SLURM_CPUS_PER_TASK", ""):
        own = min(own, int(asked)) if own else int(asked)
    if limit := env.get("OMP_NUM_THREADS", "").split(",")[0]:
        own = min(own, int(limit))
    return max(1, own)


@dataclass(frozen=True)
class Measured:
    """Seconds of a step with so many threads, by their median."""

    threads: int
    seconds: float


class ThreadTuner:
    """Sets torch's number of threads from the seconds of past steps; ``observe`` each step's seconds.

    ``fixed`` above 0 (``trainer.threads``) is set once and never changed. Otherwise numbers from ``limit`` downwards by
    halves are tried until one is clearly slower than the best so far.
    """

    def __init__(
        self,
        fixed: int,
        limit: int,
        *,
        what: str,
        set_threads: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        self._what, self._set = what, set_threads
        self._limit = limit
        self._results: list[Measured] = []
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._since_choice = 0
        self._best: Measured | None = None
        self._trying = 0  # the number under measurement; 0 = none
        if not fixed and limit > 1:
            self._try(limit, discard=WARM_UP)
        else:
            self._use(fixed or limit)

    def observe(self, seconds: float) -> None:
        """Take the duration of the step that just ended."""
        if self._trying:
            self._measure(seconds)
        elif self._best is not None:
            self._watch(seconds)

    def _try(self, threads: int, *, discard: int) -> None:
        self._trying, self._discard = threads, discard
        self._seconds.clear()
        self._use(threads)

    def _use(self, threads: int) -> None:
        self.threads = threads
        self._set(threads)

    def _measure(self, seconds: float) -> None:
        if self._discard:
            self._discard -= 1
            return
        self._seconds.append(seconds)
        if len(self._seconds) < STEPS_EACH:
            return
        self._results.append(Measured(self._trying, statistics.median(self._seconds)))
        best = min(self._results, key=lambda result: result.seconds)
        if self._trying > 1 and self._results[-1].seconds <= MARGIN * best.seconds:
            self._try(max(1, self._trying // 2), discard=1)
        else:
            self._choose(best)

    def _choose(self, fastest: Measured) -> None:
        self._best = min(
            (result for result in self._results if result.seconds <= MARGIN * fastest.seconds),
            key=lambda result: result.threads,
        )
        tried = ", ".join(f"{result.threads}: {result.seconds:.3g} s" for result in self._results)
        log.info("%s: %d CPU threads (a step with %s)", self._what, self._best.threads, tried)
        self._results, self._trying, self._since_choice = [], 0, 0
        self._seconds.clear()
        self._use(self._best.threads)

    def _watch(self, seconds: float) -> None:
        assert self._best is not None
        self._seconds.append(seconds)
        self._since_choice += 1
        now = statistics.median(self._seconds)
        if self._since_choice >= STEPS_BETWEEN and now > SLOWER * self._best.seconds:
            log.info(
                "%s: steps take %.3g s instead of %.3g s; measuring the CPU threads again",
                self._what, now, self._best.seconds,
            )  # fmt: skip
            self._try(self._limit, discard=0)


def stage_tuner(fixed: int, *, what: str) -> ThreadTuner:
    """The tuner of a stage: ``fixed`` threads, else measured where this is the only rank and it computes on the CPU.

    Several ranks wait for each other in every step, so that none could tell its own threads from its neighbours'; on a
    GPU the CPU's threads only launch kernels. Both keep ``available_threads``.
    """
    limit = available_threads()
    measures = not torch.cuda.is_available() and ranks_of_node() == 1
    return ThreadTuner(fixed if fixed or measures else limit, limit, what=what)


def timed_steps(steps: range, tuner: ThreadTuner) -> Iterator[int]:
    """The steps, each timed for ``tuner`` from its start to the request for the next one."""
    for step in steps:
        start = time.perf_counter()
        yield step
        tuner.observe(time.perf_counter() - start)
