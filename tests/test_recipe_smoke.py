"""Every shipped recipe loads, and runs: two SFT-sized epochs at most and two RL steps, on a nano model and a slice.

The recipes of one family differ from its first one in sizes only, which a smoke run makes small anyway: the first one
runs for all of them, and a test holds the others to sizes.
"""

from pathlib import Path

import pytest

from tawin_nemo.config.load import differences, load_recipe, to_yaml
from tawin_nemo.data.tasks import active_tasks
from tawin_nemo.tools.plan.verb import plan_recipe
from tests.train.runs import run

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
#: Recipes on pretrained backbones: titles, and semantic IDs.
FAMILIES = {
    f"tawin_qwen7b{kind}": [f"tawin_{size}{kind}" for size in ("qwen0.5b", "qwen3b", "llama1b")]
    for kind in ("", "_sid")
} | {f"{algorithm}_qwen7b": [f"{algorithm}_qwen0.5b"] for algorithm in ("sdpo", "napo")}
MEMBERS = [member for members in FAMILIES.values() for member in members]
#: What a backbone may change.
SIZES = (
    *("name", "model.backbone", "model.init", "model.tensor_model_parallel_size", "model.sequence_parallel"),
    *("trainer.num_nodes", "sft.micro_batch_tokens", "rl.micro_batch_tokens"),
    "preference.micro_batch_tokens",
)
TINY = (
    "model.backbone=nano data.train_limit=80 data.eval_limit=8 data.max_history=3 sft.epochs=1 "
    "sft.global_batch_size=32 rl.max_steps=2 rl.prompts_per_step=4 rl.group_size=4 eval.beams=10 trainer.threads=1 "
    "prepare.synthetic_items=150 prepare.synthetic_users=500 preference.max_steps=2 preference.global_batch_size=8 "
    "preference.share_group=4"
).split()
#: Recipes for a cluster and a pretrained model: one process, random weights, generated data.
ONE_PROCESS = (
    "trainer.num_nodes=1 trainer.devices=1 model.tensor_model_parallel_size=1 model.pipeline_model_parallel_size=1 "
    "model.sequence_parallel=false model.init=random"
).split()
CODES = "Industrial_and_Scientific.index.rqkmeans_constrained.json"


def named(name: str) -> Path:
    return next(path for path in RECIPES if path.stem == name)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem not in MEMBERS], ids=lambda path: path.stem)
def test_two_steps(path, tmp_path, request):
    overrides = [f"run_dir={tmp_path}", *TINY]
    recipe = load_recipe(path)
    if recipe.data.dataset == "inter" or recipe.catalog.kind == "sid":
        overrides.append(f"data.root={request.getfixturevalue('industrial')}")
    if recipe.data.dataset == "inter" and recipe.catalog.kind == "title":
        overrides.append(f"data.tokenizer={request.getfixturevalue('qwen_tokenizer')}")
    if recipe.model.init != "random":
        overrides += [
            *ONE_PROCESS,
            f"catalog.index={CODES}" if recipe.catalog.kind == "sid" else "data.dataset=synthetic",
        ]
        if active_tasks(recipe.align):
            overrides.append("data.tokenizer=bpe")  # random weights know no words
    single = [task.name for task in active_tasks(recipe.align) if not task.of_history]  # about each of 3,686 items
    overrides += [f"align.{name}={0.02 * getattr(recipe.align, name)}" for name in single]
    overrides += ["align.tested_rows=16", "align.holdout=0.005"] if single else []
    if recipe.rollout.placement == "server":  # with servers: tests/placement/test_servers.py
        overrides += ["rollout.placement=colocated", "rollout.servers=[]"]
    if recipe.preference.aux:
        aux = tmp_path / "aux"
        run("--recipe", str(path), *overrides, f"run_dir={aux}", "baseline.model=sasrec", "baseline.epochs=1")
        overrides.append(f"preference.aux={aux / 'sasrec'}")
    summary = run("--recipe", str(path), *overrides)
    assert summary["invalid_rate"] == 0.0
    assert {stage for stage in ("sft", "preference", "rl") if getattr(recipe, stage).enabled} <= summary.keys()
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("first", FAMILIES)
def test_a_family_differs_in_sizes_only(first):
    expected = to_yaml(load_recipe(named(first)))
    for member in FAMILIES[first]:
        assert differences(expected, to_yaml(load_recipe(named(member))), ignore=SIZES) == []


def test_codes_change_what_codes_need_and_train_sft_first():
    changed = differences(
        *(to_yaml(load_recipe(named(f"tawin_qwen7b{kind}"))) for kind in ("", "_sid")), ignore=["name"]
    )
    assert sorted(line.split(":")[0] for line in changed) == ["catalog.index", "catalog.kind", "rl.init", "sft.enabled"]


@pytest.mark.parametrize("extra", [(), ("rl.init=sft",)], ids=["as it is", "SFT first"])
@pytest.mark.parametrize("name", [*FAMILIES, *MEMBERS, "sft_qwen7b"])
def test_a_backbone_recipe_fits_32_h800(name, extra):
    """Also on the GPUs that the recipe itself asks for, whose layout is then the planner's own choice."""
    if name.startswith(("sft", "napo", "sdpo")) and extra:
        pytest.skip("it has no RL")
    for words in (["gpus=32", *extra], [*extra]):
        found = plan_recipe(named(name), words, lambda folder: pytest.fail(f"{folder} was read"))
        assert found.best == found.layout
        assert found.fullest.parts.total < 80 * 2**30
        assert ("preference update" in {peak.phase for peak in found.peaks}) == name.startswith(("napo", "sdpo"))


def test_napos_settings():
    """NAPO, Section 4: 3 epochs after SFT at 1e-5, batch 128, beta 1, three rejected items; S-DPO one epoch."""
    napo, sdpo = (load_recipe(named(name)).preference for name in ("napo_qwen7b", "sdpo_qwen7b"))
    for p in (napo, sdpo):
        assert (p.lr, p.global_batch_size, p.beta, p.num_negatives, p.schedule) == (1e-5, 128, 1.0, 3, "cosine")
    assert (napo.epochs, napo.gamma0, napo.rho, napo.alpha, napo.share_group) == (3, 1.0, 0.7, 0.3, 16)
    assert (sdpo.epochs, napo.normalised_by, sdpo.normalised_by) == (1, "full", "off")


def test_the_papers_settings():
    """Section 4 and Appendix G: 512 sequences a step in groups of 16, 2 epochs, learning rates, KL, early stopping."""
    recipe = load_recipe(named("tawin_qwen7b"))
    rl, sft = recipe.rl, load_recipe(named("tawin_qwen7b"), ["rl.init=sft"]).sft
    assert (rl.prompts_per_step * rl.group_size, rl.group_size, rl.epochs, rl.lr, rl.beta) == (512, 16, 2, 1e-5, 1e-3)
    assert (rl.init, recipe.sft.enabled, rl.rows, rl.tawin.k, rl.tawin.enabled) == ("base", False, "all", 4, True)
    assert (sft.enabled, sft.lr, sft.global_batch_size, sft.epochs, sft.patience) == (True, 3e-4, 128, 10, 1)
    assert (recipe.data.max_history, recipe.catalog.kind, recipe.prepare.k_core) == (10, "title", 5)
