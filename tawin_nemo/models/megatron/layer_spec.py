"""What a decoder layer is made of: megatron's layer with our norm and attention, and linear layers by precision."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from tawin_nemo.models.megatron.attention import PlannedAttention
from tawin_nemo.models.megatron.norm import RMSNorm


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One decoder layer; under FP8 its four linear layers are Transformer Engine's, all else is the same.

    The norms stay modules of their own, where Transformer Engine's own spec puts them into the linear layers behind
    them: parameters then have the same names and shapes in every precision, and checkpoints, Hugging Face files and
    weights handed from model to model need no translation. The price is one pass over a norm's output.
    """
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    attention.core_attention = PlannedAttention
    if config.fp8 is not None:
        column, row = engine_layers()
        attention.linear_qkv, attention.linear_proj = column, row
        mlp.linear_fc1, mlp.linear_fc2 = column, row
    return layer


def engine_layers() -> tuple[type, type]:
    """Transformer Engine's column- and row-parallel linear layers; ``precision.check`` has made sure they are there."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear
