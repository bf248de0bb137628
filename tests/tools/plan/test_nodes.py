"""Overlapped exchange in a step's time, and the batch from which another node helps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import TrainerConfig
from tawin_nemo.tools.plan import nodes
from tawin_nemo.tools.plan.timing import rl_step, sft_step
from tawin_nemo.tools.plan.verb import plan_facts, plan_table
from tawin_nemo.tools.plan.work import TITLES
from tests.tools.plan.test_plan import REPOSITORY, Layout, plan, rates

PLAIN = "trainer.overlap_grad_reduce=false trainer.overlap_param_gather=false".split()


def test_an_overlapped_sum_hides_behind_the_backward_pass_but_for_its_last_bucket():
    plain = rates(Layout(dp=16))
    both = replace(plain, trainer=TrainerConfig(overlap_grad_reduce=True, overlap_param_gather=True))
    reduce = replace(plain, trainer=TrainerConfig(overlap_grad_reduce=True))
    whole, count = plain.exchange(), 7_615_616_512
    buckets = count / 40e6
    assert reduce.exchange(0.0) == pytest.approx(whole)  # nothing to hide behind
    gradients, weights = whole * 4 / 6, whole * 2 / 6
    assert reduce.exchange(0.3 * gradients) == pytest.approx(0.8 * gradients + weights)  # 2/3 of a pass is backward
    assert reduce.exchange(1e3) == pytest.approx(gradients / buckets + weights)
    assert both.exchange(1e3) == pytest.approx(whole / buckets)
    assert both.exchange(1e3, gather_behind=0.0) == pytest.approx(gradients / buckets + weights)
    assert plain.exchange(1e3) == whole
    many = replace(both, layout=Layout(dp=400))  # then a bucket has a million parameters a replica
    assert many.exchange(1e3) == pytest.approx(replace(many, trainer=TrainerConfig()).exchange() * 400e6 / count)
    assert replace(both, layout=Layout()).exchange(1e3) == 0.0


def test_a_rollout_waits_for_the_weights_and_the_next_update_of_a_step_does_not():
    recipe = load_recipe(None, ["rl.inner_updates=3", "rl.prompts_per_step=64000", "sft.global_batch_size=64000"])
    plain = rates(Layout(dp=16))
    both = replace(plain, trainer=TrainerConfig(overlap_grad_reduce=True, overlap_param_gather=True))
    whole, buckets = plain.exchange(), 7_615_616_512 / 40e6
    assert rl_step(recipe, TITLES, plain).seconds["exchange"] == pytest.approx(3 * whole)
    hidden = 3 * (whole * 4 / 6) / buckets + (2 / buckets + 1) * whole * 2 / 6
    assert rl_step(recipe, TITLES, both).seconds["exchange"] == pytest.approx(hidden)
    assert sft_step(recipe, TITLES, both).seconds["exchange"] == pytest.approx(whole / buckets)


def test_the_table_has_the_times_of_plans_of_their_own():
    times = plan("gpus=8").more_nodes
    assert times is not None
    assert (times.key, times.nodes, list(times.seconds)) == ("rl.prompts_per_step", (1, 2, 4), [32, 128, 512, 2048])
    for batch in (32, 2048):
        for place, count in enumerate(times.nodes):
            alone = plan(f"gpus={8 * count}", f"rl.prompts_per_step={batch}").rl
            assert times.seconds[batch][place] == pytest.approx(alone.total)
    assert plan("gpus=16").more_nodes == times  # whatever the plan itself is for
    assert plan("gpus=8", *PLAIN).more_nodes != times


@pytest.mark.parametrize("words", [[], PLAIN])
def test_another_node_helps_from_that_batch_on(words: list[str]):
    times = plan("gpus=8", *words).more_nodes
    assert times is not None
    assert set(times.helps_from) == {2, 4}
    for count, batch in times.helps_from.items():
        assert batch is not None
        replicas = 8 * count // 2

        def gain(prompts: int, count: int = count) -> float:
            few, many = (plan(f"gpus={gpus}", f"rl.prompts_per_step={prompts}", *words).rl.total
                         for gpus in (4 * count, 8 * count))  # fmt: skip
            return few / many

        assert batch % replicas == 0
        assert gain(batch) >= nodes.HELPS > gain(batch - replicas)


def test_a_layout_that_does_not_fit_on_one_node_and_ranks_that_search_have_no_such_column():
    found = plan("gpus=32", "model.tensor_model_parallel_size=1", "model.sequence_parallel=false",
                 "model.recompute=full", "eval.token_budget=150000", "rl.beta=0", "reference.mode=off")  # fmt: skip
    assert found.more_nodes is not None
    assert found.more_nodes.nodes == (2, 4)
    assert set(found.more_nodes.helps_from) == {4}
    assert plan("gpus=16", "rollout.placement=separate", "rollout.devices=8").more_nodes is None
    assert plan("gpus=4", recipe=REPOSITORY / "recipes" / "tawin_qwen0.5b.yaml").more_nodes is None


def test_without_rl_the_table_is_about_the_stage_before():
    sft = plan("gpus=8", recipe=REPOSITORY / "recipes" / "sft_qwen7b.yaml").more_nodes
    napo = plan("gpus=8", "preference.aux=x", recipe=REPOSITORY / "recipes" / "napo_qwen7b.yaml").more_nodes
    assert sft is not None
    assert napo is not None
    assert (sft.key, napo.key) == ("sft.global_batch_size", "preference.global_batch_size")


def test_the_table_is_printed_with_what_was_never_compared_with_a_gpu():
    found = plan("gpus=8")
    text, facts = plan_table(found), plan_facts(found)
    assert "more nodes  rl.prompts_per_step    1 node   2 nodes   4 nodes  (s a step)" in text
    batch = found.more_nodes.helps_from[4]
    assert f"4 nodes are 1.6 times as fast as 2 nodes from rl.prompts_per_step={batch} on" in text
    assert "unverified  memory was compared with processes on a CPU, never with a GPU" in text
    assert "unverified  no time was compared with a GPU: launches were counted on a pretended device, 8 us" in text
    assert facts["never_compared_with_a_gpu"] == ["memory_bytes", "rl_step", "more_nodes"]
    assert facts["more_nodes"]["helps_from"][4] == batch
