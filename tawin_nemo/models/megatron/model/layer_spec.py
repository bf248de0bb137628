"""The modules of a decoder layer: megatron's layer with our norm and attention, and linear layers by precision."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tawin_nemo.models.megatron.model.attention import PlannedAttention

# -- RMSNorm that works under sequence parallelism without Transformer Engine or Apex.


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467), computed in float32 or wider.

    On a CUDA device this is torch's one kernel, which rounds to the input's dtype once, behind the weight; elsewhere
    the normalised input is rounded before the product too, as Hugging Face's models do.
    Under sequence parallelism each TP rank sees a part of the tokens, so the weight carries ``sequence_parallel=True``
    and megatron's ``finalize_model_grads`` sums its gradient over the TP group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input, in the input's dtype and shape."""
        if x.is_cuda and x.dtype == self.weight.dtype:
            return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        wide = x if x.dtype == torch.float64 else x.float()
        normed = torch.nn.functional.rms_norm(wide, (wide.shape[-1],), None, self.eps)
        return normed.to(x.dtype) * self.weight


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
    if config.qk_layernorm:  # of each head, before RoPE; every TP rank holds the whole weight
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.fp8 is not None:
        column, row = engine_layers()
        attention.linear_qkv, attention.linear_proj = column, row
        mlp.linear_fc1, mlp.linear_fc2 = column, row
    return layer


def engine_layers() -> tuple[type, type]:
    """Transformer Engine's column- and row-parallel linear layers.

    They are available once ``precision.check_model_supported`` has passed.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear
