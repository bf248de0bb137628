"""LLaRA's recipe end to end: SASRec, SFT with item tokens and a curriculum, evaluation, layouts, what is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from tawin_nemo.commands.serve import serve
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import Recipe
from tawin_nemo.run.stage import Progress
from tawin_nemo.run.trained import chosen_checkpoint
from tawin_nemo.tools.retrain.verb import check_recipe
from tawin_nemo.train import sft
from tawin_nemo.train.item_tokens import check_no_item_tokens
from tawin_nemo.train.sft_data import Curriculum
from tawin_nemo.util.errors import ConfigError
from tests.data_prep.test_candidates_layout import toy_folder
from tests.train.runs import assert_same_metrics, called, run

WORDS = (
    "--recipe recipes/paper/llara_cpu.yaml model.backbone=nano model.dropout=0 data.bpe_vocab_size=320 eval.beams=6 "
    "eval.ks=[1,3] eval.candidates=5 trainer.threads=1 sft.epochs=2 sft.curriculum=0.5 sft.global_batch_size=16"
).split()
#: A weight of the projection, by its name in a checkpoint.
OUTER = "item_tokens.outer.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("candidates"))


@pytest.fixture(scope="module")
def words(folder, tmp_path_factory):
    """The command line, with a finished SASRec."""
    run_dir = tmp_path_factory.mktemp("sasrec")
    run(
        "--recipe", "recipes/paper/lastfm_cpu.yaml", f"data.root={folder}", f"run_dir={run_dir}",
        "data.show_candidates=false", "baseline.model=sasrec", "baseline.epochs=1", "baseline.hidden=8",
        "data.bpe_vocab_size=320", "eval.beams=6", "eval.ks=[1,3]", "eval.candidates=5", "trainer.threads=1",
    )  # fmt: skip
    return [*WORDS, f"data.root={folder}", f"model.item_tokens={run_dir / 'sasrec'}"]


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llara")
    return directory, run(*words, f"run_dir={directory}")


def test_the_recipe_prints_its_row_and_its_checkpoint_has_the_projection(finished, words):
    directory, summary = finished
    assert summary["candidates"]["sft"].keys() == {"hit_ratio@1", "valid_ratio", "trie_hit_ratio@1"}
    vectors_IE = np.load(directory / "item_vectors.npy")
    assert vectors_IE.shape == (20, 8)
    state = json.loads(next((directory / "sft" / "checkpoints").glob("step_*/state.json")).read_text())["state"]
    assert state["item_vectors"]
    again = run(f"checkpoint={directory / 'sft'}", *words, f"run_dir={directory}", verb="evaluate")
    assert again["test"]["candidates"] == summary["candidates"]["sft"]
    shown = run(*words, f"run_dir={directory}", "generate.history=[1,2]", "generate.n=3", verb="generate")
    assert len(shown["recommendations"][0]["items"]) == 3


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tensor", pytest.param("pipeline", marks=pytest.mark.full)])
def test_layouts_learn_the_same(layout, finished, words, tmp_path):
    directory, summary = finished
    more = ["model.sequence_parallel=true"] if layout == "tensor" else []
    other = run(*words, f"run_dir={tmp_path}", "trainer.devices=2", f"model.{layout}_model_parallel_size=2", *more)
    assert_same_metrics(tmp_path, directory, "sft")
    assert other["candidates"] == summary["candidates"]


def test_what_cannot_hold_a_projection_is_refused(finished, words, tmp_path):
    directory, _ = finished
    done = called(f"checkpoint={directory / 'sft'}", *words, f"convert.output={tmp_path / 'out'}", verb="convert")
    assert done.returncode == 2
    assert "is not supported here: an export is an ordinary model" in done.stderr
    recipe = load_recipe(None, ["model.item_tokens=runs/sasrec", f"retrain.root={tmp_path}"])
    with pytest.raises(ConfigError, match="is not supported here: the server's catalog changes"):
        serve(SimpleNamespace(recipe=recipe))
    with pytest.raises(ConfigError, match="is not supported here: a nightly run publishes an export"):
        check_recipe(replace(recipe, eval=replace(recipe.eval, splits=["valid"])))
    check_no_item_tokens(Recipe(), "no reason")


def test_weights_without_item_tokens_are_no_start(finished, words, folder, tmp_path):
    directory, _ = finished
    plain = [word for word in words if not word.startswith(("model.item_tokens", "sft.curriculum"))]
    done = called(
        *plain, f"run_dir={tmp_path}", "model.item_tokens=", "sft.curriculum=0", f"start={directory / 'sft'}",
    )  # fmt: skip
    assert done.returncode == 2
    assert "item vectors in its prompts, but model.item_tokens gives none" in done.stderr


def test_a_baseline_that_cannot_be_used_ends_the_dry_run(words, tmp_path):
    done = called(*words, f"run_dir={tmp_path}", f"model.item_tokens={tmp_path / 'none'}", "--dry-run")
    assert done.returncode == 2
    assert "model.item_tokens=" in done.stderr
    assert "is not a finished baseline stage" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["rollout.placement=separate", "rollout.devices=1", "trainer.devices=2"], "rollout.placement=colocated"),
        (["rollout.tensor_model_parallel_size=2", "trainer.devices=2"], "rollouts in the layout of training"),
        (["rollout.cuda_graphs=on"], "rollout.cuda_graphs=off"),
        (["model.freeze_backbone=true", "model.init=DIR"], "model.freeze_backbone=true trains rows of new tokens"),
        (["model.item_tokens="], "sft.curriculum=0.5 brings item tokens into prompts"),
    ],
)
def test_keys_that_do_not_go_together(more, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, ["model.item_tokens=runs/sasrec", "sft.curriculum=0.5", "eval.candidates=0", *more])


def test_the_curriculum_goes_from_texts_to_item_tokens():
    picked = np.arange(2000) % 1100  # 1000 rows of train and 100 of a task
    curriculum = Curriculum(steps=100, rows=1000, first_text=1100, seed=3)
    shares = []
    for step in (0, 25, 75, 100, 400):
        chosen = curriculum.chosen(picked, step)
        assert np.array_equal(chosen, curriculum.chosen(picked, step))
        assert np.array_equal(np.where(chosen >= 1100, chosen - 1100, chosen), picked)
        assert np.array_equal(chosen[picked >= 1000], picked[picked >= 1000])
        shares.append((chosen[picked < 1000] < 1000).mean())
    assert shares[0] == 0.0
    assert shares[1] == pytest.approx(0.25, abs=0.04)
    assert shares[2] == pytest.approx(0.75, abs=0.04)
    assert shares[3:] == [1.0, 1.0]


def test_checks_count_once_the_curriculum_is_over(monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    monkeypatch.setattr(sft, "valid_loss", lambda world, trainable: next(losses))
    stage = SimpleNamespace(name="sft", write=lambda step, metrics: None, save=lambda trainable, done: None)
    world, done, bad = SimpleNamespace(recipe=Recipe()), Progress(), []
    for step in range(6):
        done.step = step
        sft._validate(world, stage, None, None, done, curriculum=Curriculum(4, 10, 10, seed=0))
        bad.append(done.bad_checks)
    assert bad == [0, 0, 0, 0, 1, 2]
    assert done.best_step == 1


@pytest.mark.full
def test_adapters_train_beside_the_projection_and_later_stages_keep_it(words, tmp_path):
    summary = run(
        *words, f"run_dir={tmp_path}", "model.lora.rank=2", "sft.lr=1e-2", "preference.enabled=true",
        "preference.algorithm=sdpo", "preference.max_steps=2", "preference.lr=1e-2", "preference.global_batch_size=16",
        "reference.mode=copy",
    )  # fmt: skip
    projections = []
    for stage in ("sft", "preference"):
        step = chosen_checkpoint(tmp_path / stage)
        reader = FileSystemReader(step)
        sizes = {name: entry.size for name, entry in reader.read_metadata().state_dict_metadata.items()}
        assert all(".lora." in name or "item_tokens." in name for name in sizes), sizes
        weight = {OUTER: torch.empty(sizes[OUTER])}
        load(weight, storage_reader=reader, no_dist=True)
        projections.append(weight[OUTER])
        again = run(f"checkpoint={tmp_path / stage}", "--recipe", str(tmp_path / "recipe.yaml"), verb="evaluate")
        assert again["test"]["candidates"] == summary["candidates"][stage]
    assert torch.equal(*projections)


@pytest.mark.full
def test_rl_and_preference_go_on_with_item_tokens(words, tmp_path):
    summary = run(
        *words, f"run_dir={tmp_path}", "preference.enabled=true", "preference.algorithm=sdpo", "preference.max_steps=2",
        "preference.global_batch_size=16", "rl.enabled=true", "rl.init=preference", "rl.max_steps=2",
        "rl.prompts_per_step=4", "rl.group_size=4",
    )  # fmt: skip
    assert {"sft", "preference", "rl"} <= summary["candidates"].keys()
