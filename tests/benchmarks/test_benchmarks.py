"""The benchmarks' own arithmetic, and that what they compare computes the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.models.megatron.model.head import head_weight_VD
from tawin_nemo.rollout import select
from tawin_nemo.semantic_ids.report import relative_error
from tawin_nemo.types import TokenRows
from tests.benchmarks import harness, select_step, semantic_ids, summary
from tests.benchmarks.baselines import PrefixTable, backward, completion_logps, repeated_batches
from tests.benchmarks.setting import qwen_shape, transformers_model


@pytest.fixture(scope="module")
def small_shape() -> Backbone:
    return replace(qwen_shape(1), vocab=2000, hidden=64, ffn=96, heads=4, kv_heads=2)


# -- harness -------------------------------------------------------------------------------------------------------
def test_sides_take_turns_and_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SHORTEST_SAMPLE", 0.0)
    calls: list[str] = []
    timed = harness.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert [len(result.samples) for result in timed.values()] == [3, 3]


def test_medians_quartiles_and_floor() -> None:
    timed = harness.Timed([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timed.median, timed.quartiles) == (3.0, (2.0, 4.0))
    machine = harness.Machine("cpu", 2, 2, "t", "p", 0.0, {"fp32": 0.5}, copy_gb_s=10.0)
    assert machine.floor_seconds(flops=1e12) == 2.0
    assert machine.floor_seconds(flops=1e12, moved_bytes=5e10) == 5.0


def test_peak_memory_is_what_the_run_touched() -> None:
    def run() -> None:
        torch.ones(16 * 2**20)  # 64 MiB

    assert 60 <= harness.peak_above(run) <= 80
    kept = torch.ones(16 * 2**20)
    assert harness.peak_above(lambda: kept.sum()) < 20


def test_a_report_ends_with_its_json_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    machine = harness.Machine("cpu", 2, 2, "t", "p", 0.0, {"fp32": 0.5}, copy_gb_s=10.0)
    report = harness.Report("rollout", machine, shapes={"beams": 16}, settings={})
    report.rows.append({"side": "ours", "median_seconds": 0.5})
    report.targets["time"] = harness.Target.at_least(12, 20.0)
    report.targets["memory"] = harness.Target.at_most(0.25, 0.3)
    report.finish(ours=0.5, baseline=10.0, floor=0.1, json_file=str(tmp_path / "bench_rollout.json"))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["ratio"], last["floor_ratio"]) == (20.0, 5.0)
    assert last["targets"]["time"] == {"goal": ">= 12", "value": 20.0, "met": True}
    assert not last["targets"]["memory"]["met"]
    assert json.loads((tmp_path / "bench_rollout.json").read_text()) == last
    first, second = summary.lines("bench_rollout.json", last)
    assert first == "| [rollout](bench_rollout.json) | 500 ms | 10 s | 5 | time | >= 12 | 20 | met |"
    assert second.endswith("| memory | <= 0.25 | 0.3 | **missed** |")


# -- baselines -----------------------------------------------------------------------------------------------------
def test_the_timed_step_ranks_as_transformers_epilogue_does(small_shape: Backbone) -> None:
    lm, cache, hidden_RD = select_step.model_with_hidden(small_shape, prompts=3, beams=4)
    case = select_step.make_case(5000, codes=18, prompts=3, beams=4, vocab=small_shape.vocab)
    sides = select_step.baselines(case, hidden_RD, head_weight_VD(lm.model).detach(), per_call=2)
    with torch.no_grad():
        ours = select.step(lm, cache, case.trie, case.beams, case.rules)
        found = {name: run() for name, run in sides.items()}
    checks = select_step.agreement(case, ours, found["transformers, renormalised"], small_shape.vocab)
    assert checks["same nodes"] == 1.0
    assert checks["largest score difference"] < 1e-4
    torch.testing.assert_close(found["transformers"], found["string keys"])  # both rank in the vocabulary space


def test_prefix_table_allows_what_some_path_goes_on_with() -> None:
    table = PrefixTable(TokenRows.from_lists([[1, 2, 9], [1, 3, 9], [4, 9]]), eos=9)
    table.prompt_tokens = 2
    allowed = [table(0, torch.tensor([7, 7, *path])) for path in ([], [1], [4], [4, 9], [5])]
    assert allowed == [[1, 4], [2, 3], [9], [9], [9]]


@pytest.mark.parametrize("size", [1, 3])
def test_repeated_batches_score_every_completion_token_once(small_shape: Backbone, size: int) -> None:
    model = transformers_model(small_shape)
    rng = np.random.default_rng(0)
    prompts = TokenRows.from_lists([rng.integers(0, 2000, 7) for _ in range(2)])
    answers = TokenRows.from_lists([rng.integers(0, 2000, length) for length in (3, 5, 2)])
    prompt_A = np.array([0, 0, 1])
    seen = {}
    for batch in repeated_batches(prompts, answers, prompt_A, size):
        logp_RK = completion_logps(model, batch).detach()
        for row, logp_K, mask_K in zip(batch.row_R.tolist(), logp_RK, batch.completion_RK, strict=True):
            seen[row] = logp_K[mask_K.bool()]
    for row in range(3):
        ids = torch.from_numpy(np.concatenate([prompts[prompt_A[row]], answers[row]]))
        with torch.no_grad():
            logp_TV = model(ids[None]).logits[0].log_softmax(-1)
        expected = logp_TV[6:-1].gather(1, ids[7:, None])[:, 0]
        torch.testing.assert_close(seen[row], expected, atol=1e-5, rtol=1e-5)


def test_the_groups_gradient_does_not_depend_on_the_micro_batch(small_shape: Backbone) -> None:
    rng = np.random.default_rng(0)
    prompts = TokenRows.from_lists([rng.integers(0, 2000, 7)])
    answers = TokenRows.from_lists([rng.integers(0, 2000, length) for length in (3, 5, 2)])
    gradients = []
    for size in (1, 3):
        model = transformers_model(small_shape)
        batches = repeated_batches(prompts, answers, np.zeros(3, dtype=int), size)
        backward(model, batches, torch.tensor([1.0, -0.5, 0.2]))
        gradients.append(model.model.norm.weight.grad)
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-4)


# -- item tokenizer ------------------------------------------------------------------------------------------------
def test_the_sides_of_residual_kmeans_reach_the_same_error() -> None:
    x_ID = semantic_ids.vectors(600, 12)
    errors = {
        name: relative_error(x_ID, side(x_ID, levels=2, codes=16, iterations=15))
        for name, side in semantic_ids.sides().items()
    }
    assert errors["ours"] < 0.9
    for name, error in errors.items():
        assert error == pytest.approx(errors["ours"], rel=0.05), name


def test_assignment_of_a_file_agrees_with_a_second_one(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", semantic_ids.vectors(500, 8))
    found = semantic_ids.assign_file(tmp_path / "v.npy", levels=2, codes=4)
    assert found["agree"] == 1
    assert min(found["peak_mib"], found["before_mib"]) > 20
