"""SFT and RL give the one-process losses under TP2, PP2, TP2 + sequence parallel, DP2 + distributed optimizer.

One of them searches under another layout than it trains (more of these: tests/distributed/test_rollout_layouts.py).
Not covered here: NCCL, mixed precision. All runs start from the same weights because initial
weights depend on the seed only. Differences come from the order of float32 sums.
"""

import json
import math

import polars as pl
import pytest

from tests.train.runs import LOSS_RTOL, SMALL, assert_same_metrics, metrics, run

LAYOUTS = {
    "tp2": ("model.tensor_model_parallel_size=2", {"tp_size": 2, "pp_size": 1, "dp_size": 1}),
    "pp2": ("model.pipeline_model_parallel_size=2", {"tp_size": 1, "pp_size": 2, "dp_size": 1}),
    "pp2_rollout_dp2": (
        "model.pipeline_model_parallel_size=2 rollout.pipeline_model_parallel_size=1",
        {"tp_size": 1, "pp_size": 2, "dp_size": 1},
    ),
    "tp2_sp": (
        "model.tensor_model_parallel_size=2 model.sequence_parallel=true",
        {"tp_size": 2, "pp_size": 1, "dp_size": 1},
    ),
    "dp2_distributed_optimizer": ("trainer.distributed_optimizer=true", {"tp_size": 1, "pp_size": 1, "dp_size": 2}),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_equal_one_process(name, small_dataset, finished_run, tmp_path):
    overrides, sizes = LAYOUTS[name]
    run(*SMALL, *overrides.split(), "trainer.devices=2", f"data.root={small_dataset}", f"run_dir={tmp_path}")
    ranks = json.loads((tmp_path / "layout.json").read_text())
    whole = json.loads((finished_run / "layout.json").read_text())[0]["parameters"]
    assert len(ranks) == 2
    for rank in ranks:
        assert {key: rank[key] for key in sizes} == sizes
        # the norms are replicated under TP and the tied embedding stands on both pipeline stages
        assert rank["parameters"] == whole if sizes["dp_size"] == 2 else rank["parameters"] < 0.8 * whole
    assert all(line["rl/reward"] > 0 and line["grad_norm"] > 1e-3 for line in metrics(finished_run, "rl"))
    stages = ("sft", "sft_continued", "rl")
    assert_same_metrics(tmp_path, finished_run, *stages)
    for stage in stages:
        assert evaluated(tmp_path, stage) == evaluated(finished_run, stage)


def evaluated(run_dir, stage):
    """Places of the targets of all test rows in their lists."""
    table = pl.read_parquet(run_dir / stage / "eval" / "test.per_user.parquet")
    return table.select("row", "rank").rows()


OPTIONS = (
    "rl.algorithm=dapo rl.max_refill_batches=2 rl.ensure_target=off rl.sft_weight=0.3 rl.beta=0.01 rl.inner_updates=2 "
    "rl.negatives=dynamic reference.refresh=ema reference.refresh_decay=0.5 compare.sft_continued=false "
    "eval.splits=[valid]"
).split()


@pytest.mark.distributed
def test_refills_and_the_sft_term_do_not_depend_on_the_replicas(small_dataset, tmp_path):
    """Which groups are kept, how often rollouts are refilled and every count is global."""
    for devices in (1, 2):
        where = (f"trainer.devices={devices}", f"data.root={small_dataset}", f"run_dir={tmp_path / str(devices)}")
        run(*SMALL, *OPTIONS, *where)
    assert any(line["rl/refill_batches"] > 0 for line in metrics(tmp_path / "1", "rl"))
    assert_same_metrics(tmp_path / "2", tmp_path / "1", "rl")


def test_the_tolerance_would_notice_another_seed(small_dataset, finished_run, tmp_path):
    run(*SMALL, "seed=43", "rl.enabled=false", f"data.root={small_dataset}", f"run_dir={tmp_path}")
    ours, expected = metrics(tmp_path, "sft")[-1], metrics(finished_run, "sft")[-1]
    key = "valid/loss"
    assert not math.isclose(ours[key], expected[key], rel_tol=LOSS_RTOL)
