"""One run of a study as a Slurm job: submit it, wait for its end, and end with its exit code (``launcher: slurm``).

    python -m tawin_nemo.tools.study.slurm_job RUN_DIR NAME LOG [sbatch options] -- COMMAND ...

The study starts this program as it starts a run of its own, so its lock, its log and Ctrl-C are the same: SIGTERM
cancels the job. RUN_DIR/slurm_job names the job; where a study was killed and its job goes on, the next call waits for
that job instead of submitting another one. A job that ends with 75 (it saved before its time limit) is submitted again.
No accounting database is needed: the job writes its exit code into RUN_DIR. This file imports little: it starts twice
for each run.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from tawin_nemo.tools.study.provenance import ENVIRONMENT, write_hardware

#: Exit code of a run that saved and asks to be started again, and how often it is.
AGAIN, MAX_AGAIN = 75, 100
#: Seconds between two questions to Slurm, and for one question.
POLL, PATIENCE = 5.0, 60.0
JOB, CODE = "slurm_job", "slurm_code"


def script(run_dir: Path, command: Sequence[str], *, nodes: int) -> str:
    """The batch script of a job."""
    line = shlex.join(command)
    if nodes > 1:
        line = (
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
            f"export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))\nsrun --export=ALL --kill-on-bad-exit=1 {line}"
        )
    code, python = shlex.quote(str(run_dir / CODE)), shlex.quote(sys.executable)
    return (
        f"#!/bin/bash\n{python} -m {__name__} --hardware {shlex.quote(str(run_dir))}\n{line}\ncode=$?\n"
        f"echo $code >{code}.tmp && mv {code}.tmp {code}\nexit $code\n"
    )


class Job:
    """One run as a Slurm job, submitted as often as it asks for."""

    def __init__(self, run_dir: Path, name: str, log: Path, options: Sequence[str], command: Sequence[str]) -> None:
        self.run_dir, self.name, self.log, self.options, self.command = run_dir, name, log, options, command
        self.number = ""

    def run(self) -> int:
        """Submit or find the job and wait for its end; the exit code, 1 for a job that ended without one."""
        signal.signal(signal.SIGTERM, self._cancel)
        for _ in range(MAX_AGAIN):
            self.number = self._going_on() or self._submit()
            code = self._wait()
            if code != AGAIN:
                return code
            print(f"job {self.number} saved and is submitted again", flush=True)
        return AGAIN

    def _going_on(self) -> str:
        """The number of the job that an earlier call left, while it is waiting or running."""
        with suppress(OSError):
            number = (self.run_dir / JOB).read_text(encoding="utf-8").strip()
            if number and state(number):
                print(f"waits for job {number}, which an earlier call has submitted", flush=True)
                return number
        return ""

    def _submit(self) -> str:
        (self.run_dir / CODE).unlink(missing_ok=True)
        nodes = max([1, *(int(n) for o in self.options for n in re.findall(r"^--nodes=(\d+)$", o))])
        told = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
        words = ["sbatch", "--parsable", f"--job-name={self.name}", f"--output={self.log}", "--open-mode=append"]
        done = subprocess.run(
            [*words, *self.options], input=script(self.run_dir, self.command, nodes=nodes), env=told,
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        if done.returncode:
            print(f"sbatch: {done.stderr.strip()}", flush=True)
            raise SystemExit(2)
        number = done.stdout.strip().split(";")[0]
        (self.run_dir / JOB).write_text(number, encoding="utf-8")
        print(f"submitted job {number}, its log is {self.log}", flush=True)
        return number

    def _wait(self) -> int:
        while state(self.number):
            time.sleep(POLL)
        path = self.run_dir / CODE
        give_up = time.monotonic() + PATIENCE  # a shared file system shows it later
        while not path.is_file() and time.monotonic() < give_up:
            time.sleep(min(1.0, POLL))
        tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:] if self.log.is_file() else []
        if not path.is_file():
            print(f"job {self.number} ended without an exit code: time limit, lost node or scancel", *tail, sep="\n")
            return 1
        code = int(path.read_text(encoding="utf-8"))
        if code not in (0, AGAIN):
            print(*tail, sep="\n", flush=True)
        return code

    def _cancel(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            subprocess.run(["scancel", self.number], check=False, timeout=PATIENCE)
        raise SystemExit(128 + number)


def state(number: str) -> str:
    """The state of a job that is waiting or running, else ""; a Slurm that does not answer counts as running."""
    words = ["squeue", "--noheader", f"--jobs={number}", "--format=%T"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return "UNKNOWN"
    if done.returncode and "Invalid job id" not in done.stderr:
        return "UNKNOWN"
    return done.stdout.strip()


def main(words: list[str]) -> int:
    """See the top of this file."""
    if words[0] == "--hardware":
        write_hardware(Path(words[1]))
        return 0
    end = words.index("--")
    run_dir, name, log, *options = words[:end]
    return Job(Path(run_dir), name, Path(log), options, words[end + 1 :]).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
