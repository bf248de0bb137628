"""The verb: exit codes, the table, the JSON object; libraries and the all-reduce are stood in for."""

import json
import subprocess
import sys

import pytest

from tawin_nemo.tools.doctor import verb
from tawin_nemo.tools.doctor.check import Check, Status
from tawin_nemo.tools.doctor.probe import Found, Library

FOUND = Found({name: Library("1.0") for name in ("torch", "megatron.core", "transformers")})
NANO = ("model.backbone=nano", "data.dataset=synthetic")


@pytest.fixture
def stand_ins(monkeypatch):
    calls: dict[str, object] = {}

    def probe(names: tuple[str, ...] = ("all",)) -> Found:
        calls["imports"] = names
        return FOUND

    def all_reduce(found: Found, processes: int, *, launched: bool) -> Check:
        calls["all-reduce"] = (processes, launched)
        return Check("all-reduce", Status.OK, "2 processes")

    monkeypatch.setattr(verb, "probe", probe)
    monkeypatch.setattr(verb, "all_reduce", all_reduce)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    return calls


def names(result: dict) -> list[str]:
    return [item["name"] for item in result["checks"]]


def test_a_machine_without_recipe(stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result, code = verb.run_doctor(None, [])
    assert code == 0, result["failed"]
    assert result["can_run"]
    assert stand_ins["all-reduce"] == (8, False)
    for name in ("Python", "torch", "NCCL", "GPU links", "apex", "shared memory", "clock", "ports", "all-reduce"):
        assert name in names(result)
    assert "data" not in names(result)
    table = capsys.readouterr().err
    assert "not here  NVIDIA driver" in table or "NVIDIA driver" in table
    json.dumps(result)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_can_run_here(stand_ins, tmp_path):
    result, code = verb.run_doctor(None, [*NANO, f"run_dir={tmp_path}/x"])
    assert (code, result["can_run"]) == (0, True), result["failed"]
    for name in ("recipe", "data", "devices", "model.init", "tokenizer", "layout", "memory for the model"):
        assert name in names(result)


def test_the_first_failure_is_said_last_with_its_remedy(stand_ins, tmp_path, capsys):
    overrides = [*NANO, f"run_dir={tmp_path}/x", "model.init=nowhere", "model.precision=fp8-blockwise"]
    result, code = verb.run_doctor(None, overrides)
    assert code == 2
    assert result["failed"][0] == "Transformer Engine"
    assert {"model.init", "model.precision"} <= set(result["failed"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "cannot run here: Transformer Engine: not installed; bash recipes/install_gpu.sh" in last


def test_a_recipe_that_cannot_be_read_still_gets_the_table(stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result, code = verb.run_doctor("recipes/nowhere.yaml", [])
    assert (code, result["failed"]) == (2, ["recipe"])
    assert "Python" in names(result)


def test_quick_leaves_out_what_takes_time(stand_ins, tmp_path):
    result, _ = verb.run_doctor(None, [*NANO, f"run_dir={tmp_path}"], quick=True)
    assert stand_ins == {"imports": ("torch",)}
    assert not {"all-reduce", "megatron-core"} & set(names(result))


def test_one_process_per_machine_looks_the_others_take_part(stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    result, code = verb.run_doctor(None, [*NANO], launched=True)
    assert (code, names(result)) == (0, ["recipe", "all-reduce"])
    assert stand_ins["all-reduce"] == (1, True)
    assert capsys.readouterr().err == ""


def test_a_baseline_has_no_language_model_to_check(stand_ins, tmp_path):
    overrides = ["baseline.model=sasrec", "data.dataset=synthetic", f"run_dir={tmp_path}"]
    result, _ = verb.run_doctor(None, overrides)
    assert "data" in names(result)
    assert "layout" not in names(result)


@pytest.mark.distributed
def test_the_command_line_with_real_libraries_and_processes(tmp_path):
    command = [sys.executable, "-m", "tawin_nemo", "doctor", *NANO, f"run_dir={tmp_path}/x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    found = {item["name"]: item for item in result["checks"]}
    assert found["megatron-core"]["value"].startswith("0.16")
    assert "processes: sums are right" in found["all-reduce"]["value"]
    assert "ok        all-reduce" in done.stderr
