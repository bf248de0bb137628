"""Runs what a plan still lacks: a pool of processes, parents before children, the files of each finished run."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tawin_nemo.tools.study import launch, provenance
from tawin_nemo.tools.study.launch import Busy, Command, Process
from tawin_nemo.tools.study.plan import AGAIN, Plan, Run, expected_seconds, parent_run, recipe_hash, total_seconds
from tawin_nemo.tools.study.record import FailedRun, RunRecord, final_stage, ranks_file, read_stage
from tawin_nemo.util.errors import DataError, TawinError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: Lines of a log that are shown and kept when a run fails.
TAIL = 8


@dataclass
class Outcome:
    """How the runs that were waiting ended; names of runs."""

    finished: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)  # a run they start from failed


class Runner:
    """Works off ``plan.waiting`` with ``workers`` processes at once; ``find_data`` gives a run's prepared data.

    A thread of the pool waits for each process; commands, results and messages are handled in the caller's thread.
    """

    def __init__(
        self, plan: Plan, command: Command, find_data: Callable[[Run], Path], *, workers: int, poll: float = 0.3
    ) -> None:
        self.plan, self.workers, self.outcome = plan, workers, Outcome()
        self._command, self._find_data, self._poll = command, find_data, poll
        self._records = dict(plan.records)
        self._queue = list(plan.waiting)
        self._running: dict[Future[Process], Run] = {}
        self._processes: list[Process] = []
        self._starting = threading.Lock()  # a process is either known and can be ended, or is not started
        self._stopped = False

    def run(self) -> Outcome:
        """Until nothing is left to do. On Ctrl-C and SIGTERM the processes are ended first; each can be resumed."""
        total = len(self._queue)
        redirect = logging_redirect_tqdm([logging.getLogger("tawin_nemo")])
        with redirect, ThreadPoolExecutor(self.workers) as pool, self._interruptible():
            bar = tqdm(self._ended(pool), self.plan.study.file.study, total, disable=not sys.stderr.isatty())
            for number, text in enumerate(bar, 1):
                log.info("[%d/%d] %s%s", number, total, text, self._to_go())
        return self.outcome

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """SIGINT and SIGTERM (a scheduler's, a shutdown's) raise KeyboardInterrupt; all processes are ended then."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, signal.default_int_handler) for number in signals}
        try:
            yield
        finally:
            for number in before:
                signal.signal(number, signal.SIG_IGN)
            with self._starting:
                self._stopped = True
            launch.stop(list(self._processes))
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ended(self, pool: ThreadPoolExecutor) -> Iterator[str]:
        """One line for each run as it ends."""
        while self._queue or self._running:
            for run in list(self._queue):
                parent = run.parent_key
                if parent in [other.key for other in self._left()]:
                    continue
                if parent is not None and self._lost(parent):
                    self._queue.remove(run)
                    self.outcome.blocked.append(run.name)
                    yield f"{run.name} is not run: {parent[0]}.seed{parent[1]} failed"
                elif len(self._running) < self.workers:
                    self._queue.remove(run)
                    try:
                        command = self._command_of(run)
                    except TawinError as error:
                        self.outcome.failed.append(run.name)
                        yield f"{run.name} cannot start: {error}"
                    else:
                        self._running[pool.submit(self._execute, run, command)] = run
            for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                del self._running[future]
                yield self._end(future.result())

    def _left(self) -> list[Run]:
        return [*self._running.values(), *self._queue]

    def _lost(self, parent: tuple[str, int]) -> bool:
        return f"{parent[0]}.seed{parent[1]}" in (*self.outcome.failed, *self.outcome.blocked)

    def _command_of(self, run: Run) -> list[str]:
        start = final_stage(run.parent_dir) if run.parent_dir else None
        if run.parent_dir and start is None:
            raise DataError(f"{run.parent_dir} holds no finished run to start from")
        return self._command(run, self._find_data(run), start)

    def _execute(self, run: Run, command: list[str]) -> Process:
        """Start the process and wait for its end; first for the end of one that an earlier, killed call has left."""
        process, logged = None, False
        while process is None:
            with self._starting:
                if self._stopped:
                    raise InterruptedError(f"{run.name} is not started")
                try:
                    process = launch.start_process(run, command)
                    self._processes.append(process)
                except Busy as busy:
                    message = str(busy)
            if process is None:
                if not logged:
                    log.info("%s waits: %s (kill it to go on from its last checkpoint at once)", run.name, message)
                logged = True
                time.sleep(self._poll)
        process.popen.wait()
        with self._starting:
            self._processes.remove(process)
        return process

    def _end(self, process: Process) -> str:
        run, code = process.run, process.popen.returncode
        problem = []
        if code == 0:
            try:
                return self._finish(process)
            except (TawinError, OSError, ValueError, KeyError) as error:
                problem = [str(error)]
        tail = [*log_tail(process.log), *problem]
        root, here = run.recipe.data.root, f"{Path.cwd()}{os.sep}"
        shown = [(line.replace(root, "DIR") if root else line).replace(here, "") for line in tail]
        FailedRun(run.study, run.arm.name, run.seed, process.shown, process.commit, today(), code, shown).write(
            run.failed_file
        )
        self._commit([run.failed_file], f"Study {run.study}: {run.name} failed")
        self.outcome.failed.append(run.name)
        lines = "\n    ".join([*shown, "repeat it with", shlex.join(process.command)])
        return f"{run.name} FAILED with exit code {code}:\n    {lines}"

    def _finish(self, process: Process) -> str:
        run, record = process.run, self._record(process)
        if self.plan.state[run.key] == AGAIN:
            self._compare(run, record, self._records[run.key])
        else:
            record.write(run.file)
            self._records[run.key] = record
            self._commit([run.file, ranks_file(run.file)], f"Study {run.study}: {run.name}")
        if run.failed_file.is_file():
            run.failed_file.unlink()
            self._commit([run.failed_file], f"Study {run.study}: {run.name} has succeeded")
        self.outcome.finished.append(run.name)
        split, result = next(iter(record.splits.items()))
        means = "  ".join(f"{name} {value:.4f}" for name, value in result.means.items() if name.startswith("recall"))
        return f"{run.name}  {split}: {means}  {record.wall_s / 60:.1f} min"

    def _record(self, process: Process) -> RunRecord:
        """The record of a run that has just ended well. Raises DataError when its files are not complete."""
        run = process.run
        stage = final_stage(run.run_dir)
        if stage is None:
            raise DataError(f"{run.run_dir} has no summary.json that names a finished final_stage; see {process.log}")
        parent = parent_run(run, self._records, self.plan.study.results)
        return RunRecord(
            study=run.study, arm=run.arm.name, seed=run.seed, command=process.shown, commit=process.commit,
            date=today(), hardware=provenance.hardware_of(run.run_dir), recipe_hash=recipe_hash(run.settings, parent),
            settings=dict(run.settings), parent=parent, process_s=round(time.monotonic() - process.started, 1),
            **read_stage(stage, list(run.recipe.eval.splits)),
        )  # fmt: skip

    def _compare(self, run: Run, again: RunRecord, stored: RunRecord) -> None:
        """Warn when a run that was made again for its weights is not the same one."""
        for name, split in stored.splits.items():
            if name in again.splits and again.splits[name].means != split.means:
                log.warning("%s: %s differs from the run file; its children start from other weights", run.name, name)

    def _commit(self, paths: list[Path], message: str) -> None:
        if self.plan.study.file.commit:
            provenance.commit(paths, message)

    def _to_go(self) -> str:
        left = self._left()
        seconds = total_seconds([expected_seconds(run, self._records) for run in left], self.workers)
        return f"  ({seconds / 60:.1f} min to go)" if left and seconds is not None else ""


def log_tail(path: Path, lines: int = TAIL) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return [line for line in text.splitlines() if line.strip()][-lines:]


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")
