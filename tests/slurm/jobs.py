"""The batch scripts on a real Slurm of two nodes on this machine: start it, submit, watch, look into a job."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CLUSTER = Path(__file__).parent / "cluster.sh"
TINY = Path(__file__).parent / "tiny.yaml"
SCRIPT = "slurm/tawin_qwen7b.sh"
#: What every job needs on a machine without GPUs; the script itself asks for one node x 8 GPUs.
SMALL = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1")
UNFINISHED = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING", "SUSPENDED")
#: Exit code of cluster.sh where there cannot be a Slurm.
CANNOT = 3


class NoSlurm(Exception):
    """This machine cannot have one; the message says why."""


@dataclass(frozen=True)
class Slurm:
    """A running cluster: the environment in which its commands work."""

    environment: dict[str, str]

    def submit(self, folder: Path, *, options: Sequence[str] = (), **environment: str) -> Job:
        """sbatch the unmodified script; nothing is told it but by sbatch's options and the environment."""
        told = {
            **self.environment, "TAWIN_LOGS": str(folder / "logs"), "RECIPE": str(TINY), "TAWIN_PREFLIGHT": "0",
            **environment,
        }  # fmt: skip
        words = ["sbatch", "--parsable", *SMALL, f"--output={folder}/%x-%j.out", *options, SCRIPT]
        number = self.call(*words, environment=told)
        return Job(self, number, folder)

    def call(self, *words: str, environment: dict[str, str] | None = None, seconds: float = 300) -> str:
        told = environment or self.environment
        done = subprocess.run(words, cwd=REPOSITORY, env=told, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def ask(self, *words: str) -> str:
        """``call`` for a question; on a busy machine one now and then stays without an answer."""
        for _ in range(10):
            with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
                return self.call(*words, seconds=30)
            time.sleep(1)
        return self.call(*words)


@dataclass(frozen=True)
class Job:
    slurm: Slurm
    number: str
    folder: Path

    @property
    def output(self) -> str:
        path = self.folder / f"tawin_qwen7b-{self.number}.out"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def fact(self, name: str) -> str:
        """One field of ``scontrol show job``, for example Restarts."""
        shown = self.slurm.ask("scontrol", "-o", "show", "job", self.number)
        return next(word.split("=", 1)[1] for word in shown.split() if word.startswith(f"{name}="))

    def minutes_run(self) -> int:
        """Whole minutes of this attempt."""
        hours, minutes, _ = self.fact("RunTime").split("-")[-1].split(":")
        return 60 * int(hours) + int(minutes)

    def limit(self, *, minutes: int) -> None:
        """Another time limit."""
        self.slurm.ask("scontrol", "update", f"jobid={self.number}", f"TimeLimit={minutes}")

    def log(self, attempt: int, verb: str, rank: int) -> str:
        name = f"attempt{attempt}.{verb}.rank{rank}.log"
        return (self.folder / "logs" / f"tawin_qwen7b.{self.number}" / name).read_text(encoding="utf-8")

    def end(self, *, minutes: float) -> str:
        """Wait for it; the state in which it ended."""
        wait_until(lambda: self.fact("JobState") not in UNFINISHED, minutes=minutes, what=f"job {self.number}")
        return self.fact("JobState")

    def python(self, rank: int) -> int:
        """Process id of one rank's Python."""
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and self._is_rank(folder, rank):
                return int(folder.name)
        raise AssertionError(f"job {self.number} has no rank {rank}")

    def _is_rank(self, process: Path, rank: int) -> bool:
        try:
            told = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        wanted = {f"SLURM_JOB_ID={self.number}".encode(), f"SLURM_PROCID={rank}".encode()}
        return wanted <= set(told) and command[1:4] == [b"-m", b"tawin_nemo", b"train"]


def wait_until(happened: Callable[[], bool], *, minutes: float, what: str) -> None:
    give_up = time.monotonic() + 60 * minutes
    while not happened():
        assert time.monotonic() < give_up, f"{what}: nothing after {minutes} minutes"
        time.sleep(0.5)


@contextmanager
def cluster() -> Iterator[Slurm]:
    """A Slurm of two nodes while inside. Raises NoSlurm."""
    with tempfile.TemporaryDirectory(prefix="tawin-slurm.") as folder:
        Path(folder).chmod(0o755)  # munge runs as a user of its own
        environment = {**os.environ, "SLURM_SIM_DIR": f"{folder}/sim"}
        try:
            yield Slurm(environment | started(environment))
        finally:
            subprocess.run([CLUSTER, "stop"], env=environment, timeout=300, check=False)


def started(environment: dict[str, str]) -> dict[str, str]:
    """Start it; what its commands and jobs need to know."""
    done = subprocess.run([CLUSTER, "start"], env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode == CANNOT:
        raise NoSlurm(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    conf = done.stdout.strip().removeprefix("export SLURM_CONF=")
    return {"SLURM_CONF": conf, "OMP_NUM_THREADS": "1", "TAWIN_VENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}
