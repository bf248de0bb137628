"""Recipe options that the other runs leave at their defaults, each through the whole pipeline."""

import json
import math

import pytest

from tests.train.runs import SMALL, metrics, run

OPTIONS = {
    "sampled_vocab_ranking_swap": (
        "rl.negatives=sample rl.policy_space=vocab rl.reward=ranking reference.mode=swap rl.inner_updates=2 rl.kl=k2 "
        "rl.std=sample"
    ),
    "from_base_without_sft_with_validation": (
        "sft.enabled=false rl.init=base rl.rows=all trainer.val_check_interval=2 rl.length_norm=branching "
        "rl.schedule=cosine rl.tawin.target_k=2 rl.tawin.window=start rollout.width=6 rollout.length_penalty=0.5"
    ),
    "dapo_refills_with_a_smooth_reference": (
        "rl.algorithm=dapo rl.max_refill_batches=2 rl.ensure_target=off rl.clip_high=0.28 rl.beta=0.01 "
        "reference.refresh=ema reference.refresh_decay=0.5 rl.importance_cap=2 compare.sft_continued=false"
    ),
    "gspo_with_sft_term_and_weighted_insertions": (
        "rl.algorithm=gspo rl.inner_updates=2 rl.clip_low=3e-4 rl.clip_high=4e-4 rl.sft_weight=0.5 "
        "rl.inserted_weight=0.1 rl.beta=0.01 reference.mode=swap reference.refresh=every reference.refresh_steps=2 "
        "compare.sft_continued=false eval.splits=[valid]"
    ),
    "semantic_reward_on_distinct_draws": (
        "rl.negatives=dynamic rl.oversample=2 rl.reward=semantic rl.reward_weight=0.5 rl.ensure_target=off "
        "compare.sft_continued=false eval.splits=[valid]"
    ),
    "bf16_with_float32_reference_and_evaluation": (
        "model.precision=bf16 reference.precision=fp32 eval.precision=fp32 rl.beta=0.01 reference.refresh=ema "
        "sft.epochs=1 compare.sft_continued=false eval.splits=[valid]"
    ),
    "sft_in_trie_space_only": (
        "rl.enabled=false sft.loss_space=trie sft.schedule=linear sft.checks_per_epoch=2 sft.watch=ndcg "
        "eval.auc=true eval.auc_rows=8"
    ),
}


def test_the_last_step_is_saved_when_refills_use_up_the_prompts(small_dataset, tmp_path):
    """Without rl.max_steps, refills may end the stage before its planned number of steps."""
    options = (
        "rl.algorithm=dapo rl.max_refill_batches=2 rl.ensure_target=off rl.max_steps=0 rl.epochs=1 rl.rows=all "
        "sft.enabled=false rl.init=base trainer.save_interval=100 eval.splits=[valid]"
    ).split()
    run(*SMALL, *options, f"data.root={small_dataset}", f"run_dir={tmp_path}")
    lines = metrics(tmp_path, "rl")
    assert sum(1 + line["rl/refill_batches"] for line in lines) >= 192 / 8 > len(lines)
    assert (tmp_path / "rl" / "checkpoints" / f"step_{len(lines)}" / "state.json").is_file()


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name, small_dataset, tmp_path):
    summary = run(*SMALL, *OPTIONS[name].split(), f"data.root={small_dataset}", f"run_dir={tmp_path}")
    stages = [path.name for path in tmp_path.iterdir() if (path / "metrics.jsonl").is_file()]
    assert sorted(stages) == sorted(key for key in summary if isinstance(summary[key], dict))
    for stage in stages:
        assert all(math.isfinite(value) for line in metrics(tmp_path, stage) for value in line.values())
    if name == "sampled_vocab_ranking_swap":
        first, last = metrics(tmp_path, "rl")[0], metrics(tmp_path, "rl")[-1]
        # two inner updates: the statistics are those of the second, which no longer sees the rollout's own policy
        assert first["rl/ratio_mean"] != 1.0
        assert last["rl/kl"] > 0.0
    if name == "from_base_without_sft_with_validation":
        assert stages == ["rl"]
        assert [line["step"] for line in metrics(tmp_path, "rl") if "valid/ndcg@3" in line] == [2, 4]
    if name == "dapo_refills_with_a_smooth_reference":
        lines = metrics(tmp_path, "rl")
        assert all(0 <= line["rl/refill_batches"] <= 2 for line in lines)
        assert any(line["rl/refill_batches"] > 0 for line in lines)
        assert len(list((tmp_path / "rl" / "reference").iterdir())) >= 2
    if name == "gspo_with_sft_term_and_weighted_insertions":
        assert metrics(tmp_path, "rl")[-1]["rl/sft_loss"] > 0
        assert sorted(path.stem for path in (tmp_path / "rl" / "eval").glob("*.json")) == ["valid"]
        assert abs(metrics(tmp_path, "rl")[0]["rl/mismatch_kl"]) < 1e-6
    if name == "sft_in_trie_space_only":
        losses = [line["valid/loss"] for line in metrics(tmp_path, "sft") if "valid/loss" in line]
        assert losses[-1] < losses[0]
        ranked = json.loads((tmp_path / "sft" / "eval" / "test.auc.json").read_text())
        assert ranked["rows"] == 8
        assert 0.0 < ranked["means"]["auc"] <= 1.0
        beyond = json.loads((tmp_path / "sft" / "eval" / "test.json").read_text())["beyond"]
        assert beyond["beams_found@6"] == ranked["means"]["beams_found@6"]
