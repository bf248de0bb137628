"""One run as a process: its data, its command, its log, its lock and its end."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from tawin_nemo.config.schema import Recipe
from tawin_nemo.run.datasets import prepared_root
from tawin_nemo.tools.study import provenance
from tawin_nemo.tools.study.arms import Study
from tawin_nemo.tools.study.plan import Run, arm_keys, as_override

#: Seconds that a process has to end after SIGTERM, and the system to remove what was killed.
GRACE, KILLED = 10.0, 10.0

#: (run, folder of the prepared data, stage to start from) -> the command's words
Command = Callable[[Run, Path, Path | None], list[str]]


class Busy(Exception):
    """Another process works in the run directory."""


@dataclass(frozen=True)
class Process:
    """A run that is going on."""

    run: Run
    popen: subprocess.Popen[bytes]
    log: Path
    command: list[str]
    shown: str  # the command without the folders of this machine
    commit: str  # of the code it was started from
    started: float  # monotonic clock


def train_command(study: Study) -> Command:
    """The ``train`` command of a run: the study's recipe, the arm's keys, and the run's folders."""

    def command(run: Run, data: Path, start: Path | None) -> list[str]:
        recipe = run.recipe
        keys = arm_keys(study, run.arm) | {
            "data.dataset": "prepared", "data.root": str(data), "seed": run.seed,
            "name": f"{run.study}.{run.arm.slug}", "run_dir": str(run.run_dir),
        }  # fmt: skip
        if recipe.catalog.kind == "sid" and not Path(recipe.catalog.index).is_absolute():
            keys["catalog.index"] = str(Path(recipe.data.root) / recipe.catalog.index)
        if start is not None:
            keys["start"] = str(start)
        words = [as_override(key, value) for key, value in keys.items()]
        return [sys.executable, "-m", "tawin_nemo", "train", "--recipe", os.path.normpath(study.recipe), *words]

    return command


def data_finder(study: Study, prepare: Callable[[Recipe], Path] = prepared_root) -> Callable[[Run], Path]:
    """Gives each run its prepared data; raw data is prepared once for all runs that agree on it, below ``run_root``.

    So all seeds see the same users, in generated data too: those are made with the recipe's own seed.
    """
    roots: dict[str, Path] = {}

    def find(run: Run) -> Path:
        keys = [
            key for key in run.settings if key.startswith("prepare.") or key in ("data.dataset", "data.max_history")
        ]
        identity = json.dumps([run.recipe.data.root, *(run.settings[key] for key in keys)])
        if identity not in roots:
            folder = study.run_root / "data" / hashlib.sha256(identity.encode()).hexdigest()[:8]
            roots[identity] = prepare(replace(run.recipe, run_dir=str(folder)))
        return roots[identity]

    return find


def start_process(run: Run, command: list[str]) -> Process:
    """Start the command with its output in ``RUN/attempt.N.log``.

    The process inherits a lock on the run directory and keeps it as long as it lives, even if this program is killed:
    nobody else can start the same run meanwhile. Raises Busy when somebody holds it; the lock file names the process.
    It is ``flock`` and not the package filelock, whose release also unlocks the file for a child that inherited it.
    """
    run.run_dir.mkdir(parents=True, exist_ok=True)
    log = run.run_dir / f"attempt.{len(list(run.run_dir.glob('attempt.*.log'))) + 1}.log"
    with (run.run_dir / "lock").open("a+") as lock:
        if not _try_lock(lock):
            lock.seek(0)
            raise Busy(f"process {lock.read() or 'of unknown number'} works in {run.run_dir}")
        lock.truncate(0)  # it names the process of the attempt before
        with log.open("wb") as output:
            popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | provenance.ENVIRONMENT, pass_fds=(lock.fileno(),),
                start_new_session=True,  # Ctrl-C reaches this program only, which ends its children itself
            )  # fmt: skip
        lock.write(str(popen.pid))
    shown = shown_command(command, run.recipe.data.root)
    return Process(run, popen, log, command, shown, provenance.code_version(), time.monotonic())


def _try_lock(file: IO[Any]) -> bool:
    """Whether the lock of an open file is now this process's, and of those that inherit the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def shown_command(command: list[str], data_root: str) -> str:
    """The command without the folders of this machine: ``python``, ``DIR`` for the data, paths from here on."""
    words = ["python", *command[1:]] if command[0] == sys.executable else list(command)
    if data_root:
        words = [word.replace(data_root, "DIR") for word in words]
    return shlex.join(word.replace(f"{Path.cwd()}{os.sep}", "") for word in words)


def stop(processes: list[Process]) -> None:
    """SIGTERM to each process and its children, SIGKILL to those that stay; returns when their locks are free."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(GRACE)
        _signal(process, signal.SIGKILL)
        process.popen.wait()
        give_up = time.monotonic() + KILLED  # children may outlive it for a moment, and hold its lock as long
        with (process.run.run_dir / "lock").open("a") as lock:
            while not _try_lock(lock) and time.monotonic() < give_up:
                time.sleep(0.02)


def _signal(process: Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.popen.pid, number)
