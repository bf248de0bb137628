"""Rotary frequencies against transformers' own, and explicit positions against places in a row."""

from __future__ import annotations

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tawin_nemo.config.backbones import backbone, with_vocab
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.model.attention import AttentionPlan
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.model.rotary import inverse_frequencies
from tawin_nemo.models.megatron.parallel import runtime


def test_llama3_scaling_is_that_of_transformers() -> None:
    shape = backbone("llama-3.2-1b")
    assert shape.rope_scaling is not None
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        head_dim=shape.kv_channels,
        rope_theta=shape.rope_theta,
        max_position_embeddings=shape.max_position,
        rope_scaling={
            "rope_type": "llama3",
            "factor": shape.rope_scaling.factor,
            "low_freq_factor": shape.rope_scaling.low_freq_factor,
            "high_freq_factor": shape.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": shape.rope_scaling.original_max_position,
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    scaled = inverse_frequencies(shape.kv_channels, shape.rope_theta, shape.rope_scaling)
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=0)
    plain = inverse_frequencies(shape.kv_channels, shape.rope_theta, None)
    assert torch.equal(scaled[0], plain[0])  # the shortest wavelength is left alone, the longest divided by the factor
    torch.testing.assert_close(scaled[-1], plain[-1] / 32.0, rtol=1e-6, atol=0)


def test_positions_of_a_plan_rotate_like_places() -> None:
    runtime.initialize(ModelConfig(), seed=1)
    shape = with_vocab(backbone("nano"), 40)
    model = build_model(shape, ModelConfig(), seed=1)
    rotary = model.rotary_pos_emb
    places = rotary(9)
    assert places.shape == (9, 1, 1, shape.kv_channels)
    plan = AttentionPlan(torch.tensor([0, 3, 8, 5, 5, 1]))
    assert plan.rotations(torch.float32) is None  # nobody has asked for it: megatron turns queries and keys
    assert rotary(rotary.get_rotary_seq_len(None, model.decoder, None, model.config, plan)) is None
    turns = plan.rotations(torch.float32)
    assert turns is not None
    assert turns is plan.rotations(torch.float32)
    assert torch.equal(turns.cos_S11D, places[plan.position_S].cos())
    assert torch.equal(turns.sin_S11D, places[plan.position_S].sin())
