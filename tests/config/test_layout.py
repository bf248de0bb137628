"""Which layouts are possible: against what the model builder accepts, and the nearest to a wrong one."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tawin_nemo.config.backbones import BACKBONES, backbone
from tawin_nemo.config.gpus import GPUS, gpu, known_peak
from tawin_nemo.config.layout import (
    Layout,
    check_shape,
    distance,
    layout_on,
    padded_vocab,
    possible,
    problems,
    rollout_layout,
    rollout_problems,
    training_layout,
)
from tawin_nemo.config.load import load_recipe
from tawin_nemo.util.errors import ConfigError

QWEN_7B = backbone("qwen2.5-7b")


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b", "llama-3.2-1b"])
def test_the_planner_refuses_exactly_what_the_model_builder_refuses(name: str):
    from tawin_nemo.config.schema import ModelConfig
    from tawin_nemo.models.megatron.model.build import check_rollout_model, model_config

    shape = BACKBONES[name]
    seen = set()
    for tp in range(1, 9):
        for pp in range(1, 9):
            cfg = ModelConfig(backbone=name, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
            accepted = {_accepts(model_config, shape, cfg),
                        _accepts(check_rollout_model, shape, ModelConfig(backbone=name), tp, pp)}  # fmt: skip
            assert accepted == {problems(shape, Layout(tp, pp), tp * pp) == []}, (tp, pp)
            seen |= accepted
    assert seen == {True, False}


def _accepts(build: Callable[..., object], *arguments: object) -> bool:
    try:
        build(*arguments)
    except ConfigError:
        return False
    return True


def test_the_builders_error_names_key_backbone_and_the_sizes_that_are_possible():
    with pytest.raises(ConfigError) as error:
        check_shape(QWEN_7B, Layout(8, 1), name="qwen2.5-7b", section="rollout")
    assert str(error.value) == (
        "rollout.tensor_model_parallel_size=8 does not divide the 28 attention heads of qwen2.5-7b: use one of 1, 2, 4"
    )


def test_layouts_of_a_recipe():
    recipe = load_recipe(None, ["trainer.devices=8", "rollout.tensor_model_parallel_size=2",
                                "model.backbone=qwen2.5-7b", "model.pipeline_model_parallel_size=2"])  # fmt: skip
    training = training_layout(recipe)
    assert training == Layout(1, 2, 4)
    assert rollout_layout(recipe, training) == Layout(2, 2, 2)
    assert training_layout(recipe, 32).dp == 16
    assert rollout_layout(load_recipe(None, ["trainer.devices=8"]), Layout(dp=8)) == Layout(dp=8)


def test_rollouts_are_named_by_their_own_keys():
    recipe = load_recipe(None, ["rollout.tensor_model_parallel_size=3", "trainer.devices=3"])
    (first, *_) = rollout_problems(QWEN_7B, recipe, Layout(dp=3), 3)
    assert first == "rollout.tensor_model_parallel_size=3 does not divide the 28 attention heads"


@pytest.mark.parametrize(
    ("tp", "pp", "gpus", "parts"),
    [
        (3, 1, 24, ["model.tensor_model_parallel_size=3", "28 attention heads", "4 key-value heads"]),
        (1, 16, 32, ["model.pipeline_model_parallel_size=16", "28 layers"]),
        (2, 2, 6, ["TP 2 x PP 2 = 4 ranks do not divide 6 GPUs"]),
        (16, 1, 32, ["more than the 8 GPUs of one node"]),
    ],
)
def test_problems_name_key_and_value(tp: int, pp: int, gpus: int, parts: list[str]):
    text = "; ".join(problems(QWEN_7B, Layout(tp, pp), gpus))
    for part in parts:
        assert part in text


def test_sequence_parallel_needs_tensor_parallel():
    assert "sequence_parallel" in problems(QWEN_7B, Layout(sequence_parallel=True), 1)[0]


def test_possible_layouts_come_with_fewest_model_ranks_first():
    found = [(layout.tp, layout.pp, layout.dp) for layout in possible(QWEN_7B, 8)]
    assert found == [(1, 1, 8), (2, 1, 4), (1, 2, 4), (4, 1, 2), (2, 2, 2), (1, 4, 2), (4, 2, 1), (2, 4, 1), (1, 8, 1)]
    assert all(layout.sequence_parallel == (layout.tp > 1) for layout in possible(QWEN_7B, 8))


def test_distance_counts_doublings():
    assert distance(Layout(1, 1), Layout(2, 1)) == (1.0, 2)
    assert distance(Layout(4, 1), Layout(1, 4)) == (4.0, 4)
    near = min(possible(QWEN_7B, 32), key=lambda other: distance(Layout(3, 1), other))
    assert (near.tp, near.pp) == (4, 1)


def test_dp_is_what_is_left():
    assert layout_on(32, 2, 2, sequence_parallel=False).dp == 8


def test_vocabulary_is_padded_to_a_multiple():
    assert padded_vocab(replace(QWEN_7B, vocab=51), 2) == 52


def test_gpus_by_name():
    assert (gpu("H800").memory_gib, gpu("h200").memory_gib, gpu("a100-40").memory_gib) == (80, 141, 40)
    assert gpu("h800").peak_flops("fp8-blockwise") == 1979e12
    with pytest.raises(ConfigError, match="did you mean h100"):
        gpu("h10")
    with pytest.raises(ConfigError, match=r"model\.precision=fp8-delayed does not exist on a100; use fp32 or bf16"):
        gpu("a100").peak_flops("fp8-delayed")


def test_names_and_devices_agree():
    devices = {"h800": "NVIDIA H800", "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200",
               "a100": "NVIDIA A100-SXM4-80GB", "a100-40": "NVIDIA A100-SXM4-40GB"}  # fmt: skip
    assert devices.keys() == GPUS.keys()
    for name, device in devices.items():
        assert known_peak(device, "bf16") == GPUS[name].peaks["bf16"]
