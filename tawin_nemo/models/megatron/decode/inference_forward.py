"""A stage's forward pass for inference: megatron's operations in megatron's order, without its module overhead.

A search calls the model for a few tokens at a time. megatron's modules then cost several times the arithmetic: autograd
functions, contexts for recomputation and offloading, rotary factors computed anew in every layer. Here the same weights
take part in the same operations, so that all results are bit-identical (tests compare them).

Axes: S tokens of the flat row, D width (in head tensors the dimension of a head), H query heads, G key and value
groups, F width of the gated FFN's two halves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from tawin_nemo.models.megatron.model.attention import AttentionPlan
from tawin_nemo.models.megatron.model.item_tokens import ItemTokens, inject, words_only
from tawin_nemo.models.megatron.model.lora import AdaptedColumn, AdaptedRow


def supported(model: GPTModel) -> bool:
    """Whether all linear layers of this stage are megatron's own, with adapters or without; Transformer Engine's (FP8)
    need their own forward."""
    return all(isinstance(layer.self_attention.linear_qkv, ColumnParallelLinear) for layer in model.decoder.layers)


@torch.no_grad()
def stage_output(model: GPTModel, tokens_S: Tensor, arriving_SD: Tensor | None, plan: AttentionPlan) -> Tensor:
    """Hidden states [S, D] after this stage, from tokens on the first stage and from ``arriving_SD`` on the others.

    Equal to the model's own forward in evaluation mode without sequence parallelism, whatever mode it is in. Collective
    over the TP ranks.
    """
    hidden_SD = _embedded(model, tokens_S) if arriving_SD is None else arriving_SD
    angle_S1D = model.rotary_pos_emb.forward(plan.position_S)[:, 0]
    cos_S1D, sin_S1D = (turn(angle_S1D).to(hidden_SD.dtype) for turn in (torch.cos, torch.sin))
    group = model.pg_collection.tp
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        normed_SD = layer.input_layernorm.forward(hidden_SD)
        query_SHD, key_SGD, value_SGD = _heads(attention, normed_SD)
        query_SHD, key_SGD = (_rotated(x, cos_S1D, sin_S1D) for x in (query_SHD, key_SGD))
        mixed_SHD = plan.attend(attention.core_attention, query_SHD, key_SGD, value_SGD)
        hidden_SD = hidden_SD + _row_parallel(attention.linear_proj, mixed_SHD.flatten(1), group)
        normed_SD = layer.pre_mlp_layernorm.forward(hidden_SD)
        gated_SF = _swiglu(_column_parallel(mlp.linear_fc1, normed_SD), fused=model.config.bias_activation_fusion)
        hidden_SD = hidden_SD + _row_parallel(mlp.linear_fc2, gated_SF, group)
    norm = model.decoder.final_layernorm
    return hidden_SD if norm is None else norm.forward(hidden_SD)


def _embedded(model: GPTModel, tokens_S: Tensor) -> Tensor:
    items: ItemTokens | None = getattr(model, "item_tokens", None)
    if items is None:
        return _word_rows(model, tokens_S)
    return inject(items, tokens_S, _word_rows(model, words_only(tokens_S)))


def _word_rows(model: GPTModel, tokens_S: Tensor) -> Tensor:
    table, group = model.embedding.word_embeddings, model.pg_collection.tp
    if group.size() == 1:
        return table.weight.index_select(0, tokens_S)
    local_S = tokens_S - table.vocab_start_index
    here_S = (local_S >= 0) & (local_S < table.weight.shape[0])
    rows_SD = table.weight.index_select(0, torch.where(here_S, local_S, 0))
    return _summed(rows_SD.masked_fill_(~here_S[:, None], 0), group)


def _product(linear: Any, input_SD: Tensor) -> Tensor:
    """Product, then bias: one fused operation would round differently."""
    output = torch.matmul(input_SD, linear.weight.t())
    return output if linear.bias is None else output + linear.bias


def _column_parallel(linear: Any, input_SD: Tensor) -> Tensor:
    return _adapted(linear, input_SD, _product(linear, input_SD))


def _row_parallel(linear: Any, input_SD: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _adapted(linear, input_SD, _summed(_product(linear, input_SD), group))


def _adapted(linear: Any, input_SD: Tensor, output_SD: Tensor) -> Tensor:
    """The layer's output with what its adapters add, if it has any."""
    if not isinstance(linear, AdaptedColumn | AdaptedRow) or not linear.lora.active:
        return output_SD
    return output_SD + linear.lora.evaluated(input_SD)


def _summed(part_SD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the TP ranks, in place."""
    if group.size() > 1:
        dist.all_reduce(part_SD, group=group)
    return part_SD


def _heads(attention: Any, normed_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [S, H, dim], keys and values [S, G, dim], with Qwen3's norms of queries and keys.

    In the fused product each group has its queries first, then its key and value.
    """
    groups, dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    own = attention.num_attention_heads_per_partition // groups
    mixed_SGD = _column_parallel(attention.linear_qkv, normed_SD).view(len(normed_SD), groups, (own + 2) * dim)
    query, key, value = mixed_SGD.split([own * dim, dim, dim], dim=2)
    query = query.reshape(len(normed_SD), -1, dim)
    if attention.config.qk_layernorm:
        query, key = attention.q_layernorm.forward(query), attention.k_layernorm.forward(key)
    return query, key, value


def _rotated(heads_SHD: Tensor, cos_S1D: Tensor, sin_S1D: Tensor) -> Tensor:
    first, second = heads_SHD.chunk(2, dim=-1)
    return heads_SHD * cos_S1D + torch.cat((-second, first), dim=-1) * sin_S1D


def _swiglu(both_SF: Tensor, *, fused: bool) -> Tensor:
    if fused:
        return bias_swiglu_impl(both_SF, None)
    gate, up = both_SF.chunk(2, dim=-1)
    return F.silu(gate) * up
