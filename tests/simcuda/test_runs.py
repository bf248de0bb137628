"""Whole pipelines on a pretended GPU: no mixed devices, no host tensor over NCCL, no unfinished copy, anywhere.

Each run takes many options at once. They end with exit code 97 (``runs.FAULTY``) when a fault was caught on its way.
"""

import json
import math
from pathlib import Path

import pytest

from tests.simcuda import runs
from tests.train.runs import SMALL, metrics

#: Over ``SMALL``: every operation costs several times its usual time here.
SHORT = (
    "data.train_limit=96 data.eval_limit=12 sft.epochs=1 rl.max_steps=3 rl.beta=0.01 compare.sft_continued=false "
    "eval.splits=[valid]"
).split()
#: Two runs of one process and one of two: together they take every option of a step at least once.
BF16_COPY = (
    "model.precision=bf16 rl.negatives=beam rl.policy_space=trie rl.reward=ranking reference.mode=copy "
    "rl.sft_weight=0.3 rl.inserted_correction=ratio trainer.offload_optimizer=true "
    "trainer.async_save=true eval.precision=fp32"
)
FP32_SWAP = (
    "preference.enabled=true preference.algorithm=sdpo preference.max_steps=2 preference.global_batch_size=16 "
    "preference.micro_batch_tokens=1024 rl.init=preference sft.loss_space=trie model.recompute=selective "
    "rl.negatives=dynamic rl.policy_space=vocab rl.algorithm=dapo rl.max_refill_batches=2 "
    "rl.ensure_target=off reference.mode=swap reference.refresh=ema reference.refresh_decay=0.5 eval.precision=bf16"
)
TP2_SP = (
    "trainer.devices=2 model.tensor_model_parallel_size=2 model.sequence_parallel=true model.precision=bf16 "
    "rl.algorithm=gspo rl.negatives=sample rl.ensure_target=off rl.importance_cap=2 reference.mode=swap"
)


def arguments(dataset: Path, directory: Path, options: str) -> list[str]:
    return [*SMALL, *SHORT, *options.split(), f"data.root={dataset}", f"run_dir={directory}"]


def check(directory: Path, *stages: str) -> None:
    """Every stage has finite metrics and a checkpoint, every rank a GPU; there is a report."""
    for stage in stages:
        lines = metrics(directory, stage)
        assert all(math.isfinite(value) for line in lines for value in line.values())
        assert list((directory / stage / "checkpoints").glob("step_*/state.json"))
    layout = json.loads((directory / "layout.json").read_text())
    assert {rank["device"] for rank in layout if "device" in rank} == {"NVIDIA H200"}
    assert (directory / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_run_killed_and_continued(small_dataset, tmp_path, monkeypatch):
    """bf16, beam negatives, ranking reward, KL to a copy, SFT term, offload, background checkpoints, resume in RL."""
    words = arguments(small_dataset, tmp_path, BF16_COPY)
    with monkeypatch.context() as patch:
        patch.setenv("TAWIN_FAILPOINTS", "rl.after_rollout=kill@2")
        assert runs.called(*words).returncode == -9
    assert len(metrics(tmp_path, "rl")) == 1
    runs.run(*words)
    check(tmp_path, "sft", "rl")
    assert [line["step"] for line in metrics(tmp_path, "rl")] == [1, 2, 3]


@pytest.mark.slow
def test_a_preference_stage_and_rl_in_vocabulary_space(small_dataset, tmp_path):
    """fp32, SFT in trie space, S-DPO, DAPO with refills, dynamic negatives, a reference that is swapped in and
    follows."""
    runs.run(*arguments(small_dataset, tmp_path, FP32_SWAP))
    check(tmp_path, "sft", "preference", "rl")
    assert any(line["rl/refill_batches"] > 0 for line in metrics(tmp_path, "rl"))


@pytest.mark.distributed
@pytest.mark.slow
def test_tensor_and_sequence_parallelism(small_dataset, tmp_path):
    runs.run(*arguments(small_dataset, tmp_path, TP2_SP))
    check(tmp_path, "sft", "rl")
