"""Log-probs at selected hidden rows, vocabulary-parallel, in the two spaces of the policy.

Vocab space normalises over the whole vocabulary; trie space (TAWin, arXiv 2604.22504, Eq. 25) over the children of
the trie node, so the full partition function cancels and only the children's head rows are read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from tawin_nemo.types import Children


def head_weight_VD(model: GPTModel) -> Tensor:
    """This TP rank's rows of the LM head (tied or not); only on the last pipeline stage."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def select_rows(model: GPTModel, hidden_SBD: Tensor, row_N: Tensor, position_N: Tensor) -> Tensor:
    """The hidden states at (row, position), gathered over sequence-parallel ranks first: [N, D]."""
    if model.config.sequence_parallel:
        # Every TP rank computes the same full gradient of the gathered states (the head sums it): split it, do not sum.
        hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=False)
    return hidden_SBD[position_N, row_N]


def logits_local_NV(model: GPTModel, hidden_ND: Tensor) -> Tensor:
    """Logits of this TP rank's vocabulary rows, padded rows included; the gradient to ``hidden_ND`` is the full one."""
    return F.linear(copy_to_tensor_model_parallel_region(hidden_ND), head_weight_VD(model))


def local_vocab(model: GPTModel) -> tuple[int, int]:
    """``start`` of this TP rank's vocabulary rows, and how many of them are real (not padding)."""
    rows = head_weight_VD(model).shape[0]
    start = parallel_state.get_tensor_model_parallel_rank() * rows
    return start, max(0, min(rows, model.real_vocab - start))


class _VocabParallelLogProb(torch.autograd.Function):
    """log softmax at the target over vocabulary shards; the backward needs no communication."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor, start: int) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        N, rows = logits_NV.shape
        if rows:
            peak_N = logits_NV.amax(dim=-1)
        else:
            peak_N = logits_NV.new_full((N,), -torch.inf)
        _all_reduce(peak_N, dist.ReduceOp.MAX, group)
        exp_NV = (logits_NV - peak_N[:, None]).exp()
        local_N = target_N - start
        here_N = (local_N >= 0) & (local_N < rows)
        index_N = local_N.clamp(0, max(rows - 1, 0))
        sums_2N = torch.stack([exp_NV.sum(dim=-1), torch.zeros_like(peak_N)])
        if rows:
            chosen_N = logits_NV.gather(1, index_N[:, None])[:, 0] - peak_N
            sums_2N[1] = torch.where(here_N, chosen_N, 0.0)
        _all_reduce(sums_2N, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(exp_NV.div_(sums_2N[0][:, None]), index_N, here_N)
        return sums_2N[1] - sums_2N[0].log()

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        softmax_NV, index_N, here_N = ctx.saved_tensors
        grad_NV = softmax_NV * -grad_N[:, None]
        if softmax_NV.shape[1]:
            grad_NV.scatter_add_(1, index_N[:, None], (grad_N * here_N)[:, None])
        return grad_NV, None, None


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)


def token_logprobs(model: GPTModel, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """Vocab space: log softmax over the real rows at ``target_N``, [N] in float32 or wider, equal on all TP ranks."""
    start, real = local_vocab(model)
    logits_NV = _wide(logits_local_NV(model, hidden_ND)[:, :real])
    return _VocabParallelLogProb.apply(logits_NV, target_N, start)


def child_logprobs(model: GPTModel, hidden_ND: Tensor, children: Children) -> Tensor:
    """Trie space: log softmax over each position's children at the chosen one; exactly 0 where there is one child.

    Only head rows of tokens that occur among the children are multiplied; each edge's logit is computed on the TP rank
    that holds its row and summed over the group.
    """
    weight_VD = head_weight_VD(model)
    rows = weight_VD.shape[0]
    start = parallel_state.get_tensor_model_parallel_rank() * rows
    token_U, place_E = children.token_E.unique(return_inverse=True)
    local_U = token_U - start
    here_U = (local_U >= 0) & (local_U < rows)
    column_U = here_U.cumsum(0) - 1
    logits_NU = F.linear(copy_to_tensor_model_parallel_region(hidden_ND), weight_VD[local_U[here_U]])
    here_E = here_U[place_E]
    logit_E = hidden_ND.new_zeros(len(place_E))
    logit_E = logit_E.index_put((here_E,), logits_NU[children.position_E[here_E], column_U[place_E[here_E]]])
    logit_E = reduce_from_tensor_model_parallel_region(_wide(logit_E).contiguous())
    return segment_logprobs(logit_E, children, len(hidden_ND))


def segment_logprobs(logit_E: Tensor, children: Children, positions: int) -> Tensor:
    """log softmax within each position's edges, at the chosen edges; [positions]."""
    position_E = children.position_E
    peak_N = logit_E.new_full((positions,), -torch.inf)
    peak_N = peak_N.scatter_reduce(0, position_E, logit_E.detach(), "amax")
    shifted_E = logit_E - peak_N[position_E]
    total_N = logit_E.new_zeros(positions).index_add(0, position_E, shifted_E.exp())
    return shifted_E[children.chosen_N] - total_N.log()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@torch.no_grad()
def full_logits_NV(model: GPTModel, hidden_ND: Tensor) -> Tensor:
    """Logits over the real vocabulary, equal on all TP ranks, float32 (float64 for a double model); no gradient."""
    local_NV = _wide(F.linear(hidden_ND, head_weight_VD(model))).contiguous()
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return local_NV[:, : model.real_vocab]
    parts = [torch.empty_like(local_NV) for _ in range(group.size())]
    dist.all_gather(parts, local_NV, group=group)
    return torch.cat(parts, dim=1)[:, : model.real_vocab]
