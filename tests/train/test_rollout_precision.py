"""Runs whose rollouts have another precision than training: what is logged, and what evaluation runs in."""

import json
import math

import pytest

from tests.train.runs import SMALL, called, metrics, run

RL = ("sft.enabled=false", "rl.init=base", "compare.sft_continued=false", "rl.ensure_target=off")
OVERLAP = "rl/mismatch_beam_overlap"


def overlaps(run_dir):
    return [line.get(OVERLAP) for line in metrics(run_dir, "rl")]


def test_rollouts_in_bf16_beside_training_in_float32(small_dataset, tmp_path):
    data = f"data.root={small_dataset}"
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    run(*SMALL, *RL, data, f"run_dir={wide}")
    run(*SMALL, *RL, data, f"run_dir={narrow}", "rollout.precision=bf16", "rollout.overlap_interval=2")
    assert overlaps(wide) == [None] * 4
    shares = overlaps(narrow)
    assert [share is None for share in shares] == [False, True, False, True]
    assert all(0.5 < share <= 1 for share in shares[::2]), shares
    first = {path: metrics(path, "rl")[0] for path in (wide, narrow)}
    assert abs(first[wide]["rl/mismatch_prob_error"]) < 1e-5 < first[narrow]["rl/mismatch_prob_error"] < 0.1
    # validation searches in the precision of rollouts, the finished stage in that of the model
    again = json.loads((narrow / "rl" / "eval" / "test.json").read_text())
    checked = run(*SMALL, *RL, data, f"run_dir={tmp_path / 'eval'}", f"checkpoint={narrow}/rl", verb="evaluate")
    assert math.isclose(checked["test"]["ndcg@3"], again["means"]["ndcg@3"], abs_tol=1e-12), (checked, again)


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize(
    "placed",
    [
        "trainer.devices=2 rollout.placement=separate rollout.devices=1",
        "trainer.devices=2 model.tensor_model_parallel_size=2 rollout.tensor_model_parallel_size=1",
        "trainer.devices=2 model.tensor_model_parallel_size=2",
        "trainer.devices=2",
    ],
)
@pytest.mark.parametrize("precisions", [("fp32", "bf16"), ("bf16", "fp32")], ids="-".join)
def test_in_every_placement(placed, precisions, small_dataset, tmp_path):
    trained, rollout = precisions
    keys = [f"model.precision={trained}", f"rollout.precision={rollout}", "rollout.overlap_interval=1"]
    run(*SMALL, *RL, f"data.root={small_dataset}", f"run_dir={tmp_path}", *keys, *placed.split())
    assert all(0.5 < share <= 1 for share in overlaps(tmp_path))


@pytest.mark.full
def test_what_this_machine_cannot_run_is_refused_before_it_starts(small_dataset, tmp_path):
    refused = called(*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}", "rollout.precision=fp8-blockwise")
    assert refused.returncode == 2
    assert "rollout.precision=fp8-blockwise needs a CUDA device" in refused.stderr
