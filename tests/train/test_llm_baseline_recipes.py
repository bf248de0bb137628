"""The recipes of D3, BigRec and LC-Rec from end to end, made small: each prints its row."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from tawin_nemo.config.load import load_recipe
from tests.train.runs import ROOT, run

RECIPES = ROOT / "recipes" / "paper"
TINY = (
    "data.dataset=prepared model.backbone=nano data.bpe_vocab_size=320 data.max_prompt_tokens=120 data.max_history=4 "
    "data.train_limit=128 data.eval_limit=24 sft.epochs=2 sft.global_batch_size=32 eval.beams=10 eval.splits=[test] "
    "eval.ks=[1,3] compare.sft_continued=false trainer.threads=1"
).split()


def words(name: str, dataset: Path, folder: Path) -> list[str]:
    return ["--recipe", str(RECIPES / f"{name}.yaml"), *TINY, f"data.root={dataset}", f"run_dir={folder}"]


@pytest.fixture(scope="module")
def bigrec(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, dict[str, float]]:
    """A finished run: its command line, its folder, and the row that it printed."""
    folder = tmp_path_factory.mktemp("bigrec")
    command = words("bigrec_cpu", small_dataset, folder)
    return command, folder, run(*command)["grounding"]["sft"]


def test_bigrec_prints_the_row_of_its_grounding(bigrec: tuple[list[str], Path, dict[str, float]]) -> None:
    command, folder, row = bigrec
    assert row.keys() == {
        "grounded_recall@1", "grounded_recall@3", "grounded_ndcg@1", "grounded_ndcg@3", "named_ratio",
    }  # fmt: skip
    table = pl.read_parquet(folder / "sft" / "eval" / "test.grounding.parquet")
    assert table.height == 24
    for name, value in row.items():
        assert table[name].mean() == pytest.approx(value)
    assert table["rank"].n_unique() > 3
    assert "Free text, grounded, SFT" in (folder / "report.html").read_text(encoding="utf-8")
    again = run(*command, f"checkpoint={folder / 'sft'}", verb="evaluate")
    assert again["test"]["grounding"] == row


@pytest.mark.distributed
@pytest.mark.parametrize(
    "key", ["tensor_model_parallel_size", pytest.param("pipeline_model_parallel_size", marks=pytest.mark.full)]
)
def test_grounding_does_not_depend_on_the_layout(key: str, bigrec: tuple[list[str], Path, dict[str, float]]) -> None:
    command, folder, row = bigrec
    place = [f"checkpoint={folder / 'sft'}", "trainer.devices=2", f"model.{key}=2"]
    assert run(*command, *place, verb="evaluate")["test"]["grounding"] == row


@pytest.mark.full
def test_lcrec_makes_its_index_and_learns_its_tasks(small_dataset: Path, tmp_path: Path) -> None:
    small = "semantic_ids.codes=24 semantic_ids.rqvae.epochs=3 align.tested_rows=16 eval.beams=10".split()
    run(
        *words("lcrec_cpu", small_dataset, tmp_path), *small, f"semantic_ids.output={tmp_path / 'lcrec'}",
        verb="tokenize",
    )  # fmt: skip
    index = json.loads((tmp_path / "lcrec" / "index.json").read_text())
    assert {len(codes) for codes in index.values()} == {4}
    assert len({tuple(codes) for codes in index.values()}) == len(index)  # Sinkhorn leaves no two items alike
    settings = load_recipe(RECIPES / "lcrec_cpu.yaml").semantic_ids
    assert (settings.method, settings.rqvae.sinkhorn, settings.collisions) == ("rqvae", "last", "sinkhorn")
    summary = run(
        *words("lcrec_cpu", small_dataset, tmp_path / "run"), *small,
        f"catalog.index={tmp_path / 'lcrec' / 'index.json'}",
    )  # fmt: skip
    assert summary["sft"].keys() >= {"recall@1", "recall@3", "ndcg@3"}
    exact = json.loads((tmp_path / "run" / "sft" / "eval" / "tasks.json").read_text())
    assert set(exact) == {"title_to_sid", "sid_to_title", "description_to_sid", "history_to_title", "titles_to_sid"}
