"""Whole runs with ``model.lora``: SFT, preference optimisation and RL of adapters over a pretrained model."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from tawin_nemo.models.megatron.checkpoint.dcp_load import ShardLoad
from tawin_nemo.run.trained import chosen_checkpoint
from tests.run.test_resume import signal_after
from tests.train import tiny_pretrained
from tests.train.runs import SMALL, assert_same_metrics, called, metrics, run

RANK = 3
LORA = [
    *SMALL, f"model.lora.rank={RANK}", "model.lora.alpha=12", "model.lora.dropout=0.1", "data.tokenizer=auto",
    "sft.lr=1e-2", "sft.warmup=2", "preference.enabled=true", "preference.algorithm=dpo", "preference.max_steps=3",
    "preference.global_batch_size=32", "preference.micro_batch_tokens=1024", "preference.lr=5e-3",
    "rl.init=preference", "rl.lr=5e-3", "rl.beta=0.01", "reference.mode=copy", "eval.splits=[test]",
]  # fmt: skip
STAGES = ("sft", "preference", "rl")
#: Relative; float32 sums in another order over two dozen optimizer steps.
LOSS_RTOL = 5e-4


@pytest.fixture(scope="module")
def base(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pretrained.write(tmp_path_factory.mktemp("base"), small_dataset)


def words(base: Path, dataset: Path, run_dir: Path, *more: str) -> list[str]:
    return [*LORA, f"model.init={base}", f"data.root={dataset}", f"run_dir={run_dir}", *more]


@pytest.fixture(scope="module")
def whole(base: Path, small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process that was never interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    run(*words(base, small_dataset, directory))
    return directory


def exported(run_dir: Path, stage: str, target: Path) -> dict[str, torch.Tensor]:
    run(f"checkpoint={run_dir / stage}", f"run_dir={run_dir}", f"convert.output={target}", verb="convert")
    return load_file(target / "model.safetensors")


def ranks(directory: Path) -> list[tuple[int, ...]]:
    return pl.read_parquet(directory / "test.per_user.parquet").select("row", "rank").rows()


def test_every_stage_learns_from_where_the_last_one_ended(whole: Path) -> None:
    losses = [line["valid/loss"] for line in metrics(whole, "sft") if "valid/loss" in line]
    assert losses[-1] < losses[0]
    first, *_, last = metrics(whole, "preference")
    # the reference of a stage is what it started from: the model of SFT, adapters merged, without new ones
    assert first["preference/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["preference/reward_margin"] == 0.0
    assert last["preference/reward_margin"] != 0.0
    rl = metrics(whole, "rl")
    assert rl[0]["rl/kl"] == 0.0
    assert abs(rl[0]["rl/ratio_mean"] - 1.0) < 1e-4
    assert rl[-1]["rl/kl"] > 1e-7


def test_checkpoints_hold_adapters_only_and_name_their_base(base: Path, whole: Path) -> None:
    below = {}
    for stage in STAGES:
        step = chosen_checkpoint(whole / stage)
        record = json.loads((step / "state.json").read_text())
        names = ShardLoad(record["files"].keys()).load_sharded_metadata(step).keys()
        assert len(names) > 8
        assert all(".lora." in name for name in names), names
        assert record["lora"]["rank"] == RANK
        below[stage] = record["base"]
    assert (below["sft"]["kind"], below["sft"]["source"]) == ("pretrained", str(base))
    assert below["preference"]["source"] == str(chosen_checkpoint(whole / "sft").relative_to(whole))
    assert below["rl"]["source"] == str(chosen_checkpoint(whole / "preference").relative_to(whole))
    assert len({entry["fingerprint"] for entry in below.values()}) == 3


def test_exports_are_the_base_plus_matrices_of_the_rank(base: Path, whole: Path, tmp_path: Path) -> None:
    before = load_file(base / "model.safetensors")
    for number, stage in enumerate(STAGES, 1):
        after = exported(whole, stage, tmp_path / stage)
        for name, weight in before.items():
            moved = after[name][: len(weight)] - weight[: len(after[name])]
            if not name.endswith("_proj.weight"):
                assert not moved.any(), name
                continue
            singular = torch.linalg.svdvals(moved.double())
            assert singular[0] > 1e-3, name
            assert (singular[number * RANK :] < 1e-5 * singular[0]).all(), name


def test_verbs_use_the_merged_model_and_give_the_results_of_the_run(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "moved"  # bases inside the run directory are found wherever it lies
    shutil.copytree(whole, copy)
    result = run(f"checkpoint={copy / 'rl'}", f"run_dir={copy}", "eval.splits=[test]", verb="evaluate")
    expected = json.loads((whole / "rl" / "eval" / "test.json").read_text())["means"]
    assert {key: result["test"][key] for key in expected} == expected


def test_killed_and_restarted_equals_uninterrupted(
    base: Path, small_dataset: Path, whole: Path, tmp_path: Path
) -> None:
    arguments = words(base, small_dataset, tmp_path / "run")
    signal_after(arguments, tmp_path / "run" / "rl" / "metrics.jsonl", 2, signal.SIGKILL)
    run(*arguments)
    for stage in STAGES:
        for file in ("metrics.jsonl", "eval/test.json"):
            assert (tmp_path / "run" / stage / file).read_bytes() == (whole / stage / file).read_bytes(), stage
    ours, expected = exported(tmp_path / "run", "rl", tmp_path / "a"), exported(whole, "rl", tmp_path / "b")
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_a_changed_base_is_refused_and_a_copy_of_it_is_not(
    base: Path, small_dataset: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "copy of base"
    shutil.copytree(whole, run_dir)
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    evaluate = [f"checkpoint={run_dir / 'rl'}", f"run_dir={run_dir}"]
    shutil.copytree(base, moved)
    hidden = base.with_name("hidden")
    base.rename(hidden)
    try:
        gone = called(*evaluate, verb="evaluate")
        assert gone.returncode == 2, gone.stderr
        assert f"{base}/config.json does not exist" in gone.stderr
        other = called(*evaluate, f"model.init={changed}", verb="evaluate")
        assert other.returncode == 2, other.stderr
        assert "have changed: it holds adapters to" in other.stderr
        assert str(changed) in other.stderr
        run(*evaluate, f"model.init={moved}", verb="evaluate")
    finally:
        hidden.rename(base)
    shutil.rmtree(run_dir / "preference" / "checkpoints")
    lost = called(*evaluate, verb="evaluate")
    assert lost.returncode == 2, lost.stderr
    assert "preference/checkpoints" in lost.stderr
    assert "adapters alone are no model" in lost.stderr


@pytest.mark.full
def test_a_run_that_continues_over_another_base_is_refused(base: Path, small_dataset: Path, tmp_path: Path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    arguments = words(own, small_dataset, tmp_path / "run", "rl.enabled=false", "preference.enabled=false")
    signal_after(arguments, tmp_path / "run" / "sft" / "metrics.jsonl", 3, signal.SIGKILL)
    tiny_pretrained.write(own, small_dataset, seed=6)
    done = called(*arguments)
    assert done.returncode == 2, done.stderr
    assert "the frozen weights below" in done.stderr
    assert "have changed" in done.stderr


def test_adapters_and_whole_weights_start_from_each_other(
    base: Path, small_dataset: Path, whole: Path, tmp_path: Path
) -> None:
    """All weights are trained from merged adapters on; then new adapters from those weights on."""
    quick = ["sft.enabled=false", "preference.enabled=false", "rl.init=base", "rl.max_steps=1", "rl.lr=1e-3"]
    first, second = tmp_path / "first", tmp_path / "second"
    run(*words(base, small_dataset, first, *quick, "model.lora.rank=0", f"start={whole / 'sft'}"))
    assert "base" not in json.loads((chosen_checkpoint(first / "rl") / "state.json").read_text())
    run(*words(base, small_dataset, second, *quick, f"start={first / 'rl'}"))
    record = json.loads((chosen_checkpoint(second / "rl") / "state.json").read_text())
    assert record["base"]["source"] == str(chosen_checkpoint(first / "rl"))
    one, two = exported(first, "rl", tmp_path / "a"), exported(second, "rl", tmp_path / "b")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.linalg.matrix_rank((two[name] - one[name]).double().numpy(), tol=1e-7) == RANK
    refused = called(*words(base, small_dataset, first, *quick, f"start={whole / 'sft'}"))
    assert refused.returncode == 2, refused.stderr
    assert "model.lora.rank: 0 -> 3" in refused.stderr


LAYOUTS = {
    "tp2_sp": "model.tensor_model_parallel_size=2 model.sequence_parallel=true trainer.async_save=true",
    "pp2, searches in one process": "model.pipeline_model_parallel_size=2 rollout.pipeline_model_parallel_size=1",
    "dp2": "trainer.offload_optimizer=true",
    "searches apart": "rollout.placement=separate rollout.devices=1",
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith("pp2") else pytest.mark.full) for name in LAYOUTS]
)
def test_losses_equal_one_process(name: str, base: Path, small_dataset: Path, plainly: Path, tmp_path: Path) -> None:
    run(*words(base, small_dataset, tmp_path, *PLAIN, *LAYOUTS[name].split(), "trainer.devices=2"))
    for stage in ("sft", "rl"):
        assert_same_metrics(tmp_path, plainly, stage, rtol=LOSS_RTOL)
        assert ranks(tmp_path / stage / "eval") == ranks(plainly / stage / "eval")


#: Dropout draws other numbers on other ranks.
PLAIN = ["model.lora.dropout=0", "preference.enabled=false", "rl.init=sft", "compare.sft_continued=false"]


@pytest.fixture(scope="module")
def plainly(base: Path, small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plainly")
    run(*words(base, small_dataset, directory, *PLAIN))
    return directory
