"""From shape to model: sizes, initial weights, refused combinations, dropout and recomputation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tawin_nemo.config.backbones import Backbone, backbone, with_vocab
from tawin_nemo.config.layout import padded_vocab
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.model.build import build_model, model_config
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.util.errors import ConfigError

SHAPE = Backbone("qwen2", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, max_position=256)


@pytest.fixture(autouse=True)
def _one_process() -> None:
    runtime.initialize(ModelConfig(), seed=1)


@pytest.mark.parametrize(
    "shape", [SHAPE, replace(SHAPE, family="llama", tied=False), with_vocab(backbone("nano"), 60)], ids=str
)
def test_number_of_parameters(shape: Backbone) -> None:
    model = build_model(shape, ModelConfig(), seed=0)
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    assert sum(p.numel() for p in model.parameters()) == shape.body_parameters + embeddings


def test_weights_are_a_function_of_the_seed() -> None:
    first, same, other = (dict(build_model(SHAPE, ModelConfig(), seed=s).named_parameters()) for s in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [name for name in first if first[name].dim() == 2]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


def test_weights_do_not_depend_on_torch_generators() -> None:
    torch.manual_seed(1)
    first = build_model(SHAPE, ModelConfig(), seed=3).decoder.layers[1].mlp.linear_fc1.weight
    torch.manual_seed(2)
    assert torch.equal(first, build_model(SHAPE, ModelConfig(), seed=3).decoder.layers[1].mlp.linear_fc1.weight)


def test_spread_of_the_initial_weights() -> None:
    shape = replace(SHAPE, hidden=128, ffn=256, vocab=500)
    weights = dict(build_model(shape, ModelConfig(), seed=3).named_parameters())
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)), name
        else:
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            expected = 0.02 / (2 * shape.layers) ** 0.5 if residual else 0.02
            assert float(weight.std()) == pytest.approx(expected, rel=0.05), name  # 16,384 draws and more: 0.6 % noise


@pytest.mark.parametrize(("vocab", "size", "rows"), [(51, 1, 51), (51, 2, 52), (52, 4, 52), (53, 8, 56)])
def test_vocabulary_is_padded_to_the_tensor_parallel_size(vocab: int, size: int, rows: int) -> None:
    assert padded_vocab(replace(SHAPE, vocab=vocab), size) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor_model_parallel_size": 3}, "tensor_model_parallel_size=3 does not divide the 4 attention heads"),
        ({"tensor_model_parallel_size": 4}, "tensor_model_parallel_size=4 does not divide the 2 key-value heads"),
        ({"pipeline_model_parallel_size": 4}, "pipeline_model_parallel_size=4: the 2 layers"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config(SHAPE, ModelConfig(**change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
@pytest.mark.parametrize("precision", ["fp8-blockwise", "fp8-tensorwise", "fp8-delayed"])
def test_fp8_is_refused_without_its_hardware(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"model.precision={precision} needs a CUDA device"):
        build_model(SHAPE, ModelConfig(precision=precision), seed=0)


def test_unset_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocabulary size is not set"):
        build_model(replace(SHAPE, vocab=0), ModelConfig(), seed=0)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_changes_no_gradient(recompute: str, dropout: float) -> None:
    tokens = torch.randint(0, SHAPE.vocab, (3, 9), generator=torch.Generator().manual_seed(0))
    gradients = []
    for how in ("none", recompute):
        model = build_model(SHAPE, ModelConfig(dropout=dropout, recompute=how), seed=3).train()
        runtime.seed_step(5, 1)
        model(tokens, None, None).square().mul(torch.linspace(0, 1, SHAPE.hidden)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-6)


def test_dropout_drops_in_training_only_and_repeats_with_the_step() -> None:
    tokens = torch.randint(0, SHAPE.vocab, (3, 9), generator=torch.Generator().manual_seed(0))
    model = build_model(SHAPE, ModelConfig(dropout=0.3), seed=3)
    plain = build_model(SHAPE, ModelConfig(), seed=3)

    def hidden(step: int) -> torch.Tensor:
        runtime.seed_step(5, step)
        return model(tokens, None, None)

    model.train()
    first = hidden(1)
    assert torch.equal(hidden(1), first)
    assert not torch.equal(hidden(2), first)
    model.eval()
    assert torch.equal(hidden(1), plain(tokens, None, None))
