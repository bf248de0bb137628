"""Runs of a study as Slurm jobs. A few lines of shell stand for Slurm here; tests/slurm has the real one (full)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tawin_nemo.tools.study import slurm, slurm_job
from tawin_nemo.tools.study.config import read_file
from tawin_nemo.tools.study.plan import make_plan
from tawin_nemo.tools.study.provenance import hardware, hardware_of, write_hardware
from tawin_nemo.tools.study.runner import Runner
from tawin_nemo.util.errors import ConfigError
from tests.tools.study.files import FakeTraining, study_of, write_study
from tests.train.runs import importable

#: A job is a process group of this machine; its number is that of its first process.
COMMANDS = {
    "sbatch": """
        for word in "$@"; do case $word in --output=*) log=${word#--output=};; esac; done
        echo "$@" >>"$FAKE_SLURM/submitted"
        cat >"$FAKE_SLURM/script.$$"
        env | grep OMP_NUM_THREADS >>"$FAKE_SLURM/threads"
        SLURM_JOB_NODELIST=n1 SLURM_JOB_ID=7 setsid bash "$FAKE_SLURM/script.$$" >>"$log" 2>&1 </dev/null &
        echo "$!;cluster" """,
    "squeue": """
        for word in "$@"; do case $word in --jobs=*) n=${word#--jobs=};; esac; done
        if kill -0 -- -$n 2>/dev/null; then echo RUNNING; fi""",
    "scancel": 'kill -TERM -- -$1; echo $1 >>"$FAKE_SLURM/cancelled"',
    "scontrol": "echo n1; echo n2",
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; echo "srun on $MASTER_ADDR:$MASTER_PORT"; exec "$@"',
}  # fmt: skip


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder in which the commands leave what they were asked."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setattr(slurm_job, "POLL", 0.05)
    return folder


def job(run_dir: Path, *command: str, options: tuple[str, ...] = ("--nodes=1",)) -> slurm_job.Job:
    run_dir.mkdir(exist_ok=True)
    return slurm_job.Job(run_dir, "probe.a.seed1", run_dir / "slurm.log", options, command)


def submitted(cluster: Path) -> int:
    path = cluster / "submitted"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_a_job_gives_its_exit_code_and_the_end_of_its_log(cluster, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the study's own: a job has the cores that it asks for
    run_dir = tmp_path / "run"
    assert job(run_dir, "sh", "-c", "echo it is done").run() == 0
    assert (run_dir / "slurm.log").read_text() == "it is done\n"
    assert hardware_of(run_dir) == hardware()
    assert (run_dir / "hardware.json").is_file()
    assert job(run_dir, "sh", "-c", "echo no such key; exit 2").run() == 2
    assert "no such key" in capfd.readouterr().out
    assert (cluster / "threads").read_text() == ""
    first, _ = (cluster / "submitted").read_text().splitlines()
    assert "--job-name=probe.a.seed1" in first
    assert "--nodes=1" in first


def test_a_job_that_saved_is_submitted_again(cluster, tmp_path):
    command = f"if [ -e {tmp_path}/mark ]; then exit 0; fi; touch {tmp_path}/mark; exit 75"
    assert job(tmp_path / "run", "sh", "-c", command).run() == 0
    assert submitted(cluster) == 2


def test_a_job_that_vanishes_is_a_fault(cluster, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(slurm_job, "PATIENCE", 0.2)
    assert job(tmp_path / "run", "sh", "-c", "kill -9 0").run() == 1
    assert "ended without an exit code: time limit, lost node or scancel" in capfd.readouterr().out


def test_a_refused_job_is_a_mistake(cluster, tmp_path, capfd):
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'error: invalid partition specified: x' >&2; exit 1\n")
    with pytest.raises(SystemExit) as ended:
        job(tmp_path / "run", "true").run()
    assert ended.value.code == 2
    assert "invalid partition specified: x" in capfd.readouterr().out


def test_several_nodes_start_their_tasks_by_srun(cluster, tmp_path):
    run_dir = tmp_path / "run"
    assert job(run_dir, "echo", "a b", options=("--nodes=2", "--ntasks-per-node=8")).run() == 0
    assert (run_dir / "slurm.log").read_text() == "srun on n1:20007\na b\n"


def start(run_dir: Path, *command: str) -> subprocess.Popen[str]:
    run_dir.mkdir(exist_ok=True)
    words = [
        sys.executable,
        "-m",
        slurm_job.__name__,
        str(run_dir),
        "name",
        str(run_dir / "slurm.log"),
        "--nodes=1",
        "--",
    ]
    return subprocess.Popen([*words, *command], env=importable(), stdout=subprocess.PIPE, text=True)


def until(condition, seconds: float = 60.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_sigterm_cancels_the_job(cluster, tmp_path):
    run_dir = tmp_path / "run"
    waiting = start(run_dir, "sleep", "60")
    until((run_dir / slurm_job.JOB).is_file)
    number = (run_dir / slurm_job.JOB).read_text()
    until(lambda: slurm_job.state(number) == "RUNNING")
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(60) == 128 + signal.SIGTERM
    assert (cluster / "cancelled").read_text().split() == [number]
    until(lambda: slurm_job.state(number) == "")


def test_a_killed_study_finds_its_job_again(cluster, tmp_path):
    run_dir = tmp_path / "run"
    waiting = start(run_dir, "sh", "-c", f"until [ -e {tmp_path}/go ]; do sleep 0.05; done; exit 4")
    until((run_dir / slurm_job.JOB).is_file)
    waiting.kill()
    waiting.wait()
    again = start(run_dir, "false")
    assert "which an earlier call has submitted" in again.stdout.readline()
    (tmp_path / "go").touch()
    assert again.wait(60) == 4
    assert submitted(cluster) == 1


def test_a_whole_study(cluster, tmp_path):
    fake = FakeTraining(tmp_path / "made")
    arms = {"a": {"rl.enabled": False}, "b": {"after": "a", "trainer.num_nodes": 2}}
    study = study_of(tmp_path, "launcher=slurm", "sbatch=[--gpus-per-node=8]", arms=arms, seeds=[1])
    command = slurm.submitting(fake.command, study.file.sbatch)
    outcome = Runner(make_plan(study), command, lambda run: Path("data"), workers=2, poll=0.01).run()
    assert (outcome.finished, outcome.failed) == (["a.seed1", "b.seed1"], [])
    first, second = (cluster / "submitted").read_text().splitlines()
    assert "--job-name=probe.a.seed1" in first
    assert first.endswith("--nodes=1 --ntasks-per-node=1 --gpus-per-node=8")
    assert "--nodes=2 --ntasks-per-node=1" in second


def test_mistakes_name_the_key(tmp_path):
    for override, message in (
        ("launcher=ray", "launcher=ray must be one of local, slurm"),
        ("sbatch=[--gpus-per-node=8]", "needs launcher=slurm"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_file(write_study(tmp_path), [override])


def test_a_run_of_this_machine_has_its_hardware(tmp_path):
    assert hardware_of(tmp_path) == hardware()
    write_hardware(tmp_path)
    assert hardware_of(tmp_path) == hardware()
