"""What a request asks of the engine, and what becomes of it."""

from __future__ import annotations

import contextlib
import math
import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.types import Candidates, TokenRows


class Rejected(Exception):
    """The engine does not take, or gave up, a request; ``reason`` is a word of ``metrics.REJECTIONS``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Hit:
    """One answer: a leaf of the job's catalog with its tokens."""

    leaf: int
    score: float
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Ran:
    """One prompt's answers, best first; ``lost``: best score of what the search gave up for want of beams.

    ``found``: as the search gave them, one row, where the job asks for arrays; there are no hits then.
    """

    hits: list[Hit]
    lost: float = -math.inf
    found: Candidates | None = None

    def proven(self, n: int) -> bool:
        """The first n are the n best there are (all, if there are fewer); needs a search without length penalty."""
        return self.lost == -math.inf or (len(self.hits) >= n and self.hits[n - 1].score >= self.lost)


@dataclass(frozen=True)
class Done:
    """All of a job's prompts in order, and the one pair of versions that they were answered with."""

    prompts: list[Ran]
    weight_version: int
    catalog_version: int
    queue_s: float
    run_s: float


@dataclass(eq=False)
class Job:
    """B prompts that are answered together, with one pair of versions.

    ``draws`` 0 is a search with ``width`` beams; otherwise so many independent draws are made, one seed per prompt.
    ``weights`` asks for one weight version, ``arrays`` for answers as arrays. ``deadline`` is a reading of
    ``time.monotonic``.
    """

    catalog: ServedCatalog
    prompts: TokenRows
    deadline: float
    width: int = 1
    space: str = "trie"
    filter: ItemFilter | None = None
    weights: int | None = None
    draws: int = 0
    temperature: float = 1.0
    seeds: list[int] = field(default_factory=list)
    arrays: bool = False
    future: Future[Done] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    cancelled: bool = False  # set by any thread; the engine drops the job before its next model call

    @property
    def rows(self) -> int:
        """Beam rows that the job may have running at once."""
        return len(self.prompts) * max(self.width, self.draws)

    def fail(self, error: Exception) -> None:
        """Tell whoever waits; a second word on the same job is not heard."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def finish(self, done: Done) -> None:
        """As ``fail``, with the answers."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(done)


def job_over(job: Job, now: float, weights: int) -> Rejected | None:
    """Why a job need not be run, if so."""
    if job.cancelled:
        return Rejected("aborted", "the request was given up")
    if now >= job.deadline:
        return Rejected("deadline", "the deadline passed while the request was waiting")
    if job.weights is not None and job.weights != weights:
        return Rejected("stale_weights", f"weight version {job.weights} was asked for; version {weights} is in use")
    return None
