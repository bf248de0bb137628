"""Requests inside the engine: ``Job`` with its results, and ``AdmissionPolicy``, which decides when jobs start.

A model call costs nearly the same for one prompt as for eight. If requests were admitted one by one as they arrive,
each call would run for the newest of them alone. Waiting requests are therefore admitted together: when nothing runs,
when more requests wait than run, or after ``join_after`` model calls. Clients whose requests were answered together
send their next ones within moments of each other, so an idle engine waits up to ``gather_s`` seconds for as many
requests as were there before. A single client never waits: it is a group of one.
"""

from __future__ import annotations

import contextlib
import math
import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from tawin_nemo.config.schema import ServeConfig
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.types import Candidates, TokenRows


class Rejected(Exception):
    """The engine did not accept a request, or ended it early; ``reason`` is one of ``telemetry.REJECTIONS``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Hit:
    """One generated path: its leaf in the trie of the job's catalog, score, token ids and their log-probs."""

    leaf: int
    score: float
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class PromptResult:
    """The result for one prompt: hits by descending score, or raw ``candidates`` (one row) for a job with ``arrays``.

    ``pruned_score``: the best score among the paths that the search dropped because it ran out of beams.
    """

    hits: list[Hit]
    pruned_score: float = -math.inf
    candidates: Candidates | None = None

    def proven(self, n: int) -> bool:
        """Whether the first n hits are the exact top n (or all paths, if fewer); without length penalty only.

        A path's score only falls as the path grows, so no dropped path can end above ``pruned_score``.
        """
        if self.pruned_score == -math.inf:
            return True
        return len(self.hits) >= n and self.hits[n - 1].score >= self.pruned_score


@dataclass(frozen=True)
class JobResult:
    """The results of a job's prompts in their order, the versions that produced them, and seconds queued and run."""

    prompts: list[PromptResult]
    weight_version: int
    catalog_version: int
    queue_s: float
    run_s: float


@dataclass(eq=False)
class Job:
    """Prompts that are answered together, all with the same weights and catalog.

    ``draws`` = 0: a beam search with ``width`` beams. ``draws`` > 0: so many independent draws per prompt, with one
    seed per prompt. ``weights``: the required weight version, None = any. ``arrays``: results as arrays instead of
    hits. ``deadline``: in the clock of ``time.monotonic``. ``history``: item numbers that an auxiliary recommender may
    read (``rollout.assist``), oldest first; empty: the prompts are searched without it.
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
    history: list[int] = field(default_factory=list)
    future: Future[JobResult] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    cancelled: bool = False  # set by any thread; the engine drops the job before its next model call

    @property
    def rows(self) -> int:
        """The largest number of beam rows that the job occupies at once."""
        return len(self.prompts) * max(self.width, self.draws)

    def fail(self, error: Exception) -> None:
        """End the job with an error; no effect on a job that has ended."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def finish(self, result: JobResult) -> None:
        """End the job with its result; no effect on a job that has ended."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(result)

    def rejection(self, now: float, weights: int) -> Rejected | None:
        """Why a queued job must not start: cancelled, past its deadline, or ``weights`` is not its version."""
        if self.cancelled:
            return Rejected("aborted", "the request was aborted")
        if now >= self.deadline:
            return Rejected("deadline", "the deadline passed while the request was waiting")
        if self.weights is not None and self.weights != weights:
            text = f"weight version {self.weights} was asked for; version {weights} is in use"
            return Rejected("stale_weights", text)
        return None


@dataclass(frozen=True)
class Limits:
    """Bounds of the engine: queued requests, KV-cache tokens and beam rows in use, the waits of admission, and how many
    pairs of weights and catalog are kept behind the one in use.

    ``join_after`` = 0 and ``gather_s`` = 0 admit every request at the next model call.
    """

    queue: int
    tokens: int
    rows: int
    join_after: int = 0
    gather_s: float = 0.0
    keep_versions: int = 0

    @classmethod
    def of(cls, settings: ServeConfig) -> Limits:
        """The limits that a recipe's ``serve`` section sets."""
        return cls(
            settings.max_queue, settings.token_budget, settings.row_budget, settings.join_after,
            settings.gather_ms / 1000, settings.keep_versions,
        )  # fmt: skip


class AdmissionPolicy:
    """Decides before every model call whether the waiting requests start. Not thread-safe.

    See the module's docstring for the rule.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._group = 1  # most requests at once in the last busy period
        self._most = 1  # the same in the current busy period
        self._idle_since = 0.0
        self._skipped_calls = 0  # model calls since the first of the waiting requests arrived

    def record_call(self, ran: int, left: int, waiting: int) -> None:
        """Note a finished model call: ``ran`` requests took part, ``left`` still run, ``waiting`` are queued."""
        if not ran:
            return
        self._most = max(self._most, ran + waiting)
        if not left:
            self._group, self._most, self._idle_since = self._most, 1, time.monotonic()

    def admits(self, waiting: int, running: int) -> bool:
        """Whether the waiting requests start now; counts the model calls since the last admission."""
        if not waiting:
            return False
        if running:
            admits = waiting > running or self._skipped_calls >= self._limits.join_after
        else:
            admits = self.wait_s(waiting) <= 0
        self._skipped_calls = 0 if admits else self._skipped_calls + 1
        return admits

    def wait_s(self, waiting: int) -> float:
        """Seconds that an idle engine still waits for further requests to join the ``waiting`` ones."""
        if not waiting or waiting >= self._group:
            return 0.0
        return max(0.0, self._idle_since + self._limits.gather_s - time.monotonic())
