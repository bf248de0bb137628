"""Runs what a plan still lacks: a pool of processes, parents before children, one file per finished run."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tawin_nemo.tools.study import launch, provenance
from tawin_nemo.tools.study.launch import Busy, Command, Process
from tawin_nemo.tools.study.plan import AGAIN, Plan, Run, expected_seconds, total_seconds
from tawin_nemo.tools.study.record import RunRecord, final_stage
from tawin_nemo.util.errors import DataError, TawinError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


@dataclass
class Outcome:
    """What became of the runs that were waiting; names of runs."""

    finished: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)  # a run they start from failed


class Runner:
    """Works off ``plan.waiting`` with ``workers`` processes at once; ``find_data`` gives a run's prepared data."""

    def __init__(
        self, plan: Plan, command: Command, find_data: Callable[[Run], Path], *, workers: int, poll: float = 0.3
    ) -> None:
        self.plan, self.workers, self.outcome = plan, workers, Outcome()
        self._command, self._find_data, self._poll = command, find_data, poll
        self._records = dict(plan.records)
        self._queue = list(plan.waiting)
        self._open = {run.key for run in self._queue}  # neither finished nor failed
        self._running: list[Process] = []
        self._elsewhere: set[tuple[str, int]] = set()  # a process that an earlier, killed call has left works on them
        self._interrupts = Interrupts()

    def run(self) -> Outcome:
        """Until nothing is left to do. On Ctrl-C and SIGTERM the processes are ended first; each can be resumed."""
        total = len(self._queue)
        with self._interrupts.installed(), logging_redirect_tqdm([logging.getLogger("tawin_nemo")]):
            try:
                bar = tqdm(self._ended(), self.plan.study.file.study, total, disable=not sys.stderr.isatty())
                for place, text in enumerate(bar, 1):
                    log.info("[%d/%d] %s%s", place, total, text, self._to_go())
            finally:
                with self._interrupts.held():
                    launch.stop(self._running)
        return self.outcome

    def _ended(self) -> Iterator[str]:
        """One line for each run as it ends."""
        while self._queue or self._running:
            yield from self._start_ready()
            time.sleep(self._poll)
            for process in [process for process in self._running if process.popen.poll() is not None]:
                self._running.remove(process)
                yield self._end(process)

    def _start_ready(self) -> Iterator[str]:
        for run in list(self._queue):
            parent = run.parent_key
            if parent in self._open:
                continue
            if parent is not None and self._lost(parent):
                self._queue.remove(run)
                self._open.discard(run.key)
                self.outcome.blocked.append(run.name)
                yield f"{run.name} is not run: {parent[0]}.seed{parent[1]} failed"
            elif len(self._running) + len(self._elsewhere - {run.key}) < self.workers:
                text = self._start(run)
                if text:
                    yield text

    def _lost(self, parent: tuple[str, int]) -> bool:
        name = f"{parent[0]}.seed{parent[1]}"
        return name in self.outcome.failed or name in self.outcome.blocked

    def _start(self, run: Run) -> str | None:
        """What went wrong; None when the process runs, or when another one has to end first: then the run stays."""
        try:
            start = final_stage(run.parent_dir) if run.parent_dir else None
            if run.parent_dir and start is None:
                raise DataError(f"{run.parent_dir} holds no finished run to start from")
            command = self._command(run, self._find_data(run), start)
            with self._interrupts.held():
                self._running.append(launch.start_process(run, command))
        except Busy as busy:
            if run.key not in self._elsewhere:
                log.info("%s waits: %s (kill it to go on from its last checkpoint at once)", run.name, busy)
            self._elsewhere.add(run.key)
            return None
        except TawinError as error:
            self._leave(run)
            self._open.discard(run.key)
            self.outcome.failed.append(run.name)
            return f"{run.name} cannot start: {error}"
        self._leave(run)
        return None

    def _leave(self, run: Run) -> None:
        self._queue.remove(run)
        self._elsewhere.discard(run.key)

    def _end(self, process: Process) -> str:
        run, code = process.run, process.popen.returncode
        self._open.discard(run.key)
        problem = ""
        if code == 0:
            try:
                return self._finish(process)
            except (TawinError, OSError, ValueError, KeyError) as error:
                problem = str(error)
        lost = launch.failure(process, problem)
        lost.write(run.failed_file)
        self._commit(run.failed_file, f"Study {run.study}: {run.name} failed")
        self.outcome.failed.append(run.name)
        tail = "\n    ".join(lost.log_tail)
        return (
            f"{run.name} FAILED with exit code {code}:\n    {tail}\n  repeat it with\n    {shlex.join(process.command)}"
        )

    def _finish(self, process: Process) -> str:
        run = process.run
        record = launch.collect(process, self.plan, self._records)
        if self.plan.state[run.key] == AGAIN:
            self._compare(run, record, self._records[run.key])
        else:
            record.write(run.file)
            self._records[run.key] = record
            self._commit(run.file, f"Study {run.study}: {run.name}")
        if run.failed_file.is_file():
            run.failed_file.unlink()
            self._commit(run.failed_file, f"Study {run.study}: {run.name} has succeeded")
        self.outcome.finished.append(run.name)
        split, result = next(iter(record.splits.items()))
        means = "  ".join(f"{name} {value:.4f}" for name, value in result.means.items() if name.startswith("recall"))
        return f"{run.name}  {split}: {means}  {record.wall_s / 60:.1f} min"

    def _compare(self, run: Run, again: RunRecord, stored: RunRecord) -> None:
        """A run that was made again for its weights must be the same one."""
        for name, split in stored.splits.items():
            if name in again.splits and again.splits[name].means != split.means:
                log.warning("%s: %s differs from the run file; its children start from other weights", run.name, name)

    def _commit(self, path: Path, message: str) -> None:
        if self.plan.study.file.commit:
            provenance.commit_file(path, message)

    def _to_go(self) -> str:
        waiting = [run for run in self.plan.waiting if run.key in self._open]
        seconds = total_seconds([expected_seconds(run, self._records) for run in waiting], self.workers)
        return f"  ({seconds / 60:.1f} min to go)" if waiting and seconds is not None else ""


class Interrupts:
    """SIGINT and SIGTERM (a scheduler's, a shutdown's) raise KeyboardInterrupt, but not in the middle of ``held``.

    A process that has just been started must be known before anything is interrupted, or nobody would end it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._held = self._pending = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._interrupt) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._held:
            raise KeyboardInterrupt
        self._pending = True
