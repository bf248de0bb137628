"""Timings, MFU and profiles: the arithmetic, the files, and what a whole run leaves behind."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tawin_nemo.commands import session
from tawin_nemo.config.backbones import BACKBONES, FlopCount
from tawin_nemo.config.gpus import known_peak
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import ModelConfig, Recipe, TrainerConfig
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.lm import MeteredLM
from tawin_nemo.run import mfu
from tawin_nemo.run.stage import Progress, Stage
from tawin_nemo.run.timers import Timers, count_update
from tawin_nemo.train.pipeline import earlier_seconds
from tawin_nemo.types import Children, DataParallel, TokenBatch, TokenRows
from tawin_nemo.util.errors import ConfigError

QWEN = BACKBONES["qwen2.5-0.5b"]
PHASES = {"data", "generate", "reward", "reference", "update", "sync"}


# -- MFU -----------------------------------------------------------------------------------------------------------
def test_forward_flops_are_twice_the_multiply_adds():
    assert FlopCount(tokens=1).forward_flops(QWEN) == 2 * QWEN.body_parameters
    assert FlopCount(logits=QWEN.vocab).forward_flops(QWEN) == 2 * 896 * 151_936
    assert FlopCount(pairs=1).forward_flops(QWEN) == 24 * 14 * 64 * 4  # layers, heads, channels; q.k and p.v, 2 each
    both = FlopCount(3, 5.0, 7) + FlopCount(1, 2.0, 3)
    assert both == FlopCount(4, 7.0, 10)


def two_leaf_tree(children: Children | None) -> TokenBatch:
    """A prompt of 3 tokens and two tokens that fork behind it."""
    as_tensor = torch.tensor
    return TokenBatch(
        tokens_S=as_tensor([1, 2, 3, 4, 5]), position_S=as_tensor([0, 1, 2, 3, 3]), end_S=as_tensor([5, 5, 5, 4, 5]),
        chain_B=as_tensor([3]), tree_B=as_tensor([2]), index_P=as_tensor([2, 3]), row_N=as_tensor([0, 0, 1]),
        target_N=as_tensor([4, 5, 6]), children=children,
    )  # fmt: skip


def test_a_tree_counts_every_token_and_every_visible_pair_once():
    # 3 prompt tokens see 1 + 2 + 3, each of the two leaves sees the prompt and itself
    assert mfu.forward_flop_count([two_leaf_tree(None)], vocab=100) == FlopCount(5, 6.0 + 2 * 4, 2 * 100)
    edges = Children(torch.tensor([0, 0, 0, 1, 1]), torch.arange(5), torch.tensor([0, 1, 3]))
    assert mfu.forward_flop_count([two_leaf_tree(edges)] * 2, vocab=100) == FlopCount(10, 28.0, 10)
    once = mfu.forward_flop_count([two_leaf_tree(None)], QWEN.vocab).forward_flops(QWEN)
    assert mfu.training_flops([two_leaf_tree(None)], QWEN) == 3 * once


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "fp8-blockwise", 1979.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA A100-SXM4-80GB", "fp8-delayed", None),
        ("some other card", "bf16", None),
    ],
)
def test_peaks_of_known_devices(name: str, precision: str, tflops: float | None):
    assert known_peak(name, precision) == tflops


def test_the_peak_can_be_set_and_is_measured_otherwise(monkeypatch: pytest.MonkeyPatch):
    recipe = Recipe(trainer=TrainerConfig(peak_tflops=3.5))
    assert mfu.peak_flops(recipe) == 3.5e12
    assert 1e-4 < mfu.matmul_tflops(torch.float32, seconds=0.01) < 1e3
    monkeypatch.setattr(mfu.disaggregated, "job_size", lambda: 4)
    assert mfu.total_peak_flops(recipe) == 4 * 3.5e12


def test_metered_lm_counts_rows_pairs_and_head_rows():
    silent = SimpleNamespace(
        vocab_size=50, max_positions=9, prefill=lambda prompts: "cache", rows=lambda cache: 7,
        extend=lambda cache, parent, chains: "longer", logprobs=lambda *a: "logp",
    )  # fmt: skip
    lm = MeteredLM(silent)
    assert (lm.vocab_size, lm.max_positions, lm.rows("cache")) == (50, 9, 7)
    assert lm.prefill(TokenRows.from_lists([[1, 2, 3], [4]])) == "cache"
    assert lm.extend("cache", torch.tensor([0, 1]), TokenRows.from_lists([[5, 6], [7]])) == "longer"
    rows, edges = torch.tensor([0, 1]), torch.tensor([0, 0, 1])
    assert lm.logprobs("longer", rows, edges, edges, "trie") == "logp"
    lm.logprobs("longer", rows, edges, edges, "vocab")
    assert lm.pop_flops() == FlopCount(tokens=4 + 3, pairs=6.0 + 1.0 + 3 * 2.0, logits=3 + 2 * 50)
    assert lm.pop_flops() == FlopCount()


# -- timers --------------------------------------------------------------------------------------------------------
def test_timers_report_rates_and_utilisation_over_all_replicas():
    timers = Timers(peak_flops=1e6, dp=DataParallel(0, 2, lambda value: [value, value]))
    with timers("update"):
        time.sleep(0.02)
    with timers("data"):
        time.sleep(0.01)
    with timers("update"):
        time.sleep(0.02)
    timers.count("update", tokens=10, rows=30, flops=1e3)
    facts = timers.report()
    assert 0.04 <= facts["seconds/update"] < 0.4
    assert 0.01 <= facts["seconds/data"] < 0.1
    assert facts["rows/update"] == 60
    np.testing.assert_allclose(facts["tokens_per_second/update"], 20 / facts["seconds/update"], rtol=1e-4)
    np.testing.assert_allclose(facts["mfu/update"], 2e3 / (facts["seconds/update"] * 1e6), rtol=1e-4)
    whole = facts["seconds/update"] + facts["seconds/data"]
    np.testing.assert_allclose(facts["mfu/step"], 2e3 / (whole * 1e6), rtol=1e-4)
    assert timers.report() == {}


def test_a_run_writes_timings_of_every_phase_and_none_of_them_into_metrics(finished_run):
    lines = [json.loads(line) for line in (finished_run / "rl" / "timings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {name for name in line if name.startswith("seconds/")} == {f"seconds/{phase}" for phase in PHASES}
        assert sum(line[f"seconds/{phase}"] for phase in PHASES) <= line["seconds"] + 1e-3
        for phase in ("generate", "reference", "update"):
            assert line[f"tokens_per_second/{phase}"] > 0
            assert line[f"rows/{phase}"] > 0
            assert 0 < line[f"mfu/{phase}"] < 1
        assert 0 < line["mfu/step"] < 1
    (layout,) = json.loads((finished_run / "layout.json").read_text())
    assert layout["device"] == "cpu"
    assert layout["peak_tflops"] > 0
    sft = [json.loads(line) for line in (finished_run / "sft" / "timings.jsonl").read_text().splitlines()]
    updates = [line for line in sft if "seconds/update" in line]
    assert len(updates) == 10
    assert all(0 < line["mfu/update"] < 1 for line in updates)
    for stage in ("sft", "rl"):
        assert not any(word in (finished_run / stage / "metrics.jsonl").read_text() for word in ("seconds", "mfu"))


def test_a_stage_sends_timings_to_the_loggers_but_not_to_metrics(tmp_path):
    runtime.initialize(ModelConfig(), seed=0)
    sent: list[tuple[str, int, dict[str, float]]] = []
    stage = Stage(tmp_path / "rl", TrainerConfig(), sink=lambda *given: sent.append(given))
    stage.write(1, {"rl/loss": 0.5}, {"seconds/update": 0.25})
    stage.write(2, {"rl/loss": 0.4})
    assert sent == [("rl", 1, {"rl/loss": 0.5, "seconds/update": 0.25}), ("rl", 2, {"rl/loss": 0.4})]
    assert (
        tmp_path / "rl" / "metrics.jsonl"
    ).read_text() == '{"step": 1, "rl/loss": 0.5}\n{"step": 2, "rl/loss": 0.4}\n'
    first, second = map(json.loads, (tmp_path / "rl" / "timings.jsonl").read_text().splitlines())
    assert (first["step"], first["seconds/update"], second["step"]) == (1, 0.25, 2)
    assert second.keys() == {"step", "seconds", "time"}


# -- profiles ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [3, 6])
def test_profile_torch_writes_a_trace_and_a_table(tmp_path, steps: int):
    runtime.initialize(ModelConfig(), seed=0)
    stage = Stage(tmp_path / "rl", TrainerConfig(), profile="torch")
    for step in stage.steps(0, steps):
        with torch.profiler.record_function(f"step {step + 1}"):
            torch.randn(8, 8) @ torch.randn(8, 8)
    stage.finish(Progress(step=steps), chosen_step=steps)
    trace = json.loads((tmp_path / "rl" / "profile" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {f"step {n}" for n in range(1, steps + 1)} & names == {f"step {n}" for n in range(2, min(steps, 4) + 1)}
    table = (tmp_path / "rl" / "profile" / "operators.txt").read_text()
    assert "aten::mm" in table


def test_no_profile_leaves_no_folder(tmp_path):
    runtime.initialize(ModelConfig(), seed=0)
    stage = Stage(tmp_path / "rl", TrainerConfig())
    assert list(stage.steps(2, 7)) == [2, 3, 4, 5, 6]
    assert not (tmp_path / "rl" / "profile").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="nsys works where there is a CUDA device")
def test_nsys_without_cuda_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(session, "prepared_root", lambda recipe: pytest.fail("the data was looked for"))
    with pytest.raises(ConfigError, match=r"profile=nsys.*CUDA.*profile=torch"):
        session.run(replace(Recipe(), profile="nsys"), session.train)


def test_time_of_attempts_that_were_cut_off_counts(tmp_path):
    assert earlier_seconds(tmp_path) == 0.0
    for stage, text in {"sft": '{"step": 1, "seconds": 2.5}\n{"step": 2, "seconds": 1.5}\n{"ste', "rl": ""}.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "timings.jsonl").write_text(text, encoding="utf-8")
    assert earlier_seconds(tmp_path) == 4.0
    (tmp_path / "summary.json").write_text('{"wall_s": 9.0}', encoding="utf-8")
    assert earlier_seconds(tmp_path) == 9.0


def test_an_update_of_adapters_has_no_backward_to_frozen_weights():
    """Forward and backward to the inputs: two thirds of a training pass of all weights."""
    flops = {}
    for rank in (0, 8):
        recipe = load_recipe(None, [f"model.lora.rank={rank}", "trainer.peak_tflops=1"])
        timers = Timers.of(recipe, DataParallel())
        with timers("update"):
            pass
        count_update(timers, [two_leaf_tree(None)], QWEN)
        report = timers.report()
        flops[rank] = report["mfu/update"] * report["seconds/update"]
    assert flops[8] == pytest.approx(flops[0] * 2 / 3, rel=1e-4)
