"""What the batch script does after each way of being stopped, on a real Slurm, with a stand-in for the training.

Takes minutes, so ``tests/run.sh --full`` runs it (TAWIN_FULL=1).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.slurm.jobs import REPOSITORY, Job, Slurm, wait_until

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(3600),
]
#: Answers signals as training does, and has nothing left to do in a second attempt.
STAND_IN = """#!/bin/bash
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && exit 0
trap 'echo saved; exit 75' USR1 TERM
for i in $(seq 3000); do sleep 0.2; done
"""


def submit(slurm: Slurm, folder: Path, *options: str) -> Job:
    """The script in a checkout whose ``python`` is the stand-in."""
    home, programs = folder / "home", folder / "home" / ".venv" / "bin"
    shutil.copytree(REPOSITORY / "slurm", home / "slurm")
    programs.mkdir(parents=True)
    (programs / "python").write_text(STAND_IN, encoding="utf-8")
    (programs / "python").chmod(0o755)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n', encoding="utf-8")
    return slurm.submit(folder, options=options, TAWIN_HOME=str(home), TAWIN_VENV=str(home / ".venv"))


def test_every_way_of_being_stopped(slurm, tmp_path):
    """All at once, because Slurm counts in minutes: the warning before the limit, the limit itself, scancel."""
    folders = {name: tmp_path / name for name in ("warned", "limit", "cancelled")}
    warned = submit(slurm, folders["warned"], "--time=2", "--signal=USR1@60")
    limit = submit(slurm, folders["limit"], "--time=1", "--signal=USR1@0")
    cancelled = submit(slurm, folders["cancelled"])
    wait_until(lambda: "attempt 0" in cancelled.output, minutes=10, what="the start of the job")
    wait_until(lambda: (logs(cancelled) / "attempt0.train.rank3.log").is_file(), minutes=10, what="its tasks")
    slurm.call("scancel", cancelled.number)
    assert cancelled.end(minutes=10) == "CANCELLED"
    assert "requeued" not in cancelled.output
    for job in (warned, limit):
        assert job.end(minutes=15) == "COMPLETED", job.output
        assert job.fact("Restarts") == "1"
        assert "stopped after a save; requeued" in job.output
        assert job.output.rstrip().endswith("done")
        assert all("saved" in job.log(0, "train", rank) for rank in range(4))
    assert "DUE TO TIME LIMIT" in limit.output
    assert "DUE TO TIME LIMIT" not in warned.output
    assert cancelled.fact("Restarts") == "0"


def logs(job: Job) -> Path:
    return job.folder / "logs" / f"tawin_qwen7b.{job.number}"
