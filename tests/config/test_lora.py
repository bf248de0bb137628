"""Section ``model.lora``: its defaults, sizes and errors."""

from __future__ import annotations

import pytest

from tawin_nemo.config.backbones import BACKBONES, backbone
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.lora import MATRICES, check_lora, layer_parameters, matrix_shape, targets
from tawin_nemo.config.schema import LoraConfig
from tawin_nemo.util.errors import ConfigError

LLAMA = backbone("llama-2-7b")


def test_it_is_off_by_default_and_then_for_all_matrices() -> None:
    lora = load_recipe(None).model.lora
    assert (lora.rank, layer_parameters(LLAMA, lora), targets("linear_qkv", lora)) == (0, 0, ())
    lora = load_recipe(None, ["model.lora.rank=8"]).model.lora
    assert [name for linear in MATRICES for name in targets(linear, lora)] == lora.target_modules
    assert load_recipe(None, ["model.lora.rank=8", "model.lora.target_modules=[q_proj]"]).model.lora.alpha == 16.0


@pytest.mark.parametrize("name", ["llama-2-7b", "qwen2.5-0.5b", "qwen3-0.6b", "nano"])
def test_the_matrices_are_those_of_the_backbone(name: str) -> None:
    """All of a layer but biases and norms."""
    shape = BACKBONES[name]
    matrices = sum(rows * columns for rows, columns in (matrix_shape(shape, m) for ms in MATRICES.values() for m in ms))
    bias = (shape.heads + 2 * shape.kv_heads) * shape.kv_channels if shape.qkv_bias else 0
    norms = 2 * shape.hidden + (2 * shape.kv_channels if shape.qk_norm else 0)
    assert matrices + bias + norms == shape.layer_parameters()


def test_parameters_of_the_adapters_of_llama_2_7b() -> None:
    """PEFT counts 19,988,480 for rank 8 on all seven matrices of Llama-2-7B."""
    assert 32 * layer_parameters(LLAMA, LoraConfig(rank=8)) == 19_988_480
    # on two ranks the uncut factors are whole: A of q, k, v and of gate, up, and B of o and of down
    halves = layer_parameters(LLAMA, LoraConfig(rank=8), tp=2)
    assert 2 * halves - layer_parameters(LLAMA, LoraConfig(rank=8)) == 8 * (3 + 2 + 1 + 1) * 4096


def test_a_rank_above_the_smaller_side() -> None:
    check_lora(BACKBONES["nano"], LoraConfig(rank=16))
    check_lora(BACKBONES["nano"], LoraConfig(rank=0, target_modules=[]))
    with pytest.raises(ConfigError, match=r"model\.lora\.rank=17 is more than .* of k_proj, which is 16 .* 16 or less"):
        check_lora(BACKBONES["nano"], LoraConfig(rank=17))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.lora.target_modules=[q_porj]", r"target_modules=q_porj is not one of q_proj, .*did you mean q_proj"),
        ("model.lora.target_modules=[linear_qkv]", r"target_modules=linear_qkv is not one of q_proj, k_proj"),
        ("model.lora.target_modules=[]", r"target_modules=\[\] must name one matrix or more"),
        ("model.lora.target_modules=[q_proj,q_proj]", r"must name one matrix or more, each once"),
        ("model.lora.alpha=0", r"model\.lora\.alpha=0.0 is out of limits"),
        ("model.lora.dropout=0.95", r"model\.lora\.dropout=0.95 is out of limits"),
        ("model.precision=fp8-tensorwise", r"model\.precision=fp8-tensorwise; set model\.precision=bf16"),
        ("rollout.precision=fp8-blockwise", r"rollout\.precision=fp8-blockwise; set rollout\.precision=model"),
        ("eval.precision=fp8-tensorwise", r"eval\.precision=fp8-tensorwise; set eval\.precision=model"),
        ("model.freeze_backbone=true model.init=somewhere", r"first in a run of their own, .* start=RUN_DIR/sft"),
        ("reference.refresh=ema", r"reference\.refresh=ema; set it to off"),
        ("reference.precision=bf16", r"reference\.precision=bf16; set it to model"),
    ],
)
def test_what_makes_no_sense_names_the_remedy(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, ["model.lora.rank=4", *words.split()])
