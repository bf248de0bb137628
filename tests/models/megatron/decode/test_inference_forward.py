"""The lean forward pass of a search equals megatron's own modules bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tawin_nemo.config.backbones import Backbone, RopeScaling
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.decode import inference_forward
from tawin_nemo.models.megatron.decode import lm as lm_module
from tawin_nemo.models.megatron.decode.kv_store import KeyValueSlots
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model import fp8_scales
from tawin_nemo.models.megatron.model.build import HiddenGPT, build_model
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows

QWEN = Backbone(
    "qwen2", hidden=32, layers=3, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, init_std=0.2, max_position=256
)
SHAPES = {
    "qwen2": QWEN,
    "as many keys as queries": replace(QWEN, kv_heads=4),
    "one key for all queries": replace(QWEN, kv_heads=1),
    "no bias, own head": replace(QWEN, family="llama", tied=False),
    "qwen3, own head": replace(QWEN, family="qwen3", head_dim=16),
    "scaled positions": replace(QWEN, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)),
}
PROMPTS = [[3, 9, 27, 4, 5, 6, 8, 11, 2], [1, 2, 3, 4], [50, 40, 30, 20, 10, 5, 1], [7], [8, 8, 8, 1, 9, 9]]


def built(shape: Backbone, cfg: ModelConfig) -> HiddenGPT:
    runtime.initialize(cfg, seed=1)
    model = build_model(shape, cfg, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # biases begin at 0 and norms at 1: neither would be noticed missing
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def hidden_states(lm: MegatronLM) -> Tensor:
    """Of five prompts and of three rounds of chains below them."""
    generator = torch.Generator().manual_seed(2)
    cache = lm.prefill(TokenRows.from_lists(PROMPTS))
    for chains in (4, 9, 1):
        parent_R = torch.randint(0, lm.rows(cache), (chains,), generator=generator)
        tokens = [torch.randint(0, 51, (1 + number % 3,), generator=generator).tolist() for number in range(chains)]
        cache = lm.extend(cache, parent_R, TokenRows.from_lists(tokens))
    assert cache.hidden_RD is not None
    return cache.hidden_RD


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_as_the_modules(name: str, precision: str) -> None:
    model = built(SHAPES[name], ModelConfig(precision=precision))
    assert inference_forward.supported(model)
    fast, slow = (hidden_states(MegatronLM(model, SHAPES[name], use_inference_forward=kind)) for kind in (True, False))
    assert fast.std() > 0.1
    assert torch.equal(fast, slow)


def test_a_discarded_pass_for_scales_changes_nothing_and_keeps_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fp8_scales.calibrate`` runs the first pass of a search twice, once with gradient enabled."""
    model, enabled = built(QWEN, ModelConfig()), []
    expected = hidden_states(MegatronLM(model, QWEN))
    monkeypatch.setattr(inference_forward, "supported", lambda model: False)  # as under FP8
    monkeypatch.setattr(fp8_scales, "_is_delayed", lambda model: True)
    model.decoder.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    stores: list[KeyValueSlots] = []
    monkeypatch.setattr(lm_module, "KeyValueSlots", lambda *sizes: stores.append(KeyValueSlots(*sizes)) or stores[-1])
    assert torch.equal(hidden_states(MegatronLM(model, QWEN)), expected)
    assert enabled == [True, False, False, False, False]
    assert not any(part.requires_grad for store in stores for part in store.tensors())


def test_a_model_in_training_drops_nothing_while_it_searches() -> None:
    model = built(QWEN, ModelConfig(dropout=0.5)).train()
    fast = hidden_states(MegatronLM(model, QWEN))
    assert model.training
    assert torch.equal(fast, hidden_states(MegatronLM(built(QWEN, ModelConfig()), QWEN)))


def test_it_reads_the_weights_of_the_moment() -> None:
    """Reference weights are swapped in below the same parameters, refitted ones are written into them."""
    model = built(QWEN, ModelConfig())
    lm = MegatronLM(model, QWEN)
    before = hidden_states(lm)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight.mul_(2)
        model.decoder.layers[2].self_attention.linear_qkv.weight.data = torch.zeros_like(
            model.decoder.layers[2].self_attention.linear_qkv.weight
        )
    after = hidden_states(lm)
    assert not torch.equal(before, after)
    assert torch.equal(after, hidden_states(MegatronLM(model, QWEN, use_inference_forward=False)))
