"""The batch script as it is, on a real Slurm: time limit, requeue, resume, end; a rank that dies; a wrong key; scancel.

Takes minutes, so ``tests/run.sh --full`` runs it (TAWIN_FULL=1).
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import Job, Slurm, wait_until
from tests.train.runs import prepare_dataset

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(7200),
]
#: Steps of the jobs that run to their end: minutes, so that Slurm, which looks at time limits every 30 s, can stop one.
STEPS = 400
#: Slurm warns a job so many seconds before its time limit.
WARNING = 3600
#: From the death of a rank to the end of its job.
QUICKLY_MINUTES = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return f"data.root={prepare_dataset(tmp_path_factory.mktemp('dataset'))}"


def steps(run: Path) -> list[int]:
    """Of every logged step, as far as the log is written."""
    log = run / "rl" / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [json.loads(line)["step"] for line in lines]


def weights(run: Path) -> dict[str, bytes]:
    """Files of the last checkpoint's weights and optimizer."""
    return {path.name: path.read_bytes() for path in run.glob(f"rl/checkpoints/step_{STEPS}/*.distcp")}


def test_slurm_accepts_the_scripts_own_numbers(slurm):
    """All but the four nodes; sbatch refuses a job that this cluster could never run."""
    scripts = [path for path in Path("slurm").glob("*.sh") if "\n#SBATCH" in path.read_text(encoding="utf-8")]
    assert {"tawin_qwen7b.sh", "tawin_qwen0.5b.sh", "sft_qwen7b.sh"} <= {path.name for path in scripts}
    for script in sorted(scripts):
        slurm.call("sbatch", "--test-only", "--nodes=2", str(script))  # fails on an exit code other than 0


@pytest.fixture(scope="module")
def whole_job(slurm, dataset, tmp_path_factory) -> Job:
    """With preflight and without interruption to its end."""
    folder = tmp_path_factory.mktemp("whole")
    told = f"{dataset} run_dir={folder}/run rl.max_steps={STEPS}"
    job = slurm.submit(folder, TAWIN_PREFLIGHT="1", TAWIN_OVERRIDES=told)
    assert job.end(minutes=60) == "COMPLETED", job.output
    return job


def test_a_job_passes_its_preflight_and_trains_on_two_nodes(whole_job):
    assert "preflight: plan and doctor have no objection" in whole_job.output
    assert "2 nodes x 2 tasks, rank 0 on node1" in whole_job.output
    assert whole_job.output.rstrip().endswith("done")
    for rank in range(4):
        assert f"rank {rank} of 4 on node{1 + rank // 2}, attempt 0" in whole_job.log(0, "train", rank)
    layout = json.loads((whole_job.folder / "run" / "layout.json").read_text(encoding="utf-8"))
    assert [(entry["rank"], entry["tp_size"], entry["dp_size"]) for entry in layout] == [(r, 2, 2) for r in range(4)]
    assert "fits:" in whole_job.log(0, "plan", 0)
    assert "gloo, 4 processes: sums are right" in whole_job.log(0, "doctor", 0)
    assert steps(whole_job.folder / "run") == list(range(1, STEPS + 1))


def test_a_job_that_its_time_limit_stopped_ends_like_one_that_ran_through(whole_job, slurm, dataset, tmp_path):
    """Bit for bit: every logged figure of training and every evaluated row.

    The time limit is lowered once the job trains, so that Slurm's warning is due at once however fast the machine is.
    """
    run = tmp_path / "run"
    job = slurm.submit(
        tmp_path,
        options=("--time=10:00:00", f"--signal=USR1@{WARNING}"),
        TAWIN_OVERRIDES=f"{dataset} run_dir={run} rl.max_steps={STEPS}",
    )
    wait_until(lambda: len(steps(run)) >= 5, minutes=30, what=f"five steps\n{job.output}")
    job.limit(minutes=WARNING // 60 + job.minutes_run())
    wait_until(lambda: job.fact("Restarts") != "0", minutes=10, what=f"a requeue\n{job.output}")
    stopped = steps(run)[-1]
    job.limit(minutes=600)
    assert job.end(minutes=60) == "COMPLETED", job.output

    assert 5 <= stopped < STEPS
    assert "stopped after a save; requeued" in job.output
    assert "attempt 1: 2 nodes x 2 tasks" in job.output
    assert job.output.rstrip().endswith("done")
    assert "SIGUSR1" in job.log(0, "train", 0)
    assert f"rl continues after step {stopped}" in job.log(1, "train", 0)
    assert steps(run) == list(range(1, STEPS + 1))
    for name in ("metrics.jsonl", "eval/test.json", "eval/test.per_user.parquet", "eval/valid.per_user.parquet"):
        one, other = (folder / "rl" / name for folder in (whole_job.folder / "run", run))
        assert one.read_bytes() == other.read_bytes(), name
    one, other = (weights(folder) for folder in (whole_job.folder / "run", run))
    assert one == other != {}


def running_job(slurm: Slurm, dataset: str, folder: Path) -> Job:
    """One that has taken a step and would run for hours."""
    job = slurm.submit(folder, TAWIN_OVERRIDES=f"{dataset} run_dir={folder}/run rl.max_steps=100000")
    wait_until(lambda: bool(steps(folder / "run")), minutes=30, what=f"a step\n{job.output}")
    return job


def test_a_rank_that_dies_ends_the_job_quickly_and_is_named(slurm, dataset, tmp_path):
    job = running_job(slurm, dataset, tmp_path)
    os.kill(job.python(rank=3), signal.SIGKILL)
    before = time.monotonic()
    assert job.end(minutes=10) == "FAILED", job.output
    assert time.monotonic() - before < 60 * QUICKLY_MINUTES
    assert job.fact("Restarts") == "0"
    assert "train failed with code" in job.output
    assert "rank 3 on node2 was the first to fail, with signal KILL" in job.output
    assert "attempt0.train.rank3.log" in job.output


def test_scancel_ends_a_job_for_good_and_the_same_command_continues(slurm, dataset, tmp_path):
    job = running_job(slurm, dataset, tmp_path)
    slurm.call("scancel", job.number)
    assert job.end(minutes=10) == "CANCELLED", job.output
    time.sleep(10)
    assert job.fact("JobState") == "CANCELLED"
    assert job.fact("Restarts") == "0"


def test_a_wrong_key_is_told_on_the_first_screen(slurm, dataset, tmp_path):
    job = slurm.submit(tmp_path, TAWIN_PREFLIGHT="1", TAWIN_OVERRIDES=f"{dataset} rl.tawn.k=3")
    assert job.end(minutes=10) == "FAILED"
    assert job.fact("ExitCode") == "2:0"
    assert "did you mean rl.tawin?" in job.output
    assert len(job.output.splitlines()) < 25
