"""Several machines without Slurm: slurm/torchrun.sh, launchers that meet, and a site's own commands (TAWIN_SETUP)."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tawin_nemo.run.launcher import launch
from tawin_nemo.util.errors import Preempted
from tests import forked
from tests.distributed.launch import free_port
from tests.train.runs import SMALL, assert_same_metrics

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "slurm" / "torchrun.sh"
#: What a module system looks like: a function of the shell that fails under ``set -u`` and ``set -e``.
MODULES = """
module() {
  false
  [ "$1" = load ] && [ "$2" != missing ] && export LOADED="$2$NOT_SET_ANYWHERE"
}
"""


def environment(**settings: str) -> dict[str, str]:
    """Without what would be the test's own job."""
    own = ("TAWIN", "SLURM", "MASTER", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)} | settings


def called(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *words], capture_output=True, text=True, timeout=60, env=environment(**settings)
    )


def test_the_command_names_the_machines_and_their_processes():
    done = called("train", "recipes/quickstart.yaml", "rl.lr=1e-5",
                  TAWIN_DRY_RUN="1", TAWIN_NODES="2", TAWIN_HEAD="node1", TAWIN_GPUS="8")  # fmt: skip
    assert shlex.split(done.stdout) == [
        "TAWIN_HEAD=node1", "TAWIN_NODES=2", "TAWIN_JOB=tawin", "python", "-m", "tawin_nemo", "train", "--recipe",
        "recipes/quickstart.yaml", "rl.lr=1e-5", "trainer.num_nodes=2", "trainer.devices=8",
    ]  # fmt: skip
    assert called("train").returncode == 2


def test_pods_whose_variables_look_like_ranks_still_start_a_launcher(tmp_path: Path):
    """Kubernetes' PyTorchJob sets RANK and WORLD_SIZE to those of the pods."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f"export PATH={tmp_path}/bin:$PATH\n")
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\nenv\n")
    python.chmod(0o755)
    done = called("train", "RECIPE", TAWIN_VENV=str(tmp_path), RANK="1", WORLD_SIZE="2", MASTER_ADDR="job-master-0",
                  TAWIN_NODES="2")  # fmt: skip
    told = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert (told["TAWIN_HEAD"], told["TAWIN_NODES"]) == ("job-master-0", "2")
    assert told["PYTHONPATH"].split(":")[0] == str(REPOSITORY)
    assert {"RANK", "WORLD_SIZE", "MASTER_ADDR"}.isdisjoint(told)


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    (tmp_path / "modules.sh").write_text(MODULES)
    return tmp_path / "modules.sh"


def test_a_site_loads_its_modules_before_a_job(modules: Path):
    """In both ways to start; launch.sh hands the environment to every task."""
    dry = {"TAWIN_DRY_RUN": "1", "TAWIN_MODULES": str(modules)}
    setup = "module load cuda/13 && export TAWIN_GPUS=3$LOADED"
    assert "trainer.devices=3cuda/13" in called("train", "RECIPE", TAWIN_SETUP=setup, **dry).stdout
    lines = f"source {REPOSITORY}/slurm/launch.sh; LOGS=/nowhere; surroundings; env; [[ $- == *e*u* ]]"
    given = environment(TAWIN_SETUP="module load gcc/13", TAWIN_HOME="/nowhere", MASTER_ADDR="n1", SLURM_JOB_ID="7")
    done = subprocess.run(["bash", "-euc", lines], env=given | dry, capture_output=True, text=True, check=True)
    assert "LOADED=gcc/13\n" in done.stdout
    broken = called("train", "RECIPE", TAWIN_SETUP="module load missing", **dry)
    assert (broken.returncode, broken.stdout) == (2, "")
    assert "TAWIN_SETUP=module load missing ended with 1" in broken.stderr


def one_machine(words: Sequence[str]) -> int:
    """One machine's launcher of ``words[1]`` ranks, each of which is the program ``words[0]``."""
    sys.executable = words[0]
    return launch(int(words[1]), [])


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, Preempted.exit_code])
def test_launchers_on_two_machines_meet_and_number_their_ranks(tmp_path: Path, code: int):
    program = tmp_path / "rank"
    program.write_text(f"#!/bin/sh\necho $WORLD_SIZE $LOCAL_RANK > {tmp_path}/rank$RANK\nexit {code}\n")
    program.chmod(0o755)
    settings = {"TAWIN_HEAD": f"127.0.0.1:{free_port()}", "TAWIN_NODES": "2", "TAWIN_JOB": "test"}
    done = forked.call([str(program), "2"], [environment(**settings)] * 2, 120, one_machine)
    assert done.returncode == code, done.stderr
    places = {path.name: path.read_text().split() for path in tmp_path.glob("rank[0-3]")}
    assert all(world == "4" for world, _ in places.values())
    if code == 0:  # otherwise the first machine ends the test
        assert sorted(local for _, local in places.values()) == ["0", "0", "1", "1"]


@pytest.mark.full
@pytest.mark.distributed
def test_a_run_on_two_machines_is_that_of_one(small_dataset: Path, finished_run: Path, tmp_path: Path):
    """Two machines are two process trees of this one, which know nothing of each other but the address."""
    words = [*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}", "compare.sft_continued=false"]
    (tmp_path / "empty.yaml").write_text("name: two\n")
    settings = {"TAWIN_HEAD": f"127.0.0.1:{free_port()}", "TAWIN_NODES": "2", "TAWIN_GPUS": "1", "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(
            ["bash", SCRIPT, "train", str(tmp_path / "empty.yaml"), *words], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment(**settings, TAWIN_VENV=str(Path(sys.executable).parents[1])),
        )
        for _ in range(2)
    ]  # fmt: skip
    ends = [(*machine.communicate(timeout=500), machine.returncode) for machine in machines]
    assert [code for _, _, code in ends] == [0, 0], ends
    assert_same_metrics(tmp_path / "run", finished_run, "sft", "rl")
