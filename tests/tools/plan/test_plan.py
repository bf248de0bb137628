"""FLOP counts, times and the verb: figures against arithmetic done by hand, refusals with their remedies."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tawin_nemo.config.backbones import FlopCount, backbone
from tawin_nemo.config.gpus import GPUS
from tawin_nemo.config.layout import Layout
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import Recipe, TrainerConfig
from tawin_nemo.tools.plan.memory import GIB, stage_parameters
from tawin_nemo.tools.plan.plan import Plan, fitting, limit_bytes
from tawin_nemo.tools.plan.timing import Rates, preference_step, rl_step, sft_step
from tawin_nemo.tools.plan.verb import plan_facts, plan_recipe, plan_table, split_options
from tawin_nemo.tools.plan.work import CHILDREN, CODES, TITLES, Lengths, rl_step_work, rows_work, sft_pass
from tawin_nemo.util.errors import ConfigError

REPOSITORY = Path(__file__).parents[3]
QWEN_7B = REPOSITORY / "recipes" / "tawin_qwen7b.yaml"
SHAPE = backbone("qwen2.5-7b")


def plan(*words: str, recipe: Path | None = QWEN_7B) -> Plan:
    return plan_recipe(recipe, words, lambda folder: pytest.fail(f"{folder} was read"))


# -- work ------------------------------------------------------------------------------------------------------------
def test_work_of_rows_counts_every_token_pair_and_logit():
    """2 prompts of 3 tokens, 2 items of 3 tokens: vocabulary space runs 2 of each, trie space the one with a choice."""
    lengths = Lengths(prompt=3, path=3, decisions=1)
    assert rows_work(2, lengths, 2, "vocab", 10) == FlopCount(2 * 7, 2 * (6 + 2 * (4 + 5)), 2 * 2 * 3 * 10)
    assert rows_work(2, lengths, 2, "trie", 10) == FlopCount(2 * 5, 2 * (6 + 2 * 4), 2 * 2 * CHILDREN)


def test_work_agrees_with_the_counter_of_training():
    """The same batch through train/mfu.py, which reads the token trees themselves."""
    import numpy as np

    from tawin_nemo.data.trees import tree_batch
    from tawin_nemo.run.mfu import forward_flop_count
    from tawin_nemo.types import TokenRows

    prompts = TokenRows.from_lists([[1, 2, 3, 4]] * 2)
    paths = TokenRows.from_lists([[5 + c, 9, 1] for _ in range(2) for c in range(3)])
    counted = forward_flop_count([tree_batch(prompts, paths, np.repeat([0, 1], 3), None)[0]], vocab=20)
    planned = rows_work(2, Lengths(4, 3, 1), 3, "vocab", 20)
    assert (planned.tokens, planned.pairs) == (counted.tokens, counted.pairs)
    assert planned.logits >= counted.logits > 0.5 * planned.logits  # candidates share their first place


def test_an_rl_step_rolls_out_scores_and_updates():
    recipe = load_recipe(None, ["rl.beta=0.01", "rl.inner_updates=2", "rollout.width=32"])
    work = rl_step_work(recipe, TITLES, 1000, 64)
    assert work.rollout == rows_work(64, TITLES, 32, "trie", 1000)
    assert work.reference == work.update == rows_work(64, TITLES, 16, "trie", 1000)
    assert (work.scoring, work.updates) == (FlopCount(), 2)
    free = load_recipe(None, ["rl.beta=0", "reference.mode=off", "rl.policy_space=vocab"])
    assert rl_step_work(free, TITLES, 1000, 64).reference == FlopCount()
    assert rl_step_work(free, TITLES, 1000, 64).scoring == rows_work(64, TITLES, 16, "vocab", 1000)


def test_sft_micro_batches_are_chains():
    work = sft_pass(load_recipe(None, ["sft.micro_batch_tokens=1000"]), Lengths(90, 11, 2))
    assert (work.tokens, work.tree, work.keys, work.scored) == (1000, 0, 100, 110)


# -- times -----------------------------------------------------------------------------------------------------------
def rates(layout: Layout, **other: object) -> Rates:
    given = {"gpu": GPUS["h800"], "precision": "bf16", "mfu": 0.5, "recompute": "none"}
    return Rates(SHAPE, layout, **{**given, **other})  # type: ignore[arg-type]


def test_forward_time_is_flops_over_mfu_times_peak():
    work = FlopCount(tokens=1000)
    flops = 2.0 * SHAPE.body_parameters * 1000
    assert rates(Layout(2, 2)).forward(work) == pytest.approx(flops / (0.5 * 989e12 * 4))


def test_training_counts_recomputation_and_the_pipelines_idle_ends():
    work = FlopCount(tokens=1_000_000)
    assert rates(Layout()).training(work, 4) == pytest.approx(3 * rates(Layout()).forward(work))
    whole = rates(Layout(), recompute="full")
    assert whole.training(work, 4) == pytest.approx(4 * whole.forward(work))
    piped = rates(Layout(pp=4))
    assert piped.training(work, 8) == pytest.approx(3 * piped.forward(work) * 11 / 8)


def test_a_search_reads_the_weights_once_per_level():
    slow = replace(GPUS["h800"], bandwidth_gb_s=335.0)  # on a real one the launches take longer
    seconds = rates(Layout(), gpu=slow).search(FlopCount(tokens=1), levels=3)
    assert seconds == pytest.approx(4 * 2 * 7_615_616_512 / 335e9)


def test_small_passes_take_the_time_of_their_launches():
    """478 a model call of 28 layers and 29 a step of the search, 8 microseconds each."""
    rate = rates(Layout())
    slow_reads = 4 * 2 * 7_615_616_512 / (GPUS["h800"].bandwidth_gb_s * 1e9)  # of the weights
    assert rate.search(FlopCount(tokens=1), levels=3) == pytest.approx(max((4 * 478 + 3 * 29) * 8e-6, slow_reads))
    assert rate.scoring(FlopCount(tokens=1), micro=2) == pytest.approx(2 * (28 * 24 + 46) * 8e-6)
    assert rate.scoring(FlopCount(), micro=2) == 0.0
    assert rate.training(FlopCount(tokens=1), 3) == pytest.approx(3 * (28 * 81 + 160) * 8e-6)
    many = FlopCount(tokens=100_000)
    assert rate.scoring(many, micro=2) == rate.forward(many)


def test_more_nodes_pay_for_larger_batches_only():
    """What slurm/tawin_qwen7b.sh says about them."""

    def gain(prompts: int) -> float:
        words = [f"rl.prompts_per_step={prompts}"]
        one, four = (plan_recipe(QWEN_7B, [f"gpus={gpus}", *words], pytest.fail).rl.total for gpus in (8, 32))
        return one / four

    pages = [(REPOSITORY / "slurm" / name).read_text(encoding="utf-8") for name in ("tawin_qwen7b.sh", "README.md")]
    for text in pages:
        assert f"{gain(32):.1f} times as fast" in text
        assert f"{gain(1408):.1f} times as fast as one" in text
    helps = plan("gpus=8").more_nodes.helps_from
    assert f"{helps[2]} prompts for the second node, {helps[4]} for the fourth" in pages[1]


def test_gradients_travel_by_nvlink_inside_a_node_and_by_network_beyond():
    count = stage_parameters(SHAPE, Layout(), 0)
    assert rates(Layout(dp=8)).exchange() == pytest.approx(7 / 8 * 6 * count / 200e9)
    # between nodes by the adapters of all GPUs that a replica group has in a node
    a100 = GPUS["a100"]
    assert rates(Layout(dp=16)).exchange() == pytest.approx(15 / 16 * 6 * count / min(200e9, 8 * 50e9))
    half = stage_parameters(SHAPE, Layout(tp=4), 0)
    assert rates(Layout(tp=4, dp=16)).exchange() == pytest.approx(15 / 16 * 6 * half / (2 * 50e9))
    assert rates(Layout(dp=16), gpu=a100).exchange() == pytest.approx(
        15 / 16 * 6 * count / (1e9 * min(a100.nvlink_gb_s, 8 * a100.network_gb_s))
    )
    assert rates(Layout()).exchange() == 0.0
    narrow = {"trainer": TrainerConfig(grad_reduce_in_fp32=False)}
    assert rates(Layout(dp=8), **narrow).exchange() == pytest.approx(7 / 8 * 4 * count / 200e9)
    assert rates(Layout(dp=8), precision="fp32", **narrow).exchange() == pytest.approx(7 / 8 * 8 * count / 200e9)


def test_steps_add_up_and_the_fullest_replica_decides():
    recipe = load_recipe(None, ["rl.beta=0.01", "rl.prompts_per_step=9", "sft.global_batch_size=9"])
    one, eight = (rates(Layout(dp=dp)) for dp in (1, 8))
    assert rl_step(recipe, TITLES, one).flops == rl_step(recipe, TITLES, eight).flops
    alone, shared = (sft_step(recipe, Lengths(25_600, 29, 4), rate).seconds["update"] for rate in (one, eight))
    assert alone == pytest.approx(shared * 9 / 2)  # the fullest of 8 replicas has two of nine rows
    step = rl_step(recipe, TITLES, eight)
    assert set(step.seconds) == {"rollout", "reference", "update", "exchange"}
    assert step.total == sum(step.seconds.values())


def test_a_preference_step_scores_the_reference_once_and_pays_nothing_for_sharing():
    words = ["preference.enabled=true", "preference.num_negatives=3", "preference.global_batch_size=9"]
    one, eight = (rates(Layout(dp=dp)) for dp in (1, 8))
    sdpo = preference_step(load_recipe(None, words), TITLES, one)
    assert set(sdpo.seconds) == {"reference", "update"}
    assert sdpo.flops == pytest.approx(4 * rows_work(9, TITLES, 4, "trie", SHAPE.vocab).forward_flops(SHAPE))
    napo = preference_step(
        load_recipe(None, [*words, "preference.algorithm=napo", "preference.aux=x", "preference.share_group=8"]),
        TITLES, one,
    )  # fmt: skip
    assert set(napo.seconds) == {"update"}
    assert napo.seconds["update"] == sdpo.seconds["update"]
    assert napo.flops == pytest.approx(3 / 4 * sdpo.flops)
    shared = preference_step(load_recipe(None, words), TITLES, eight)
    assert sdpo.seconds["update"] == pytest.approx(shared.seconds["update"] * 9 / 2)


def test_idle_replicas_of_a_preference_step_are_named():
    found = plan(
        "gpus=32", "gpu=h800", "sft.enabled=true", "preference.enabled=true", "preference.algorithm=napo",
        "preference.aux=x", "preference.micro_batch_tokens=8192",
    )  # fmt: skip
    assert any("8 sharing groups for 16 replicas" in note for note in found.notes)
    assert "preference step" in plan_table(found)


# -- plans -----------------------------------------------------------------------------------------------------------
def test_qwen_7b_on_32_h800_fits_and_is_what_the_planner_would_take():
    found = plan("gpus=32", "gpu=h800")
    assert (found.layout, found.best) == (Layout(2, 1, 16, True), Layout(2, 1, 16, True))
    assert found.fullest.parts.total < limit_bytes(GPUS["h800"]) < 80 * GIB
    text = plan_table(found)
    for part in ("7.616 B", "TP 2 x PP 1 x DP 16", "gradients", "kv cache", "RL step", "best        this layout"):
        assert part in text
    facts = json.loads(json.dumps(plan_facts(found)))
    assert facts["memory_bytes"]["RL update"]["gradients"] == 4 * facts["parameters_per_rank"]


def test_rollouts_of_their_own_layout_cost_weights_and_save_pipeline_time():
    own = plan("gpus=32", "model.pipeline_model_parallel_size=4", "rollout.pipeline_model_parallel_size=1")
    same = plan("gpus=32", "model.pipeline_model_parallel_size=4")
    assert own.layout == same.layout == Layout(2, 4, 4, True)
    bytes_of_tp2 = 2 * stage_parameters(own.question.shape, Layout(2, 1), 0)
    for ours, theirs in zip(own.peaks, same.peaks, strict=True):
        assert ours.parts.rollout_weights == bytes_of_tp2
        assert theirs.parts.rollout_weights == 0.0
    assert {peak.phase: peak.parts.kv_cache for peak in own.peaks}["rollout"] > 0
    assert own.rl.seconds["rollout"] < same.rl.seconds["rollout"]
    assert any("rollouts and evaluation run under TP 2 x PP 1 x DP 16" in note for note in own.notes)
    offloaded = {peak.phase: peak.parts for peak in plan("gpus=32", "trainer.offload_optimizer=true").peaks}
    assert offloaded["rollout"].gradients == offloaded["rollout"].optimizer == 0.0
    assert offloaded["RL update"].optimizer > 0.0
    with pytest.raises(ConfigError, match=r"rollout\.tensor_model_parallel_size=3 does not divide"):
        plan("gpus=24", "rollout.tensor_model_parallel_size=3")


@pytest.mark.parametrize(
    ("trained", "rollout", "bytes_each"),
    [("bf16", "bf16", 0), ("bf16", "fp8-blockwise", 1), ("fp8-blockwise", "bf16", 0), ("bf16", "fp32", 4)],
)
def test_rollouts_of_their_own_precision_share_or_copy_the_weights(trained, rollout, bytes_each):
    made = plan("gpus=32", f"model.precision={trained}", f"rollout.precision={rollout}")
    count = stage_parameters(made.question.shape, made.layout, 0)
    assert {peak.parts.rollout_weights for peak in made.peaks} == {bytes_each * count}
    assert any(f"rollouts run in {rollout}" in note for note in made.notes) == (trained != rollout)


def test_rollouts_on_ranks_of_their_own_are_planned_apart():
    words = ("gpus=32", "rollout.placement=separate", "rollout.devices=8", "rollout.tensor_model_parallel_size=1")
    apart, shared = plan(*words), plan("gpus=32")
    shape = apart.question.shape
    assert apart.layout == Layout(2, 1, 12, True)
    peaks = {peak.phase: peak for peak in apart.peaks}
    assert {phase: peak.ranks for phase, peak in peaks.items()} == {
        "RL update": "training", "rollout": "rollout", "evaluation": "rollout"
    }  # fmt: skip
    searching = peaks["rollout"].parts
    assert searching.weights == 2 * stage_parameters(shape, Layout(), 0)
    assert searching.gradients == searching.optimizer == searching.reference == searching.rollout_weights == 0.0
    assert searching.kv_cache > 0
    training, before = peaks["RL update"].parts, {peak.phase: peak.parts for peak in shared.peaks}["RL update"]
    assert training.rollout_weights == 0.0
    assert training.optimizer == pytest.approx(before.optimizer * 16 / 12)  # shared by fewer replicas
    facts, table = plan_facts(apart), plan_table(apart)
    assert facts["rollout_layout"] == {"tp": 1, "pp": 1, "dp": 8, "sequence_parallel": False}
    assert facts["memory_bytes"]["rollout"]["ranks"] == "rollout"
    assert "24 GPUs train; 8 others only roll out and evaluate, under TP 1 x PP 1 x DP 8" in table
    assert "on ranks of" in table
    ahead = plan(*words, "rollout.ahead=1")
    rest = sum(seconds for phase, seconds in apart.rl.seconds.items() if phase != "rollout")
    assert ahead.rl.total == pytest.approx(max(rest, apart.rl.seconds["rollout"]))
    with pytest.raises(ConfigError, match=r"rollout\.devices=8 of 8 GPUs would only search"):
        plan(*words, "gpus=8")
    with pytest.raises(ConfigError, match=r"TP 3 .*do not divide 8 GPUs|rollout\.tensor_model_parallel_size=3"):
        plan(*words, "rollout.tensor_model_parallel_size=3")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model.tensor_model_parallel_size=1", "model.sequence_parallel=false"],
         ["does not fit", "RL update needs", "gradients 28.4", "nearest layout that fits: TP 2 x PP 1 x DP 16"]),
        (["model.tensor_model_parallel_size=3"],
         ["not possible", "28 attention heads", "nearest layout that fits", "TP 4 x PP 1 x DP 8",
          "model.tensor_model_parallel_size=4"]),
        (["model.pipeline_model_parallel_size=16"], ["28 layers", "nearest layout that fits", "TP 2 x PP 8 x DP 2"]),
        (["gpus=12"], ["gpus=12", "use 8 or 16"]),
        (["gpus=1", "model.tensor_model_parallel_size=1", "model.sequence_parallel=false"],
         ["does not fit", "No layout fits on 1 x h800", "model.recompute=full"]),
        (["gpu=h80"], ["gpu=h80", "did you mean h800"]),
        (["mfu=1.5"], ["mfu=1.5", "between 0 and 1"]),
        (["gpus=many"], ["gpus=many", "not a number"]),
        (["prompt_tokens=0"], ["prompt_tokens=0"]),
        (["rl.lrr=1"], ["rl.lrr=1", "did you mean rl.lr"]),
        (["rl.beta=-1"], ["rl.beta=-1"]),
        (["baseline.model=sasrec"], ["baseline.model=sasrec", "baseline.model=off"]),
        (["gpu=a100", "model.precision=fp8-delayed"], ["fp8-delayed does not exist on a100"]),
    ],
)  # fmt: skip
def test_refusals_name_key_value_and_remedy(words: list[str], parts: list[str]):
    given = words if any(word.startswith("gpus=") for word in words) else [*words, "gpus=32"]
    with pytest.raises(ConfigError) as error:
        plan(*given)
    for part in parts:
        assert part in str(error.value)


def test_the_best_layout_has_the_fewest_model_ranks_that_fit():
    found = plan("gpus=32", "model.tensor_model_parallel_size=4")
    assert found.best == Layout(2, 1, 16, True)
    assert "best        TP 2 x PP 1 x DP 16" in plan_table(found)
    assert Layout(1, 1, 32) not in fitting(found.question)
    roomy = replace(found.question, gpu=GPUS["h200"])
    assert fitting(roomy)[0] == Layout(1, 1, 32)


def test_the_half_billion_recipe_fits_with_one_model_per_gpu():
    found = plan("gpus=8", recipe=REPOSITORY / "recipes" / "tawin_qwen0.5b.yaml")
    assert (found.layout, found.best) == (Layout(dp=8), Layout(dp=8))


def test_idle_replicas_and_swapped_references_are_said():
    found = plan("gpus=32", "rl.prompts_per_step=8", "reference.mode=swap")
    assert any("8 of them idle" in note for note in found.notes)
    assert any("7.1 GiB of pinned CPU memory" in note for note in found.notes)


def test_without_gpus_the_recipes_own_number_counts():
    assert plan().question.gpus == 8


def test_options_are_taken_out_of_the_overrides():
    options, rest = split_options(["gpus=8", "rl.lr=1e-4", "mfu=0.4", "path_tokens=5"])
    assert (options.gpus, options.mfu, options.path_tokens, rest) == (8, 0.4, 5, ["rl.lr=1e-4"])
    assert plan("gpus=32", "path_tokens=3").question.lengths == replace(TITLES, path=3, decisions=3)


def test_lengths_follow_the_catalog():
    found = plan("gpus=32", "catalog.kind=sid", "catalog.index=x.json")
    assert found.question.lengths == CODES


def test_the_shape_of_a_folder_counts_where_it_is_there(tmp_path):
    half = backbone("qwen2.5-0.5b")
    found = plan_recipe(QWEN_7B, ["gpus=8", f"model.init={tmp_path}"], lambda folder: half)
    assert found.parameters == stage_parameters(half, Layout(), 0)


def test_models_for_cpus_have_the_tokenizers_vocabulary():
    assert plan("gpus=1", recipe=REPOSITORY / "recipes" / "quickstart.yaml").question.shape.vocab == 1024
    assert Recipe().model.backbone == "tiny"


# -- the command line ------------------------------------------------------------------------------------------------
PROBE = (
    "import sys; from tawin_nemo.cli import main\n"
    "code = main(sys.argv[1:])\n"
    "assert not {'torch', 'megatron', 'transformers', 'nemo'} & set(sys.modules)\n"
    "sys.exit(code)"
)


def test_the_verb_prints_a_table_and_one_json_line_without_torch():
    words = ["plan", "--recipe", str(QWEN_7B), "--gpus", "32", "--gpu", "h800"]
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["layout"]["tp"], facts["gpus"], facts["nodes"]) == (2, 32, 4)
    assert "GiB per GPU" in done.stderr


def test_the_verb_refuses_with_exit_code_2():
    words = ["plan", "--recipe", str(QWEN_7B), "--gpus=32", "model.tensor_model_parallel_size=8"]
    done = subprocess.run([sys.executable, "-m", "tawin_nemo", *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nearest layout that fits: TP 4 x PP 1 x DP 8" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_has_its_own_help():
    done = subprocess.run(
        [sys.executable, "-m", "tawin_nemo", "plan", "--help"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, "prompt_tokens=N" in done.stdout) == (0, True)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rollout.pipeline_model_parallel_size=2215", "rollout.pipeline_model_parallel_size=2215: the 2 layers"),
        ("trainer.num_nodes=10", r"gpus=10 \(trainer.num_nodes=10 x trainer.devices=1\) is not a whole number"),
        ("trainer.num_nodes=0", "trainer.num_nodes=0 is out of limits"),
        ("trainer.devices=11000", "trainer.devices=11000 is out of limits"),
    ],
)
def test_a_number_of_processes_that_cannot_be_is_named_by_its_key(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_recipe(None, [word], pytest.fail)
