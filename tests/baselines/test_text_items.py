"""MoRec: item vectors that are projections of text vectors (``baseline.items=text``)."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tawin_nemo.baselines.build import Blueprint, build_recommender
from tawin_nemo.baselines.load import load_baseline
from tawin_nemo.baselines.protocol import left_padded
from tawin_nemo.baselines.text_items import TEXT_VECTORS, check_item_texts
from tawin_nemo.baselines.train import run_baseline
from tawin_nemo.config.schema import BaselineConfig, SemanticIdsConfig, TextConfig
from tawin_nemo.semantic_ids.encoders import item_texts
from tawin_nemo.types import NO_ITEM
from tawin_nemo.util.errors import CheckpointError, ConfigError, DataError
from tests.baselines.patterns import ITEMS, WINDOW, histories, successors
from tests.baselines.test_train import with_baseline, world  # noqa: F401  a fixture
from tests.data_prep.test_candidates_layout import rows_of, write
from tests.train.runs import called, run

RECIPE = "recipes/paper/morec_cpu.yaml"
MODELS = ("gru4rec", "sasrec")
TEXT_IE = torch.randn(ITEMS, 7, generator=torch.Generator().manual_seed(9))


def model_of(name: str, text_IE: torch.Tensor = TEXT_IE, seed: int = 0):
    torch.manual_seed(seed)
    config = BaselineConfig(model=name, items="text", hidden=16, layers=1, heads=2, dropout=0.0)
    return build_recommender(Blueprint(config, ITEMS, WINDOW), text_IE)


@pytest.mark.parametrize("name", MODELS)
def test_no_weight_belongs_to_an_item_and_only_the_projection_learns_items(name):
    model = model_of(name)
    own = {name: weight for name, weight in model.named_parameters() if name.startswith("items.")}
    assert own.keys() == {"items.project.weight", "items.project.bias"}
    assert all(ITEMS not in weight.shape and ITEMS + 1 not in weight.shape for weight in model.state_dict().values())
    model.loss(left_padded(histories(9, seed=2)), torch.arange(9)).sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in own.values())
    assert not model.items.text_NE.requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_items_are_read_and_scored_by_the_projection_of_their_text(name):
    model = model_of(name).eval()
    rows_BL = torch.tensor([[NO_ITEM, 3, 1], [7, 8, 9]])
    weight_DE, bias_D = model.items.project.weight, model.items.project.bias
    table_ID = torch.stack([weight_DE @ text_E + bias_D for text_E in TEXT_IE])
    embedded_BLD = model.embed(rows_BL)
    torch.testing.assert_close(embedded_BLD[1], table_ID[[7, 8, 9]])
    assert embedded_BLD[0, 0].abs().max() == 0
    torch.testing.assert_close(model.scores(rows_BL), model.state(rows_BL) @ table_ID.T)


def test_equal_texts_have_equal_scores_and_another_text_changes_them():
    alike = TEXT_IE.clone()
    alike[5] = alike[2]
    rows_BL = left_padded(histories(6, seed=3))
    scores_BI = model_of("sasrec", alike).eval().scores(rows_BL)
    torch.testing.assert_close(scores_BI[:, 5], scores_BI[:, 2])
    assert (model_of("sasrec").eval().scores(rows_BL)[:, 5] - scores_BI[:, 5]).abs().max() > 1e-4


def test_a_rule_is_learned_from_texts():
    model = model_of("sasrec", torch.eye(ITEMS))
    rows = histories(200, seed=4)
    history_BL, target_B = left_padded(rows), torch.from_numpy(successors(rows))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(history_BL, target_B).mean().backward()
        optimizer.step()
    fresh = histories(50, seed=5)
    best_B = model.eval().scores(left_padded(fresh)).argmax(dim=1)
    assert (best_B.numpy() == successors(fresh)).mean() > 0.8


@pytest.mark.parametrize(("name", "items"), [("caser", ITEMS), ("tiger", ITEMS), ("sasrec", ITEMS - 1), ("sasrec", 0)])
def test_models_with_own_item_weights_and_other_vectors_are_refused(name, items):
    text_IE = TEXT_IE[:items] if items else None
    blueprint = Blueprint(BaselineConfig(model=name, items="text", hidden=16), ITEMS, WINDOW)
    with pytest.raises(ConfigError, match=r"baseline\.items=text|catalog\.kind=sid"):
        build_recommender(blueprint, text_IE)


# -- a stage -------------------------------------------------------------------------------------------------------
def from_file(world: SimpleNamespace, source) -> SimpleNamespace:  # noqa: F811
    text = TextConfig(encoder="file", source=str(source))
    small = with_baseline(world, model="sasrec", items="text", epochs=2)
    small.recipe = replace(small.recipe, semantic_ids=SemanticIdsConfig(text=text))
    small.dataset.items.titles = small.dataset.items.external_ids
    small.dataset.items.descriptions = [""] * ITEMS
    return small


def test_a_finished_stage_carries_its_vectors(world, tmp_path):  # noqa: F811
    np.save(tmp_path / "text.npy", TEXT_IE.numpy())
    world = from_file(world, tmp_path / "text.npy")
    run_baseline(world)
    (tmp_path / "text.npy").unlink()
    stage, names = world.run_dir / "sasrec", world.dataset.items.external_ids
    loaded = load_baseline(stage, external_ids=names)
    torch.testing.assert_close(loaded.items.text_NE[1:], TEXT_IE)
    with pytest.raises(ConfigError, match="not the same ones"):
        load_baseline(stage, external_ids=[*names[:-1], "another"])
    np.save(stage / TEXT_VECTORS / "vectors.npy", TEXT_IE.numpy() + 1)
    with pytest.raises(CheckpointError, match="not the text vectors that this baseline was trained with"):
        load_baseline(stage, external_ids=names)
    (stage / TEXT_VECTORS / "vectors.npy").unlink()
    with pytest.raises(CheckpointError, match="holds the text vectors of this baseline and cannot be read"):
        load_baseline(stage, external_ids=names)


def test_vectors_that_are_missing_or_of_another_catalog_end_the_dry_run(world, tmp_path):  # noqa: F811
    file = tmp_path / "text.npy"
    with pytest.raises(DataError, match=r"semantic_ids\.text\.source=.*there is no such file"):
        check_item_texts(from_file(world, file))
    np.save(file, TEXT_IE[:-1].numpy())
    with pytest.raises(DataError, match=r"semantic_ids\.text\.source=.*11 rows.*12 items"):
        check_item_texts(from_file(world, file))
    np.save(file, TEXT_IE.numpy())
    (tmp_path / "items.json").write_text(json.dumps([*map(str, range(1, ITEMS)), "other"]))
    with pytest.raises(DataError, match=r"semantic_ids\.text\.source="):
        check_item_texts(from_file(world, file))


def test_an_encoder_that_reads_signs_takes_titles_without_words():
    assert item_texts(["!!!", "Hope"], ["", ""], "title", needs_words=False) == ["!!!", "Hope"]
    with pytest.raises(DataError, match="1 items have no text"):
        item_texts(["", "Hope"], ["", ""], "title", needs_words=False)


# -- the recipe ----------------------------------------------------------------------------------------------------
def test_the_recipe_prints_its_row(tmp_path):
    write(tmp_path / "toy-val.json", [row for user in range(20) for row in rows_of(user)])
    write(tmp_path / "toy-test.json", [row for user in range(30, 36) for row in rows_of(user)])
    words = [
        "--recipe", RECIPE, f"data.root={tmp_path}", f"run_dir={tmp_path / 'run'}", "data.bpe_vocab_size=320",
        "semantic_ids.text.encoder=tfidf", "baseline.epochs=2", "eval.candidates=5", "eval.beams=10",
        "trainer.threads=1",
    ]  # fmt: skip
    summary = run(*words)
    assert summary["candidates"]["sasrec"]["valid_ratio"] == 1.0
    assert 0.0 <= summary["candidates"]["sasrec"]["hit_ratio@1"] <= 1.0
    assert (tmp_path / "run" / "sasrec" / "eval" / "test.candidates.json").is_file()
    refused = called(*words, f"run_dir={tmp_path / 'other'}", "baseline.model=caser")
    assert refused.returncode == 2
    assert "baseline.items=text" in refused.stderr
