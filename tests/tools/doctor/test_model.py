"""`doctor checkpoint=DIR`: the figures of a stage and of a Hugging Face directory, verdicts, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.samples import Samples
from tawin_nemo.data.tokenizer import build_tokenizer
from tawin_nemo.eval.intervals import Interval
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.tools.doctor import model, model_checks
from tawin_nemo.tools.doctor.check import Status
from tawin_nemo.types import TokenRows
from tests.train.runs import called, run

LINES = ["free answers", "searched answers", "collisions", "recall", "tail"]


def world_of(codes: list[list[str]], more_words: tuple[str, ...] = ()) -> SimpleNamespace:
    cfg = CatalogConfig(kind="sid", index="x")
    tokenizer = build_tokenizer(DataConfig(), cfg, ModelConfig(), [], codes, more_words)
    names, texts = [f"i{n}" for n in range(len(codes))], ["".join(item) for item in codes]
    catalog = build_catalog(names, names, texts, tokenizer, Template("compact", "sid"), kind="sid")
    return SimpleNamespace(tokenizer=tokenizer, catalog=catalog)


def result_of(recall: list[float], target: list[int], low: float = 0.0) -> EvalResult:
    table = pl.DataFrame({"target": target, "recall@50": recall})
    return EvalResult(
        means={"recall@10": 0.3, "recall@50": float(np.mean(recall))}, intervals={"recall@10": (low, 0.5)},
        rows=len(target), invalid_rate=0.0, collisions=0, short_rows=0.0, coverage=0.1, beams=50,
        collision="fractional", per_user=table, beyond={"coverage@10": 0.25},
    )  # fmt: skip


def test_dead_codes_are_counted_by_number_by_vocabulary_and_not_for_marks() -> None:
    codes = [["<s>", "<a_0>", "<b_7>", "</s>"], ["<s>", "<a_1>", "<b_0>", "</s>"], ["<s>", "<a_3>", "<b_0>", "</s>"]]
    assert model.code_use(world_of(codes)) == [(3, 4), (2, 8)]
    assert model.code_use(world_of(codes, ("<a_4>", "<a_9>", "<c_2>"))) == [(3, 5), (2, 8)]
    words = [["red", "<b_0>"], ["blue", "<b_1>"]]
    assert model.code_use(world_of(words)) == [(2, 2), (2, 2)]


def test_free_answers_are_counted_against_the_catalog() -> None:
    """Tokens of a language model that always writes one and the same answer."""
    world = world_of([["<a_0>", "<b_0>"], ["<a_1>", "<b_1>"]])
    right, wrong = world.catalog.paths[1].tolist(), [*world.catalog.paths[1].tolist()[:1], world.tokenizer.eos_id]
    prompts = world.tokenizer.encode_batch([Template("compact", "sid").prompt(["<a_0><b_0>"])] * 3)
    rows = np.arange(3)
    samples = Samples(prompts, rows % 2, rows, TokenRows.from_lists([[0]] * 3))
    for answer, share in ((right, 0.0), (wrong, 1.0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "_greedy", lambda engine, prompts, longest, eos, a=answer: [a] * len(prompts))
            patch.setattr(model, "_beams", lambda engine, prompts, longest, eos, a=answer: [a, a] * len(prompts))
            engine = SimpleNamespace(dp=SimpleNamespace(rank=0, size=1, gather=lambda x: [x]))
            greedy, beams = model.free_answers(world, engine, samples)
        assert (greedy, beams) == ((round(3 * share), 3), (round(6 * share), 6))


def test_verdicts() -> None:
    assert model_checks.free_check((0, 100), (40, 1000), "vocab").status == Status.OK
    bad = model_checks.free_check((30, 100), (40, 1000), "trie")
    assert (bad.status, bad.value.startswith("30.0% of 100 greedy answers and 4.0% of 1000 beams")) == (
        Status.WARNING,
        True,
    )
    assert "sft.loss_space=trie" in bad.remedy
    assert model_checks.collision_check(0.0, [], "sid").status == Status.OK
    shared = model_checks.collision_check(0.5, [(0, 1, 2), (3, 4)], "sid")
    assert (shared.status, shared.value) == (Status.WARNING, "50.0% of the items share a token path, up to 3 one")
    assert "collisions=assign" in shared.remedy
    assert model_checks.dead_code_check([(256, 256), (250, 256)]).status == Status.OK
    dead = model_checks.dead_code_check([(256, 256), (100, 256)])
    assert (dead.status, dead.value) == (Status.WARNING, "level 1: 0 of 256 unused, level 2: 156 of 256 unused")
    assert model_checks.recall_check(result_of([1.0], [0], low=0.2), 0.1).status == Status.OK
    assert model_checks.recall_check(result_of([1.0], [0], low=0.05), 0.1).status == Status.WARNING
    broken = SimpleNamespace(invalid_rate=0.01)
    assert model_checks.searched_check(broken).status == Status.FAILS  # type: ignore[arg-type]


def test_the_tail_is_the_less_popular_items_and_its_recall_is_that_of_their_rows() -> None:
    tail_I = model.unpopular(np.array([50, 1, 0, 2, 3]))
    assert tail_I.tolist() == [False, True, True, True, True]
    searched = result_of([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0, 0, 1, 2, 3, 4])
    found = model.tail_recall(searched, tail_I)
    assert found is not None
    assert (found[0].mean, found[1]) == (0.25, 4)
    assert model_checks.tail_check(searched, found).status == Status.OK  # its interval reaches half of 0.5
    low = model_checks.tail_check(searched, (Interval(0.1, 0.0, 0.2), 400))
    assert low.status == Status.WARNING
    assert (
        "recall@50 0.1000 [0.0000, 0.2000] for the less popular 80% of the items (400 rows), 0.5000 for all"
        in low.value
    )
    assert "25.0% of the items are in some top 10" in low.value
    assert model.tail_recall(result_of([1.0], [0]), tail_I) is None
    assert model_checks.tail_check(searched, None).status == Status.OK


def test_popular_items_for_everybody() -> None:
    assert model.popular_recall(np.array([3, 0, 5, 1]), np.array([2, 0, 1, 1]), 2) == 0.5


@pytest.mark.slow
def test_a_stage_of_a_run_has_the_figures_of_evaluate(finished_run: Path) -> None:
    checkpoint = f"checkpoint={finished_run / 'rl'}"
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    done = called(checkpoint, verb="doctor")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    expected = run(checkpoint, "eval.beams=50", "eval.ks=[1,3,10,50]", verb="evaluate")["test"]
    assert {name: result[name] for name in ("recall@10", "recall@50", "ndcg@3")} == {
        name: expected[name] for name in ("recall@10", "recall@50", "ndcg@3")
    }
    assert result["invalid_rate"] == 0.0
    assert 0.0 < result["invalid_greedy"] <= 1.0  # a few steps do not teach a model to write titles
    assert result["rows"] == 24
    assert [item["name"] for item in result["checks"]] == LINES
    for name in LINES:
        assert any(line[10:].startswith(name) for line in done.stderr.splitlines()), done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_hugging_face_directory_with_data(finished_run: Path, small_dataset: Path, tmp_path: Path) -> None:
    """The export of the stage above has the same figures, and nothing is left behind."""
    run(f"checkpoint={finished_run / 'rl'}", f"convert.output={tmp_path / 'export'}", verb="convert")
    of_stage = run(f"checkpoint={finished_run / 'rl'}", verb="doctor")
    words = ["--recipe", str(finished_run / "recipe.yaml"), f"run_dir={tmp_path / 'unused'}"]
    of_export = run(*words, f"checkpoint={tmp_path / 'export'}", verb="doctor")
    same = ("recall@10", "recall@50", "tail_rows", "invalid_greedy", "rows", "popular_recall@10")
    assert {name: of_export[name] for name in same} == {name: of_stage[name] for name in same}
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
def test_what_is_missing_ends_with_2(small_dataset: Path, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    root = f"data.root={small_dataset}"
    for words, message in (
        ([f"checkpoint={tmp_path / 'none'}", root], "is neither a finished stage (done.json) nor a step_N"),
        ([f"checkpoint={tmp_path}", root], "holds config.json but no *.safetensors files"),
        ([f"checkpoint={finished_run / 'rl'}", "--quick"], "--quick belongs to the checks of the machine"),
    ):
        done = called(*words, verb="doctor")
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
    (tmp_path / "model.safetensors").write_bytes(b"")
    unsupported = called(f"checkpoint={tmp_path}", root, verb="doctor")
    assert unsupported.returncode == 2
    assert "supported are Qwen2.5 (qwen2)" in unsupported.stderr
