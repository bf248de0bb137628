"""Runs on data with candidate sets: prompts that list them, negatives out of them, HitRatio@1 and ValidRatio."""

import json

import polars as pl
import pytest

from tests.data_prep.test_candidates_layout import toy_folder
from tests.train.runs import called, run

WORDS = (
    "model.backbone=nano data.bpe_vocab_size=320 data.max_prompt_tokens=200 data.show_candidates=true sft.epochs=2 "
    "sft.global_batch_size=16 sft.micro_batch_tokens=4096 rl.enabled=false eval.beams=6 eval.ks=[1,3] "
    "eval.splits=[test] eval.candidates=5 trainer.threads=1 preference.enabled=true preference.algorithm=sdpo "
    "preference.negatives=candidates preference.num_negatives=3 preference.max_steps=2 preference.lr=1e-3 "
    "preference.global_batch_size=16"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("candidates"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return directory, run(*WORDS, f"data.root={folder}", f"run_dir={directory}")


def table_of(run_dir, stage):
    return pl.read_parquet(run_dir / stage / "eval" / "test.candidates.parquet")


def test_a_run_reports_the_three_figures_of_every_stage(finished, folder):
    directory, summary = finished
    assert list(summary["candidates"]) == ["sft", "preference"]
    for stage, means in summary["candidates"].items():
        assert means.keys() == {"hit_ratio@1", "valid_ratio", "trie_hit_ratio@1"}
        table = table_of(directory, stage)
        assert table.height == 18
        for name, value in means.items():
            assert table[name].mean() == pytest.approx(value)
    assert "Among candidates, Preference optimisation" in (directory / "report.html").read_text(encoding="utf-8")
    again = run(
        *WORDS, f"data.root={folder}", f"run_dir={directory}", f"checkpoint={directory / 'preference'}", verb="evaluate"
    )
    assert again["test"]["candidates"] == summary["candidates"]["preference"]


def test_a_classic_model_picks_among_the_same_candidates(folder, tmp_path):
    words = [word for word in WORDS if not word.startswith("preference")]
    summary = run(*words, f"data.root={folder}", f"run_dir={tmp_path}", "baseline.model=gru4rec", "baseline.epochs=2")
    means = summary["candidates"]["gru4rec"]
    assert means["valid_ratio"] == 1.0
    assert table_of(tmp_path, "gru4rec")["hit_ratio@1"].sum() == round(18 * means["hit_ratio@1"])


@pytest.mark.distributed
@pytest.mark.parametrize("key", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_free_decoding_does_not_depend_on_the_layout(key, finished, folder, tmp_path):
    directory, _ = finished
    run(*WORDS, f"data.root={folder}", f"run_dir={tmp_path}", "trainer.devices=2", f"model.{key}=2")
    for stage in ("sft", "preference"):
        assert table_of(tmp_path, stage).equals(table_of(directory, stage))


def test_prompts_list_the_candidates_and_other_data_are_refused(finished, folder, small_dataset, tmp_path):
    directory, _ = finished
    assert json.loads((directory / "catalogue.json").read_text())["prompt_tokens_mean"]["train"] > 0
    done = called(*WORDS, f"data.root={small_dataset}", f"run_dir={tmp_path}")
    assert done.returncode == 2
    assert "data.show_candidates=true, but the data" in done.stderr
