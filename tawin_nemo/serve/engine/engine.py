"""The engine: one thread owns the model, admits waiting requests, runs decoding steps and delivers results.

Requests of different clients share model calls if they use the same weights, catalog and score space. A request keeps
the catalog that it was tokenized with, and the newest weights of that catalog's generation when it starts, until it
ends, so that an update only changes what is current. Versions that no request uses any more are released.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from tawin_nemo.models.megatron.parallel.channel import Stop
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.history import History
from tawin_nemo.serve.engine.jobs import AdmissionPolicy, Job, Limits, Rejected
from tawin_nemo.serve.engine.messages import Probe, Release
from tawin_nemo.serve.engine.ranks import Leader, RanksLost
from tawin_nemo.serve.engine.running import Running
from tawin_nemo.serve.engine.swaps import VersionSwaps
from tawin_nemo.serve.engine.telemetry import Metrics
from tawin_nemo.util.log import get_logger

T = TypeVar("T")
log = get_logger(__name__)

#: Seconds between heartbeats to the other ranks while the engine is idle.
HEARTBEAT_S = 0.5


class Engine(VersionSwaps):
    """Queues jobs, runs them on its own thread, and swaps weights and catalogs. All public methods are thread-safe.

    ``weights``: version of the weights that are loaded at the start; ``on_thread``: called once on the engine's thread
    before anything else, to select the device.
    """

    def __init__(
        self, leader: Leader, catalog: ServedCatalog, *, limits: Limits, metrics: Metrics, weights: int,
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.leader, self.limits, self.metrics = leader, limits, metrics
        self.history = History(weights, catalog, keep=limits.keep_versions)
        self.failed: Future[None] = Future()  # completes when the engine ends, with the error if one ended it
        self._on_thread = on_thread
        self._wake = threading.Condition()
        self._queue: deque[Job] = deque()
        self._open: set[Job] = set()  # accepted and not finished
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running, self._admission = Running(leader, metrics), AdmissionPolicy(limits)
        self._installed = {catalog.version: catalog}
        self._closed, self._stopping = "", False
        self._swap = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._show_versions()

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    @property
    def weights(self) -> int:
        """The version of the weights in use."""
        return self.history.current.weights

    @property
    def catalog(self) -> ServedCatalog:
        """The catalog in use."""
        return self.history.current.catalog

    @property
    def closed(self) -> str:
        """Why requests are rejected: ``paused`` or ``draining``; empty while they are accepted."""
        return self._closed

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Rejected (queue_full, paused, draining, fault, stale_catalog)."""
        with self._wake:
            if self.failed.done():
                raise Rejected("fault", "the engine has stopped")
            if self._closed:
                raise Rejected(self._closed, f"the server is {self._closed}; try again later")
            if len(self._queue) >= self.limits.queue:
                raise Rejected("queue_full", f"{len(self._queue)} requests are waiting already; try again later")
            if job.catalog.version not in self._installed:
                raise Rejected("stale_catalog", "the catalog was replaced while the request was parsed")
            self._queue.append(job)
            self._open.add(job)
            self.metrics.queued.set(len(self._queue))
            self._wake.notify()
        job.future.add_done_callback(lambda future: self._open.discard(job))

    def cancel(self, job: Job) -> None:
        """Remove a job before the next model call; its future ends with Rejected (aborted)."""
        job.cancelled = True
        with self._wake:
            if job in self._queue:
                self._queue.remove(job)
                self.metrics.queued.set(len(self._queue))
                job.fail(Rejected("aborted", "the request was aborted"))
            self._wake.notify()

    def close(self, reason: str) -> None:
        """Reject further requests with ``reason`` (``paused`` or ``draining``); accepted ones continue."""
        with self._wake:
            if self._closed != "draining":
                self._closed = reason

    def open(self) -> None:
        """Accept requests again after a pause. Raises Rejected while draining."""
        with self._wake:
            if self._closed == "draining":
                raise Rejected("draining", "the server is draining and will end; start another one")
            self._closed = ""

    def wait_idle(self, seconds: float) -> bool:
        """Wait up to ``seconds`` until no request waits or runs; whether that is so."""
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end and not self.failed.done():
            time.sleep(0.01)
        return not self.busy

    def abort(self) -> int:
        """Abort all waiting and running requests; returns their number. Raises Rejected when the engine has ended."""
        return self.call(self._abort).result()

    def _abort(self) -> int:
        for job in (jobs := list(self._open)):
            job.cancelled = True  # removed later in this iteration
        return len(jobs)

    @property
    def busy(self) -> int:
        """How many requests were accepted and have not ended."""
        return len(self._open)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine's thread between two model calls; the future gets its result or error."""
        future: Future[T] = Future()
        with self._wake:
            if self.failed.done():
                future.set_exception(Rejected("fault", "the engine has stopped"))
                return future
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def probe(self) -> Future[Any]:
        """A future that completes when every rank has responded."""
        return self.call(lambda: self.leader.apply(Probe()))

    def stop(self) -> None:
        """End the engine's thread and the other ranks; requests that still run fail with Rejected (fault)."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._on_thread()
            while not self._stopping:
                self._iterate()
            self.leader.apply(Stop())
            self._end(None)
        except Exception as error:
            log.exception("the engine ends with an error")
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        with self._wake:
            self.failed.set_exception(error) if error else self.failed.set_result(None)
            jobs, calls = list(self._open), [*self._calls]
            self._queue.clear()
            self._calls.clear()
        stopped = Rejected("fault", "the engine has stopped")
        for job in jobs:
            job.fail(stopped)
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(stopped)

    def _iterate(self) -> None:
        with self._wake:
            if not (self._queue or self._calls or self._running.jobs or self._stopping):
                notified = self._wake.wait(HEARTBEAT_S if self.leader.ranks.size > 1 else None)
                if not notified:
                    self.leader.apply(Probe())
            self._gather()
            calls = [*self._calls]
            self._calls.clear()
        for function, future in calls:
            self._execute(function, future)
        self._running.drop_unwanted()
        if self._admission.admits(len(self._queue), ran := len(self._running.jobs)):
            self._begin(self._next_jobs())
            ran = len(self._running.jobs)
        self._running.advance()
        self._admission.record_call(ran, len(self._running.jobs), len(self._queue))
        self._release_versions()

    def _begin(self, jobs: list[Job]) -> None:
        """Start jobs, each with the weights of its catalog's generation."""
        for weights in dict.fromkeys(self.history.weights_for(job.catalog) for job in jobs):
            self._running.begin([job for job in jobs if self.history.weights_for(job.catalog) == weights], weights)

    def _gather(self) -> None:
        """While idle, wait for requests that are likely to arrive together. The caller holds ``_wake``."""
        while not (self._running.jobs or self._calls or self._stopping):
            if (seconds := self._admission.wait_s(len(self._queue))) <= 0:
                return
            self._wake.wait(seconds)

    def _execute(self, function: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():  # the caller has cancelled it
            return
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
            if isinstance(error, RanksLost):  # after every other error all ranks still have the state before
                raise

    def _next_jobs(self) -> list[Job]:
        """Remove jobs from the head of the queue, as many as fit into the limits; at least one when none runs."""
        now = time.monotonic()
        admitted: list[Job] = []
        tokens = self.limits.tokens - self.leader.replica.held()
        rows = self.limits.rows - self._running.rows
        with self._wake:
            while self._queue:
                job = self._queue[0]
                weights = self.history.weights_for(job.catalog)
                if (error := job.rejection(now, weights)) is not None:
                    self._queue.popleft()
                    job.fail(error)
                    continue
                cost = self._running.cost(job, weights)
                if (cost > tokens or job.rows > rows) and (admitted or self._running.jobs):
                    break
                self._queue.popleft()
                admitted.append(job)
                tokens, rows = tokens - cost, rows - job.rows
            self.metrics.queued.set(len(self._queue))
        return admitted

    def _release_versions(self) -> None:
        replica, history = self.leader.replica, self.history
        if len(replica.models) == len(history.kept_weights) and len(replica.tries) == len(history.kept_catalogs):
            return
        with self._wake:
            jobs = [*self._queue, *self._running.jobs]
            catalogs = history.kept_catalogs | {job.catalog.version for job in jobs}
            self._installed = {version: item for version, item in self._installed.items() if version in catalogs}
            awaited = {history.weights_for(catalog) for catalog in self._installed.values()}
            weights = history.kept_weights | set(self._running.weights) | awaited
        unused = Release(sorted(replica.models.keys() - weights), sorted(replica.tries.keys() - catalogs))
        if unused.weights or unused.catalogs:
            self.leader.apply(unused)
        self._show_versions()

    def _show_versions(self) -> None:
        catalog, held = self.catalog, (len(self.leader.replica.models), len(self.leader.replica.tries))
        self.metrics.show(weights=self.weights, catalog=catalog.version, items=catalog.trie.num_items, held=held)
