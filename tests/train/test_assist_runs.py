"""Runs whose finished stages an auxiliary recommender joins (``rollout.assist``): D3 on top of SFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from tawin_nemo.baselines.load import load_scorer
from tawin_nemo.data.interactions import load_dataset
from tawin_nemo.tools.study.config import read_file
from tests.train.runs import ROOT, SMALL, called, run

WORDS = [*SMALL, "rl.enabled=false", "sft.epochs=1", "sft.rows=all", "data.train_limit=96", "eval.splits=[test]"]
ALL = "eval.beams=150"  # every path of the generated catalog
#: Float32 sums of up to a dozen log-probs against one logarithm in float64.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def auxiliary(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auxiliary")
    run(
        *WORDS, f"data.root={small_dataset}", f"run_dir={folder}", "baseline.model=sasrec", "baseline.hidden=16",
        "baseline.epochs=2", "data.train_limit=0",
    )  # fmt: skip
    return folder / "sasrec"


@pytest.fixture(scope="module")
def alone(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without assistance; evaluated with it below."""
    folder = tmp_path_factory.mktemp("alone")
    run(*WORDS, f"data.root={small_dataset}", f"run_dir={folder}")
    return folder


def evaluated(folder: Path, *words: str) -> dict[str, object]:
    return run(*WORDS, *words, f"run_dir={folder}", f"checkpoint={folder / 'sft'}", verb="evaluate")["test"]


