"""One thread owns the model: it lets waiting requests join, advances all of them by one model call, and answers.

Requests of different clients share model calls as long as they run on the same weights, catalog and score space.
A request gets the weights that are current when it begins to run and the catalog that it was tokenised with, and
keeps both to its end; a swap is only a change of what is current. Versions that nobody runs on are forgotten.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from tawin_nemo.models.megatron.parallel.channel import Stop
from tawin_nemo.rollout.lm import LM
from tawin_nemo.serve.engine.admission import Gate, Limits
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.jobs import Job, Rejected, job_over
from tawin_nemo.serve.engine.messages import Forget, Probe, PutCatalog
from tawin_nemo.serve.engine.metrics import Metrics
from tawin_nemo.serve.engine.ranks import Leader
from tawin_nemo.serve.engine.running import Running
from tawin_nemo.serve.engine.weight_sources import Source
from tawin_nemo.util.errors import TawinError
from tawin_nemo.util.log import get_logger

T = TypeVar("T")
log = get_logger(__name__)

#: Seconds between signs of life to the other ranks while nothing is to do.
HEARTBEAT = 0.5


class Engine:
    """Start with ``start``; every public method may be called from any thread."""

    def __init__(
        self, leader: Leader, catalog: ServedCatalog, *, limits: Limits, metrics: Metrics, weights: int,
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.leader, self.limits, self.metrics = leader, limits, metrics
        self.catalog, self.weights = catalog, weights
        self.failed: Future[None] = Future()  # ends when the engine does; with the error, if one ended it
        self._on_thread = on_thread
        self._wake = threading.Condition()
        self._queue: deque[Job] = deque()
        self._open: set[Job] = set()  # taken and not answered yet
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running, self._gate = Running(leader, metrics), Gate(limits)
        self._installed = {catalog.version: catalog}
        self._closed, self._stopping = "", False
        self._swap = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._show_versions()

    def start(self) -> None:
        self._thread.start()

    # -- requests -----------------------------------------------------------------------------------------------
    @property
    def closed(self) -> str:
        """Why no request is taken: paused, draining, or empty."""
        return self._closed

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises Rejected (queue_full, paused, draining, fault, stale_catalog) at once."""
        with self._wake:
            if self.failed.done():
                raise Rejected("fault", "the engine has stopped")
            if self._closed:
                raise Rejected(self._closed, f"the server is {self._closed}; try again later")
            if len(self._queue) >= self.limits.queue:
                raise Rejected("queue_full", f"{len(self._queue)} requests are waiting already; try again later")
            if job.catalog.version not in self._installed:
                raise Rejected("stale_catalog", "the catalog was replaced while the request was read")
            self._queue.append(job)
            self._open.add(job)
            self.metrics.queued.set(len(self._queue))
            self._wake.notify()
        job.future.add_done_callback(lambda future: self._open.discard(job))

    def cancel(self, job: Job) -> None:
        """The job leaves before the next model call; its future ends with Rejected."""
        job.cancelled = True
        with self._wake:
            if job in self._queue:
                self._queue.remove(job)
                self.metrics.queued.set(len(self._queue))
                job.fail(Rejected("aborted", "the request was given up"))
            self._wake.notify()

    # -- control ------------------------------------------------------------------------------------------------
    def close(self, reason: str) -> None:
        """Take no further requests (``paused`` or ``draining``); those that are here go on."""
        with self._wake:
            if self._closed != "draining":
                self._closed = reason

    def open(self) -> None:
        """Take requests again after a pause. Raises Rejected while draining."""
        with self._wake:
            if self._closed == "draining":
                raise Rejected("draining", "the server is draining and will end; start another one")
            self._closed = ""

    def wait_idle(self, seconds: float) -> bool:
        """Whether nothing waits or runs any more, within so many seconds."""
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end and not self.failed.done():
            time.sleep(0.01)
        return not self.busy

    def abort(self) -> int:
        """Give up everything that waits or runs; the number of requests."""
        return self.call(self._abort).result()

    def _abort(self) -> int:
        jobs = list(self._open)
        for job in jobs:
            job.cancelled = True  # they leave later in this turn
        return len(jobs)

    @property
    def busy(self) -> int:
        """Requests that were taken and not answered yet."""
        return len(self._open)

    def call(self, what: Callable[[], T]) -> Future[T]:
        """Run something on the engine's thread, between two model calls."""
        future: Future[T] = Future()
        with self._wake:
            if self.failed.done():
                future.set_exception(Rejected("fault", "the engine has stopped"))
                return future
            self._calls.append((what, future))
            self._wake.notify()
        return future

    def probe(self) -> Future[Any]:
        """Ends well when every rank has answered."""
        return self.call(lambda: self.leader.apply(Probe()))

    def next_weights(self, version: int | None) -> int:
        """What new weights will be called (default: one more). Raises Rejected for a version that is not newer."""
        new = self.weights + 1 if version is None else version
        if new <= self.weights:
            raise Rejected("invalid", f"weight_version {new} is not newer than {self.weights}, the one in use")
        return new

    def update_weights(self, source: Source, version: int | None = None) -> int:
        """Load weights beside those in use and make them current; the new version as ``next_weights``.

        A process alone reads them in the caller's thread while requests go on; ranks that share a model read them
        together between two model calls. Raises TawinError as loading does, Rejected for a version that is not newer.
        """
        with self._swap:
            new, leader = self.next_weights(version), self.leader
            model = source.alone(leader.replica) if leader.ranks.size == 1 else None
            self.call(lambda: self._put_weights(new, source, model)).result()
            return new

    def _put_weights(self, version: int, source: Source, model: LM | None) -> None:
        if model is None:
            source.together(self.leader, version)
        else:
            self.leader.replica.models[version] = model
        self.weights = version
        self.metrics.swaps.labels("weights").inc()

    def activate(self, catalog: ServedCatalog) -> None:
        """Make a catalog current for all requests that come from now on."""
        with self._swap:
            order = PutCatalog(catalog.version, catalog.trie_paths)  # here: it takes a while for many items
            self.call(lambda: self._put_catalog(order, catalog)).result()

    def _put_catalog(self, order: PutCatalog, catalog: ServedCatalog) -> None:
        self.leader.put_catalog(order, catalog.trie)
        with self._wake:
            self._installed[catalog.version] = catalog
            self.catalog = catalog
        self.metrics.swaps.labels("catalog").inc()

    def stop(self) -> None:
        """End the thread and let the other ranks go; what still runs is given up."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    # -- the thread ---------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            self._on_thread()
            while not self._stopping:
                self._turn()
            self.leader.apply(Stop())
            self._end(None)
        except Exception as error:
            log.exception("the engine ends with an error")
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        with self._wake:
            self.failed.set_exception(error) if error else self.failed.set_result(None)
            left, calls = list(self._open), [*self._calls]
            self._queue.clear()
            self._calls.clear()
        gone = Rejected("fault", "the engine has stopped")
        for job in left:
            job.fail(gone)
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(gone)

    def _turn(self) -> None:
        with self._wake:
            if not (self._queue or self._calls or self._running.jobs or self._stopping):
                waited = self._wake.wait(HEARTBEAT if self.leader.ranks.size > 1 else None)
                if not waited:
                    self.leader.apply(Probe())
            self._gather()
            calls = [*self._calls]
            self._calls.clear()
        for what, future in calls:
            self._answer(what, future)
        self._running.drop_unwanted()
        if self._gate.opens(len(self._queue), ran := len(self._running.jobs)):
            self._running.begin(self._next_jobs(), self.weights)
            ran = len(self._running.jobs)
        self._running.advance()
        self._gate.called(ran, len(self._running.jobs), len(self._queue))
        self._forget()

    def _gather(self) -> None:
        """With nothing to run, wait for the requests that are likely to come together; under ``_wake``."""
        while not (self._running.jobs or self._calls or self._stopping):
            if (seconds := self._gate.seconds(len(self._queue))) <= 0:
                return
            self._wake.wait(seconds)

    def _answer(self, what: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():  # whoever asked has stopped waiting
            return
        try:
            future.set_result(what())
        except Exception as error:
            future.set_exception(error)
            if self.leader.ranks.size > 1 and not isinstance(error, TawinError):  # that one all ranks have alike
                raise

    def _next_jobs(self) -> list[Job]:
        """Jobs from the head of the queue, as many as fit beside those that run; at least one when none runs."""
        now = time.monotonic()
        taken: list[Job] = []
        tokens = self.limits.tokens - self.leader.replica.held()
        rows = self.limits.rows - self._running.rows
        with self._wake:
            while self._queue:
                job = self._queue[0]
                if (error := job_over(job, now, self.weights)) is not None:
                    self._queue.popleft()
                    job.fail(error)
                    continue
                cost = self._running.cost(job, self.weights)
                if (cost > tokens or job.rows > rows) and (taken or self._running.jobs):
                    break
                self._queue.popleft()
                taken.append(job)
                tokens, rows = tokens - cost, rows - job.rows
            self.metrics.queued.set(len(self._queue))
        return taken

    def _forget(self) -> None:
        replica = self.leader.replica
        if len(replica.models) == 1 and len(replica.tries) == 1:
            return
        with self._wake:
            jobs = [*self._queue, *self._running.jobs]
            weights = {self.weights, *self._running.weights}
            catalogs = {self.catalog.version, *(job.catalog.version for job in jobs)}
            self._installed = {version: item for version, item in self._installed.items() if version in catalogs}
        gone = Forget(sorted(replica.models.keys() - weights), sorted(replica.tries.keys() - catalogs))
        if gone.weights or gone.catalogs:
            self.leader.apply(gone)
        self._show_versions()

    def _show_versions(self) -> None:
        self.metrics.weight_version.set(self.weights)
        self.metrics.catalog_version.set(self.catalog.version)
        self.metrics.items.set(self.catalog.trie.num_items)
        self.metrics.versions.labels("weights").set(len(self.leader.replica.models))
        self.metrics.versions.labels("catalogs").set(len(self.leader.replica.tries))
