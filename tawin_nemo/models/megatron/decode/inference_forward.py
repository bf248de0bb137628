"""A stage's forward pass for inference: megatron's operations in megatron's order, without its module overhead.

A search calls the model for a few tokens at a time. megatron's modules then cost several times the arithmetic: autograd
functions, contexts for recomputation and offloading. Here the same weights take part in the same operations, so that
on a CPU all results are bit-identical (tests compare them). On a CUDA device, where every operation costs a launch, a
sum that torch can add in a matrix product's kernel (bias, residual) is not rounded before it.

Axes: S tokens of the flat row, D width (in head tensors the dimension of a head), H query heads, G key and value
groups, X heads of a group (its queries, its key, its value), F width of the gated FFN's two halves.
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

from tawin_nemo.models.megatron.decode.kv_store import DecodePlan
from tawin_nemo.models.megatron.model.item_tokens import ItemTokens, inject, words_only
from tawin_nemo.models.megatron.model.lora import AdaptedColumn, AdaptedRow
from tawin_nemo.models.megatron.model.rotary import Turns


def supported(model: GPTModel) -> bool:
    """Whether all linear layers of this stage are megatron's own, with adapters or without; Transformer Engine's (FP8)
    need their own forward."""
    return all(isinstance(layer.self_attention.linear_qkv, ColumnParallelLinear) for layer in model.decoder.layers)


@torch.no_grad()
def stage_output(model: GPTModel, tokens_S: Tensor, arriving_SD: Tensor | None, plan: DecodePlan) -> Tensor:
    """Hidden states [S, D] after this stage, from tokens on the first stage and from ``arriving_SD`` on the others.

    Equal to the model's own forward in evaluation mode without sequence parallelism, whatever mode it is in. Collective
    over the TP ranks.
    """
    hidden_SD = _embedded(model, tokens_S) if arriving_SD is None else arriving_SD
    turns = Turns.of(model.rotary_pos_emb.angles(plan.position_S), hidden_SD.dtype)
    group, fused = model.pg_collection.tp, model.config.bias_activation_fusion
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        heads_SGXD = _heads(attention, layer.input_layernorm.forward(hidden_SD), turns)
        mixed_SHD = plan.attend_heads(attention.core_attention, heads_SGXD)
        hidden_SD = _plus_row_parallel(hidden_SD, attention.linear_proj, mixed_SHD.flatten(1), group)
        gated_SF = _swiglu(_column_parallel(mlp.linear_fc1, layer.pre_mlp_layernorm.forward(hidden_SD)), fused=fused)
        hidden_SD = _plus_row_parallel(hidden_SD, mlp.linear_fc2, gated_SF, group)
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
    """Product and bias. As two operations on a CPU, like megatron's: one fused operation rounds differently."""
    weight, bias = linear.weight.t(), linear.bias
    if bias is None:
        return torch.mm(input_SD, weight)
    return torch.addmm(bias, input_SD, weight) if input_SD.is_cuda else torch.mm(input_SD, weight) + bias


def _column_parallel(linear: Any, input_SD: Tensor) -> Tensor:
    return _adapted(linear, input_SD, _product(linear, input_SD))


def _plus_row_parallel(hidden_SD: Tensor, linear: Any, input_SD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The residual row and the layer's output, where possible as one product that adds to ``hidden_SD`` in place."""
    if hidden_SD.is_cuda and group.size() == 1 and linear.bias is None and not _adapts(linear):
        return hidden_SD.addmm_(input_SD, linear.weight.t())
    return hidden_SD + _adapted(linear, input_SD, _summed(_product(linear, input_SD), group))


def _adapts(linear: Any) -> bool:
    return isinstance(linear, AdaptedColumn | AdaptedRow) and linear.lora.active


def _adapted(linear: Any, input_SD: Tensor, output_SD: Tensor) -> Tensor:
    """The layer's output with what its adapters add, if it has any."""
    return output_SD + linear.lora.evaluated(input_SD) if _adapts(linear) else output_SD


def _summed(part_SD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the TP ranks, in place."""
    if group.size() > 1:
        dist.all_reduce(part_SD, group=group)
    return part_SD


def _heads(attention: Any, normed_SD: Tensor, turns: Turns) -> Tensor:
    """The heads [S, G, X, dim] of the fused product, queries and keys turned by their positions.

    Each group has its queries first, then its key and its value. Qwen3 norms queries and keys first.
    """
    groups, dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    heads_SGXD = _column_parallel(attention.linear_qkv, normed_SD).view(len(normed_SD), groups, -1, dim)
    turned = plain = heads_SGXD[:, :, :-1]
    if attention.config.qk_layernorm:
        query, key = plain.split([plain.shape[2] - 1, 1], dim=2)
        plain = torch.cat([attention.q_layernorm.forward(query), attention.k_layernorm.forward(key)], dim=2)
    turns.turn(plain, out=turned)
    return heads_SGXD


def _swiglu(both_SF: Tensor, *, fused: bool) -> Tensor:
    if fused:
        return bias_swiglu_impl(both_SF, None)
    gate, up = both_SF.chunk(2, dim=-1)
    return F.silu(gate) * up