def shares_of_paths(auxiliary: Path, dataset: Path, histories: list[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """The recommender's share of every title [B, titles], and the titles; by its definition, without a trie."""
    items = load_dataset(dataset).items
    share_BI = torch.softmax(load_scorer(auxiliary, items.external_ids).scores(histories).double(), dim=1).numpy()
    titles = sorted(set(items.titles))
    column_I = np.array([titles.index(title) for title in items.titles])
    whole_BT = np.zeros((len(histories), len(titles)))
    for item, column in enumerate(column_I):
        whole_BT[:, column] += share_BI[:, item]
    return whole_BT, titles


def test_training_is_the_models_own_and_only_the_evaluation_is_assisted(
    auxiliary: Path, alone: Path, small_dataset: Path, tmp_path: Path
) -> None:
    """With weight 0 the ranking is the recommender's own, of all rows of the split."""
    words = [f"rollout.assist.stage={auxiliary}", "rollout.assist.weight=0", ALL]
    run(*WORDS, *words, f"data.root={small_dataset}", f"run_dir={tmp_path}")
    assert (tmp_path / "sft" / "metrics.jsonl").read_bytes() == (alone / "sft" / "metrics.jsonl").read_bytes()
    table = pl.read_parquet(tmp_path / "sft" / "eval" / "test.per_user.parquet")
    rows, titles = load_dataset(small_dataset).test, load_dataset(small_dataset).items.titles
    histories = [rows.history[row][-4:] for row in table["row"].to_list()]  # data.max_history
    share_BT, names = shares_of_paths(auxiliary, small_dataset, histories)
    share_BT = np.log(share_BT)
    own_B1 = np.take_along_axis(share_BT, np.array([[names.index(titles[item])] for item in table["target"]]), axis=1)
    better_B, not_worse_B = ((share_BT > own_B1 + slack).sum(axis=1) for slack in (TOLERANCE, -TOLERANCE))
    rank_B = table["rank"].to_numpy()
    assert (better_B <= rank_B).all()
    assert (rank_B < not_worse_B).all()
    assert len(set(rank_B.tolist())) > 10
    assert table["candidates"].unique().to_list() == [len(names)]


def test_weight_one_is_no_assistance_and_a_mixture_is_between(auxiliary: Path, alone: Path) -> None:
    plain, stage = evaluated(alone), f"rollout.assist.stage={auxiliary}"
    assert json.dumps(evaluated(alone, stage, "rollout.assist.weight=1")) == json.dumps(plain)
    half, aux = evaluated(alone, stage, ALL), evaluated(alone, stage, "rollout.assist.weight=0", ALL)
    assert half["beyond"] != plain["beyond"]
    assert half["beyond"] != aux["beyond"]


def test_generate_ranks_by_the_mixture(auxiliary: Path, alone: Path, small_dataset: Path) -> None:
    words = [f"rollout.assist.stage={auxiliary}", "generate.history=#3,#7", "generate.n=6", ALL]
    options = {"verb": "generate"}
    place = (f"run_dir={alone}", f"checkpoint={alone / 'sft'}")
    everything = run(*WORDS, *place, *words, "rollout.assist.weight=1", "generate.n=150", **options)
    own = {item["title"]: item["score"] for item in everything["recommendations"][0]["items"]}
    share_BT, names = shares_of_paths(auxiliary, small_dataset, [np.array([3, 7])])
    total = {name: 0.3 * own[name] + 0.7 * float(np.log(share)) for name, share in zip(names, share_BT[0], strict=True)}
    found = run(*WORDS, *place, *words, "rollout.assist.weight=0.3", **options)["recommendations"][0]["items"]
    assert [item["title"] for item in found] == sorted(total, key=lambda name: -total[name])[:6]
    for item in found:
        assert item["score"] == pytest.approx(total[item["title"]], abs=1e-4)  # float32 sums of up to a dozen tokens


@pytest.mark.distributed
def test_the_result_does_not_depend_on_the_layout(auxiliary: Path, alone: Path) -> None:
    words = [f"rollout.assist.stage={auxiliary}", "rollout.assist.weight=0.4"]
    two = ["trainer.devices=2", "model.tensor_model_parallel_size=2"]
    one, both = evaluated(alone, *words), evaluated(alone, *words, *two)
    assert both == one


def test_an_auxiliary_model_that_cannot_be_used_ends_a_run_before_it_starts(
    auxiliary: Path, small_dataset: Path, tmp_path: Path
) -> None:
    words = [*WORDS, f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}"]
    missing = called(*words, f"rollout.assist.stage={tmp_path / 'nowhere'}", "--dry-run")
    assert missing.returncode == 2
    assert "rollout.assist.stage=" in missing.stderr
    assert "is not a finished baseline stage" in missing.stderr
    blueprint = json.loads((auxiliary / "model.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.json").write_text(json.dumps(blueprint | {"items": "of another catalog"}))
    (other / "done.json").write_text((auxiliary / "done.json").read_text())
    foreign = called(*words, f"rollout.assist.stage={other}", f"run_dir={tmp_path / 'second'}", "--dry-run")
    assert foreign.returncode == 2
    assert "not the same ones" in foreign.stderr
    assert not (tmp_path / "run" / "sft").exists()


def test_the_recipe_of_d3_prints_its_row_and_a_step_of_rate_zero_evaluates_alone(
    auxiliary: Path, alone: Path, small_dataset: Path, tmp_path: Path
) -> None:
    """The second is how study d3 measures weights: arms that start from a trained stage and leave it as it is."""
    recipe = ["--recipe", str(ROOT / "recipes" / "paper" / "d3_cpu.yaml"), *WORDS]
    small = [f"data.root={small_dataset}", f"rollout.assist.stage={auxiliary}", "catalog.kind=title", "catalog.index="]
    summary = run(*recipe, *small, "data.tokenizer=bpe", "compare.sft_continued=false", f"run_dir={tmp_path / 'd3'}")
    assert summary["sft"].keys() >= {"recall@1", "recall@3", "ndcg@3"}
    study = load_study(ROOT / "recipes" / "studies" / "d3.yaml")
    still = [f"{key}={value}" for key, value in study.items() if key.startswith("sft.")] + ["data.train_limit=32"]
    words = [f"rollout.assist.stage={auxiliary}", "rollout.assist.weight=0.3"]
    place = [f"data.root={small_dataset}", f"run_dir={tmp_path / 'still'}", f"start={alone / 'sft'}"]
    again = run(*WORDS, *place, *still, *words)
    expected = evaluated(alone, *words)
    assert again["sft"] == {key: expected[key] for key in again["sft"]}


def load_study(path: Path) -> dict[str, object]:
    return read_file(path, [])[1]
