"""The batch scripts as they are, on a real Slurm: time limit, requeue, resume, end; a rank that dies; a wrong key.

Needs root and a minute or two per test, so only ``tests/run.sh --full`` runs it (TAWIN_SLURM=1).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CLUSTER = Path(__file__).parent / "cluster.sh"
SCRIPT = "slurm/tawin_qwen7b.sh"

pytestmark = [
    pytest.mark.skipif(os.environ.get("TAWIN_SLURM") != "1", reason="a real Slurm runs with tests/run.sh --full only"),
    pytest.mark.skipif(os.geteuid() != 0, reason="starting Slurm's daemons needs root"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Environment of a cluster of two nodes."""
    folder = tmp_path_factory.mktemp("slurm")
    environment = {**os.environ, "SLURM_SIM_DIR": str(folder / "sim")}
    started = subprocess.run([CLUSTER, "start"], env=environment, capture_output=True, text=True, timeout=300)
    assert started.returncode == 0, started.stderr[-3000:]
    conf = started.stdout.strip().removeprefix("export SLURM_CONF=")
    yield {**environment, "SLURM_CONF": conf, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run([CLUSTER, "stop"], env=environment, timeout=120, check=False)


def submit(slurm: dict[str, str], folder: Path, *arguments: str, options: tuple[str, ...] = (), **extra: str) -> str:
    """sbatch the unmodified script for two nodes of two tasks without GPUs; the job's number."""
    environment = {
        **slurm, "TAWIN_HOME": str(REPOSITORY), "TAWIN_LOGS": str(folder / "logs"),
        "RECIPE": str(REPOSITORY / "tests/slurm/tiny.yaml"), **extra,
    }  # fmt: skip
    small = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]
    words = ["sbatch", "--parsable", *small, f"--output={folder}/%x-%j.out", *options, SCRIPT, *arguments]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(slurm: dict[str, str], job: str, *, minutes: float) -> str:
    """State in which the job ends."""
    give_up = time.monotonic() + 60 * minutes
    state = ""
    while time.monotonic() < give_up:
        shown = subprocess.run(["scontrol", "-o", "show", "job", job], env=slurm, capture_output=True, text=True)
        state = shown.stdout.split("JobState=")[1].split()[0]
        if state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"):
            return state
        time.sleep(1)
    return f"still {state}"


def output(folder: Path, job: str) -> str:
    return (folder / f"tawin_qwen7b-{job}.out").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def dataset(small_dataset) -> str:
    return f"data.root={small_dataset}"


def test_time_limit_requeue_resume_end(slurm, dataset, tmp_path):
    run_dir = tmp_path / "run"
    job = submit(
        slurm, tmp_path, dataset, f"run_dir={run_dir}", "rl.max_steps=400",
        options=("--time=2", "--signal=USR1@45"),
    )  # fmt: skip
    state = wait_for(slurm, job, minutes=25)
    text = output(tmp_path, job)
    assert state == "COMPLETED", text[-3000:]
    assert "stopped after a save; requeued" in text
    assert "attempt 1: 2 nodes x 2 tasks" in text
    assert text.rstrip().endswith("done")
    log = (run_dir / "rl" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 401))
    layout = json.loads((run_dir / "layout.json").read_text(encoding="utf-8"))
    assert len(layout) == 4


def test_a_rank_that_dies_ends_the_job_with_its_traceback(slurm, dataset, tmp_path):
    job = submit(slurm, tmp_path, dataset, f"run_dir={tmp_path / 'run'}", "rl.max_steps=100000")
    log = tmp_path / "run" / "rl" / "metrics.jsonl"
    give_up = time.monotonic() + 300
    while not log.is_file() and time.monotonic() < give_up:
        time.sleep(0.2)
    victims = subprocess.run(["pgrep", "-f", f"run_dir={tmp_path / 'run'}"], capture_output=True, text=True)
    pythons = [pid for pid in victims.stdout.split() if Path(f"/proc/{pid}/comm").read_text().startswith("python")]
    subprocess.run(["kill", "-9", pythons[-1]], check=True)
    began = time.monotonic()
    assert wait_for(slurm, job, minutes=2) == "FAILED"
    assert time.monotonic() - began < 60
    assert "failed with code" in output(tmp_path, job)


def test_a_wrong_key_is_told_on_the_first_screen(slurm, dataset, tmp_path):
    job = submit(slurm, tmp_path, dataset, f"run_dir={tmp_path / 'run'}", "rl.tawn.k=3")
    assert wait_for(slurm, job, minutes=3) == "FAILED"
    assert "did you mean rl.tawin?" in output(tmp_path, job)
