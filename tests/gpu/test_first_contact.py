"""``first_contact.sh`` on a CPU: every part runs on a tiny model, says so, and keeps to its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.gpu import contact_common, first_contact
from tests.gpu.contact_common import fresh
from tests.gpu.first_contact import function_of
from tests.gpu.parts import PartError
from tests.gpu.workload import Workload
from tests.simcuda import device

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the dry run of a machine without CUDA")


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TAWIN_GPU_DRY", "1")
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path


def script(folder: Path, *arguments: str, dry: str = "1", timeout: float = 300) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "TAWIN_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "TAWIN_GPU_DRY": dry,
        "OUT": str(folder),
    }
    command = ["bash", "tests/gpu/first_contact.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=REPOSITORY)


def test_every_part_has_a_limit_and_together_they_fit_twelve_minutes():
    assert first_contact.FUNCTIONS.keys() == first_contact.LIMITS_S.keys()
    assert all(callable(function_of(name)) for name in first_contact.FUNCTIONS)
    assert sum(first_contact.LIMITS_S.values()) <= first_contact.TOTAL_S == 720


def test_one_line_a_part_and_a_summary_that_says_dry(tmp_path):
    done = script(tmp_path, "--parts", "machine,sdpa")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stdout == (tmp_path / "first_contact.jsonl").read_text()
    assert [line.get("part") for line in lines] == ["machine", "sdpa", None]
    assert [line["status"] for line in lines[:2]] == ["passed", "passed"]
    assert {"with cudnn, causal", "without cudnn, masked"} <= lines[1].keys()
    assert lines[1]["with cudnn, masked"]["new_shape_ms"] > 0
    assert lines[2]["dry_run"] is True
    assert "no measurement" in lines[2]["note"]
    assert (lines[2]["failed"], lines[2]["not_run"]) == ([], [])


def test_without_a_gpu_nothing_runs(tmp_path):
    done = script(tmp_path, dry="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA device: nothing was run" in done.stderr


def test_a_part_that_hangs_or_fails_leaves_time_to_the_others(dry, monkeypatch):
    monkeypatch.setitem(first_contact.LIMITS_S, "sdpa", 1.0)
    code = {"machine": "import sys; sys.exit('ValueError: bad')", "sdpa": "import time; time.sleep(60)",
            "compile": "print('{\"figure\": 1}')"}  # fmt: skip
    found = list(first_contact.run_all(list(code), 60, command=lambda name: [sys.executable, "-S", "-c", code[name]]))
    assert [part["status"] for part in found] == ["failed", "failed", "passed"]
    assert found[0]["reason"].endswith("ValueError: bad")
    assert found[1]["reason"] == "did not end within 1 s"
    (late,) = first_contact.run_all(["update_3b"], 5)
    assert (late["status"], late["reason"]) == ("skipped", "5 s of 5 s left")


def test_no_length_of_a_timed_step_comes_twice(dry):
    given = fresh(6)
    load = Workload(given)
    rows = [set(load.rows_of_step(step).tolist()) for step in range(given.steps)]
    assert len(set.union(*rows)) == sum(map(len, rows)) == given.rows


# -- the parts -----------------------------------------------------------------------------------------------------
def test_a_first_run_resumes(dry):
    found = function_of("first_steps")()
    assert found["largest_weight_gap"] == 0.0
    assert found["resumed"] == found["losses"][1]
    assert len(list((dry / "first_steps").iterdir())) == 2


def test_attention_agrees_with_a_dense_softmax(dry):
    assert function_of("correctness")()["float32"] < 1e-5


def test_training_on_new_shapes_counts_operations(dry):
    found = function_of("train_new_shapes")()
    assert found["tokens_per_s"] > 0
    assert found["three_steps"]["operations"] > 100
    assert found["three_steps"]["launches"] == found["three_steps"]["device_busy"] == 0  # no GPU
    assert len(function_of("compile")()["search_s"]) == 5


def test_decoding_is_divided_into_calls_and_selection(dry):
    found = function_of("decode_7b")()
    two = found["2 prompts"]
    assert {"prefill", "extend", "logprobs"} == two["ms_per_call"].keys()
    assert two["calls"]["prefill"] == 1
    assert two["select_ms"] > 0
    assert found["search"]["operations"] > 100


def test_searches_in_graphs_stand_beside_the_usual_ones(dry):
    found = function_of("graphs")()
    assert found["8 prompts, equal items"] > 0.9
    assert found["1 prompts, graphs on"]["search_ms"] > 0
    assert found["1 prompts, graphs on"]["launches"] == 0  # no GPU


def test_updates_stand_beside_the_plan(dry):
    found = function_of("update_3b")()
    assert found["4 prompts"]["tokens"] > found["2 prompts"]["tokens"]
    assert 20 < found["plan_gib"] < 141


def test_a_checkpoint_is_taken_apart(dry):
    found = function_of("checkpoint")()
    assert found["bytes"] > 10_000
    assert {
        "copy_to_host_s",
        "write_and_hash_s",
        "check_and_load_s",
        "first_offload_s",
        "second_return_s",
    } < found.keys()


def test_equal_runs_have_equal_bytes_on_a_cpu(dry):
    found = function_of("determinism")()
    assert [found[name]["equal"] for name in ("as it is", "trainer.deterministic")] == [True, True]


# -- on the pretended device ---------------------------------------------------------------------------------------
def test_a_part_on_the_pretended_device_says_so(tmp_path):
    """The branches of a GPU run: the clock waits for the device, models and optimizer are on it."""
    environment = {**os.environ, "TAWIN_GPU_DRY": "pretended", "OUT": str(tmp_path)}
    done = forked.call(["--part", "first_steps"], [environment], 200, first_contact.main)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["device"], found["largest_weight_gap"]) == ("pretended", 0.0)
    (skipped,) = (json.loads(line) for line in pretended_lines(tmp_path, "graphs"))
    assert (skipped["status"], "no CUDA graphs" in skipped["reason"]) == ("skipped", True)


def pretended_lines(folder: Path, names: str) -> list[str]:
    """The lines of the parts in a pretended run, without the summary."""
    done = script(folder, "--parts", names, dry="pretended")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.splitlines()[:-1]


def test_what_a_gpu_would_refuse_fails_the_part(monkeypatch):
    monkeypatch.setenv("TAWIN_GPU_DRY", "pretended")
    contact_common.check_pretended()
    monkeypatch.setattr(device, "FAULTS", ["cpu and cuda in one operation"])
    with pytest.raises(PartError, match="cpu and cuda in one operation"):
        contact_common.check_pretended()
    monkeypatch.setenv("TAWIN_GPU_DRY", "1")
    contact_common.check_pretended()


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dry", ["1", "pretended"])
def test_all_parts_in_a_dry_run(dry, tmp_path):
    done = script(tmp_path, dry=dry, timeout=800)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["part"] for line in lines[:-1]] == list(first_contact.LIMITS_S)
    assert [line for line in lines if line.get("status") == "failed"] == []
    assert lines[-1]["not_run"] == (["graphs"] if dry == "pretended" else [])
