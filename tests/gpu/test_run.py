"""The script itself, on a CPU: parts run alone, failures are reported, a dry run calls itself one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import parts, run, workload
from tests.gpu.records import verified_precisions
from tests.gpu.split_model import run_split_model

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the dry run of a machine without CUDA")


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAWIN_GPU_DRY", "1")


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TAWIN_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", "tests/gpu/run.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=env, cwd=REPOSITORY)


def test_a_dry_run_prints_one_json_that_is_no_measurement(tmp_path):
    file = tmp_path / "gpu_dry.json"
    done = script("--parts", "train_bf16,train_fp8-delayed", "--json", str(file), TAWIN_GPU_DRY="1")
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == json.loads(file.read_text())
    assert said["dry_run"] is True
    assert {"command", "commit", "date", "machine", "sizes", "parts", "failed"} <= said.keys()
    assert "no measurement" in said["note"]
    trained, skipped = said["parts"]["train_bf16"], said["parts"]["train_fp8-delayed"]
    assert trained["status"] == "passed"
    assert len(trained["losses"]) == trained["steps"] == workload.TINY.steps
    assert trained["tokens_per_s"] > 0
    assert trained["mfu"] is trained["peak_memory_gib"] is None
    assert skipped["status"] == "skipped"
    assert "needs a CUDA device" in skipped["reason"]
    assert said["failed"] == []
    assert verified_precisions(tmp_path) == set()


def test_without_a_gpu_nothing_runs_and_it_is_said():
    done = script("--parts", "attention", TAWIN_GPU_DRY="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no CUDA device: nothing was run" in done.stderr


def test_an_unknown_part_is_named():
    with pytest.raises(SystemExit):
        run.arguments(["--parts", "attention,tran_bf16"])


# -- the parts -----------------------------------------------------------------------------------------------------
def test_every_name_has_a_part():
    assert tuple(parts.PARTS) == run.NAMES


def test_attention_against_a_dense_softmax(dry):
    found = parts.attention()
    assert set(found["float32"]) == {"output", "query", "key", "value"}


def test_a_wrong_mask_is_noticed(dry, monkeypatch):
    wrong = parts.dense
    monkeypatch.setattr(parts, "dense", lambda batch, query, key, value: wrong(batch, query, key, value.roll(1, 0)))
    with pytest.raises(parts.PartError, match="above"):
        parts.attention()


def test_both_formats_agree(dry):
    assert 0 < parts.bf16_vs_fp32()["logp_mean_difference"] <= parts.LOGP_TOLERANCE


def test_mismatch_is_reported(dry):
    assert 0 <= parts.mismatch("bf16")["mismatch_prob_error"] <= parts.MISMATCH_TOLERANCE["bf16"]


@pytest.mark.full
@pytest.mark.distributed
def test_a_model_split_over_two_processes_updates_and_searches():
    """What test_on_gpu.py runs in FP8 on two GPUs."""
    for order in ("update,search,update", "search,update"):
        run_split_model("fp32", order)


def test_trees_have_the_shape_of_rollouts():
    load = workload.Workload(workload.TINY)
    for step in (0, 1, 2):
        micro = list(load.micro_batches(step))
        assert sum(len(part.batch.chain_B) for part in micro) == workload.TINY.prompts
        assert all(part.batch.tree_B.min() > 0 for part in micro)
    assert all(len(set(row.tolist())) == workload.TINY.candidates for row in load.candidates_RG)
    assert (load.candidates_RG[:, 0] == load.target_R).all()


# -- how they are run ----------------------------------------------------------------------------------------------
SAYS = {
    "attention": "print('noise'); print('{\"figure\": 1}')",
    "nccl": "import sys; print('Traceback', file=sys.stderr); sys.exit('ValueError: too bad')",
    "train_bf16": "print('not json')",
}


def test_failing_and_hanging_parts_are_reported_and_the_rest_runs(dry):
    found = run.run_parts(list(SAYS), command=lambda name: [sys.executable, "-S", "-c", SAYS[name]])
    states = {name: part["status"] for name, part in found.items()}
    assert states == {"attention": "passed", "nccl": "failed", "train_bf16": "failed"}
    assert found["attention"]["figure"] == 1
    assert found["nccl"]["reason"] == "exit code 1: ValueError: too bad"
    hangs = run.run_part("attention", [sys.executable, "-S", "-c", "import time; time.sleep(60)"], limit_s=1)
    assert hangs["reason"] == "did not end within 1 s"


def test_fp8_has_to_end_where_bf16_ends():
    def curve(last: float) -> dict[str, object]:
        return {"status": "passed", "last": last, "tokens_per_s": 10.0 * last}

    found = {"train_bf16": curve(2.0), "train_fp8-delayed": curve(2.08), "train_fp8-blockwise": curve(2.2)}
    found["train_fp8-tensorwise"] = {"status": "skipped"}
    run.compare_curves(found)
    assert found["train_fp8-delayed"]["status"] == "passed"
    assert found["train_fp8-delayed"]["gap_to_bf16"] == pytest.approx(0.04)
    assert found["train_fp8-blockwise"]["status"] == "failed"
    assert "+10.0% from bf16" in str(found["train_fp8-blockwise"]["reason"])
