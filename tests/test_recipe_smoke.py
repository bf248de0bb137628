"""Every shipped recipe runs: two SFT-sized epochs at most and two RL steps, on a nano model and a slice of the data."""

from pathlib import Path

import pytest

from tawin_nemo.recipe import load_recipe
from tests.train.runs import run

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
TINY = (
    "model.backbone=nano data.train_limit=80 data.eval_limit=8 data.max_history=3 sft.epochs=1 "
    "sft.global_batch_size=32 rl.max_steps=2 rl.prompts_per_step=4 rl.group_size=4 eval.beams=10 trainer.threads=1 "
    "prepare.synthetic_items=150 prepare.synthetic_users=500"
).split()
#: Recipes for a cluster and a pretrained model: one process, random weights, generated data.
ONE_PROCESS = (
    "trainer.num_nodes=1 trainer.devices=1 model.tensor_model_parallel_size=1 model.pipeline_model_parallel_size=1 "
    "model.sequence_parallel=false model.init=random data.dataset=synthetic"
).split()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_steps(path, tmp_path, request):
    overrides = [f"run_dir={tmp_path}", *TINY]
    recipe = load_recipe(path)
    if recipe.data.dataset == "inter":
        overrides.append(f"data.root={request.getfixturevalue('industrial')}")
    if recipe.data.dataset == "inter" and recipe.catalog.kind == "title":
        overrides.append(f"data.tokenizer={request.getfixturevalue('qwen_tokenizer')}")
    if recipe.model.init != "random":
        overrides += ONE_PROCESS
    summary = run("--recipe", str(path), *overrides)
    assert summary["invalid_rate"] == 0.0
    assert {"rl", *(["sft"] if recipe.sft.enabled else [])} <= summary.keys()
    assert (tmp_path / "report.html").stat().st_size > 10_000
