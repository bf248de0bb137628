"""Log-probs at selected hidden rows, vocabulary-parallel, in the two spaces of the policy.

Trie space (TAWin, arXiv 2604.22504, Eq. 25) normalises over the children of the trie node: the full partition function
cancels, and only the children's head rows are read (``edge_logits``). Vocab space needs one number more per row, the
log-sum-exp over the whole vocabulary (``vocab_log_sum_exp``). No [rows, V] tensor is kept in either.

Axes: P hidden rows, D width, V this rank's vocabulary rows, N log-probs or vocabulary rows of a slice, E edges (pairs
of a hidden row and a token), U distinct tokens, X rows of either matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from tawin_nemo.maths.segments import segment_log_softmax, segment_starts
from tawin_nemo.models.megatron.model.embedding import add_rows, written_gradient
from tawin_nemo.types import Children

#: Edges multiplied at once where no sparse kernel exists: their gathered head rows are materialised.
_EDGES_AT_ONCE = 8192
#: Logits in memory at once: 4 MiB in float32 on a CPU, 64 MiB on a GPU.
_LIVE_LOGITS = {"cpu": 2**20, "cuda": 2**24}
#: Exponentials that may be kept for the backward (32 MiB in float32); more of them are computed a second time.
_KEPT_EXPONENTIALS = 2**23
#: Fewest vocabulary rows of a slice: below, the matrix products get slow.
_MIN_SLICE = 256

# torch warns once per process; the tests compare the two kernels used here with dense ones
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def head_weight_VD(model: GPTModel) -> Tensor:
    """This TP rank's rows of the LM head (tied or not); only on the last pipeline stage."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def select_rows(model: GPTModel, hidden_SBD: Tensor, index_P: Tensor) -> Tensor:
    """Hidden states [P, D] at indices ``index_P`` of the one flat row, gathered over sequence-parallel ranks first."""
    if model.config.sequence_parallel:
        # Every TP rank computes the same full gradient of the gathered states (the head sums it): split it, do not sum.
        hidden_SBD = gather_from_sequence_parallel_region(
            hidden_SBD, tensor_parallel_output_grad=False, group=model.pg_collection.tp
        )
    return hidden_SBD[:, 0].index_select(0, index_P)


def local_vocab(model: GPTModel) -> tuple[int, int]:
    """``start`` of this TP rank's vocabulary rows, and how many of them are real (not padding)."""
    rows = head_weight_VD(model).shape[0]
    start = model.pg_collection.tp.rank() * rows
    return start, max(0, min(rows, model.real_vocab - start))


def edge_logits(model: GPTModel, hidden_PD: Tensor, position_E: Tensor, token_E: Tensor) -> Tensor:
    """``hidden_PD[position_E[e]] . head[token_E[e]]`` for E edges (``position_E`` ascending), equal on all TP ranks.

    [E] in float32 or wider. Each dot product is made on the TP rank that holds the row.
    """
    weight_VD, group = head_weight_VD(model), model.pg_collection.tp
    if group.size() == 1:
        return _wide(_EdgeDots.apply(hidden_PD, weight_VD, position_E, token_E))
    local_E = token_E - local_vocab(model)[0]
    here_E = (local_E >= 0) & (local_E < weight_VD.shape[0])
    hidden_PD = copy_to_tensor_model_parallel_region(hidden_PD, group)
    dots = _wide(_EdgeDots.apply(hidden_PD, weight_VD, position_E[here_E], local_E[here_E]))
    logit_E = dots.new_zeros(len(token_E)).index_put((here_E.nonzero().squeeze(1),), dots)
    return reduce_from_tensor_model_parallel_region(logit_E, group)


@torch.no_grad()
def fixed_edge_logits(model: GPTModel, hidden_PD: Tensor, position_E: Tensor, token_E: Tensor) -> Tensor:
    """``edge_logits`` in operations that a CUDA graph can hold: E dot products on every TP rank, no host sync."""
    weight_VD, group = head_weight_VD(model), model.pg_collection.tp
    dots_of = _sampled_dots if hidden_PD.is_cpu else _gathered_dots
    if group.size() == 1:
        return _wide(dots_of(hidden_PD, weight_VD, position_E, token_E))
    local_E = token_E - local_vocab(model)[0]
    here_E = (local_E >= 0) & (local_E < weight_VD.shape[0])
    dots = _wide(dots_of(hidden_PD, weight_VD, position_E, torch.where(here_E, local_E, 0)))
    return reduce_from_tensor_model_parallel_region(dots.masked_fill(~here_E, 0), group)


class _EdgeDots(torch.autograd.Function):
    """Dot products of selected row pairs, without materialising the rows or a dense gradient of the head."""

    @staticmethod
    def forward(ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, position_E: Tensor, token_E: Tensor) -> Tensor:
        ctx.weight_VD = weight_VD  # the parameter itself: saved tensors lose its ``main_grad``
        ctx.save_for_backward(hidden_PD, position_E, token_E)
        return _sampled_dots(hidden_PD, weight_VD, position_E, token_E)

    @staticmethod
    def backward(ctx: Any, grad_E: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_PD, position_E, token_E = ctx.saved_tensors
        weight_VD = ctx.weight_VD
        grad_PD = _weighted_rows(grad_E, position_E, token_E, weight_VD, len(hidden_PD))
        if not ctx.needs_input_grad[1]:  # a frozen head
            return grad_PD, None, None, None
        token_U, column_E = token_E.unique(return_inverse=True)
        by_column = column_E.argsort(stable=True)
        grad_UD = _weighted_rows(grad_E[by_column], column_E[by_column], position_E[by_column], hidden_PD, len(token_U))
        return grad_PD, add_rows(weight_VD, token_U, grad_UD), None, None


def _sampled_dots(left_PD: Tensor, right_VD: Tensor, position_E: Tensor, token_E: Tensor) -> Tensor:
    if left_PD.dtype in (torch.float32, torch.float64):
        pattern = _csr(torch.zeros_like(token_E, dtype=left_PD.dtype), position_E, token_E, len(left_PD), len(right_VD))
        return torch.sparse.sampled_addmm(pattern, left_PD.contiguous(), right_VD.t(), beta=0.0).values()
    return _gathered_dots(left_PD, right_VD, position_E, token_E)


def _gathered_dots(left_PD: Tensor, right_VD: Tensor, position_E: Tensor, token_E: Tensor) -> Tensor:
    parts = zip(position_E.split(_EDGES_AT_ONCE), token_E.split(_EDGES_AT_ONCE), strict=True)
    wide_PD = _wide(left_PD)
    dots = [(wide_PD[p] * right_VD[t]).sum(-1) for p, t in parts]  # the product widens the second factor as well
    return dots[0] if len(dots) == 1 else torch.cat(dots)


def _weighted_rows(value_E: Tensor, row_E: Tensor, source_E: Tensor, rows_XD: Tensor, count: int) -> Tensor:
    """``sum_e value_e * rows_XD[source_e]`` by ``row_E`` (ascending): [count, D]."""
    if rows_XD.dtype in (torch.float32, torch.float64):
        return _csr(value_E.to(rows_XD.dtype), row_E, source_E, count, len(rows_XD)) @ rows_XD
    total = torch.zeros(count, rows_XD.shape[1], dtype=torch.float32, device=rows_XD.device)
    parts = zip(*(x.split(_EDGES_AT_ONCE) for x in (value_E, row_E, source_E)), strict=True)
    for value, row, source in parts:
        total.index_add_(0, row, value[:, None].float() * rows_XD[source].float())
    return total.to(rows_XD.dtype)


def _csr(value_E: Tensor, row_E: Tensor, column_E: Tensor, rows: int, columns: int) -> Tensor:
    starts = segment_starts(row_E, rows)
    return torch.sparse_csr_tensor(starts, column_E, value_E, size=(rows, columns), check_invariants=False)


def child_logprobs(model: GPTModel, hidden_PD: Tensor, children: Children) -> Tensor:
    """Trie space: log softmax over each row's children at the chosen ones, [N]; a single child has exactly 0."""
    logit_E = edge_logits(model, hidden_PD, children.position_E, children.token_E)
    return segment_log_softmax(logit_E, children.position_E, len(hidden_PD))[children.chosen_N]


def token_logprobs(model: GPTModel, hidden_PD: Tensor, row_N: Tensor, target_N: Tensor) -> Tensor:
    """Vocab space: log softmax over the real vocabulary, for hidden row ``row_N`` at ``target_N``; [N] in float32+."""
    order_N = row_N.argsort(stable=True)
    logit_N = edge_logits(model, hidden_PD, row_N[order_N], target_N[order_N])
    lse_P = log_sum_exp(model, copy_to_tensor_model_parallel_region(hidden_PD, model.pg_collection.tp))
    logp_N = logit_N - lse_P[row_N[order_N]]
    return logp_N[order_N.argsort()]


def log_sum_exp(model: GPTModel, hidden_PD: Tensor) -> Tensor:
    """[P] over the real vocabulary, equal on all TP ranks; see ``vocab_log_sum_exp`` for the gradient."""
    return vocab_log_sum_exp(hidden_PD, head_weight_VD(model), local_vocab(model)[1], model.pg_collection.tp)


@torch.no_grad()
def best_tokens(model: GPTModel, hidden_ND: Tensor) -> Tensor:
    """The token with the largest logit of each row, the lowest of equal ones, equal on all TP ranks. [N] int64.

    Only one number and one token per row and rank travel.
    """
    start, real = local_vocab(model)
    group = model.pg_collection.tp
    logits_NV = _wide(F.linear(hidden_ND, head_weight_VD(model)))
    logits_NV[:, real:] = -torch.inf  # padding of the vocabulary
    value_N, token_N = logits_NV.max(dim=1)
    if group.size() == 1:
        return token_N
    best = torch.stack([value_N.double(), (token_N + start).double()]).contiguous()  # whole numbers below 2^53
    parts = [torch.empty_like(best) for _ in range(group.size())]
    dist.all_gather(parts, best, group=group)
    both = torch.stack(parts)
    rank_N = both[:, 0].argmax(dim=0)
    return both[:, 1].gather(0, rank_N.unsqueeze(0))[0].long()


@torch.no_grad()
def top_tokens(model: GPTModel, hidden_ND: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` likeliest tokens of each row, best first, and log-probs, equal on all TP ranks. [N, count]."""
    logp_NV = full_logits_NV(model, hidden_ND).log_softmax(dim=1)
    logp_NK, token_NK = logp_NV.topk(min(count, logp_NV.shape[1]), dim=1)
    return token_NK, logp_NK


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@torch.no_grad()
def full_logits_NV(model: GPTModel, hidden_ND: Tensor) -> Tensor:
    """Logits over the real vocabulary, equal on all TP ranks, float32 (float64 for a double model); no gradient."""
    local_NV = _wide(F.linear(hidden_ND, head_weight_VD(model))).contiguous()
    group = model.pg_collection.tp
    if group.size() == 1:
        return local_NV[:, : model.real_vocab]
    parts = [torch.empty_like(local_NV) for _ in range(group.size())]
    dist.all_gather(parts, local_NV, group=group)
    return torch.cat(parts, dim=1)[:, : model.real_vocab]


def vocab_log_sum_exp(hidden_PD: Tensor, weight_VD: Tensor, real: int, group: dist.ProcessGroup) -> Tensor:
    """Log-sum-exp [P] over the real vocabulary, in float32 or wider, equal on all ranks of the TP ``group``.

    The first ``real`` rows of this rank's shard ``weight_VD`` count. The vocabulary is processed a slice at a time,
    forward and backward: a slice's logits stay in the processor's cache, and its rows of the gradient buffer are
    written once. Under tensor parallelism the gradient with respect to ``hidden_PD`` is that of the rank's
    own shard; the caller sums it over the group.
    """
    result: Tensor = _LogSumExp.apply(hidden_PD, weight_VD, real, group)
    return result


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, real: int, group: dist.ProcessGroup) -> Tensor:
        keeps = ctx.needs_input_grad[0] and len(hidden_PD) * real <= _KEPT_EXPONENTIALS
        peak_P = torch.full((len(hidden_PD),), -torch.inf, dtype=_wide_dtype(hidden_PD), device=hidden_PD.device)
        total_P = torch.zeros_like(peak_P)
        kept: list[Tensor] = []
        for rows in _vocab_slices(hidden_PD, real):
            logits_PN = _slice_logits(hidden_PD, weight_VD[rows])
            higher_P = torch.maximum(peak_P, logits_PN.amax(dim=1))
            exp_PN = logits_PN.sub_(higher_P[:, None]).exp_()
            total_P = total_P * (peak_P - higher_P).exp() + exp_PN.sum(dim=1)
            peak_P = higher_P
            if keeps:
                kept += [exp_PN, higher_P]
        lse_P = _combined(peak_P, total_P, group)
        ctx.weight_VD, ctx.real = weight_VD, real  # the parameter itself: saved tensors lose its ``main_grad``
        ctx.save_for_backward(hidden_PD, lse_P, *kept)
        return lse_P

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_PD, lse_P, *kept = ctx.saved_tensors
        weight_VD = ctx.weight_VD
        buffer = getattr(weight_VD, "main_grad", None)
        grad_VD: Tensor | None = None
        if ctx.needs_input_grad[1]:  # else the head is frozen
            grad_VD = torch.zeros_like(weight_VD) if buffer is None else buffer
        grad_PD = torch.zeros(hidden_PD.shape, dtype=_wide_dtype(hidden_PD), device=hidden_PD.device)
        for i, rows in enumerate(_vocab_slices(hidden_PD, ctx.real)):
            if kept:
                exp_PN, peak_P = kept[2 * i], kept[2 * i + 1]
                weighted_PN = exp_PN * ((peak_P - lse_P).exp() * grad_P)[:, None]
            else:
                weighted_PN = _slice_logits(hidden_PD, weight_VD[rows]).sub_(lse_P[:, None]).exp_()
                weighted_PN.mul_(grad_P[:, None])
            weighted_PN = weighted_PN.to(hidden_PD.dtype)
            _add_matmul(grad_PD, weighted_PN, weight_VD[rows])
            if grad_VD is not None:
                _add_matmul(grad_VD[rows], weighted_PN.t(), hidden_PD)
        return grad_PD.to(hidden_PD.dtype), (grad_VD if buffer is None else written_gradient(weight_VD)), None, None


def _vocab_slices(hidden_PD: Tensor, real: int) -> Iterator[slice]:
    width = max(_MIN_SLICE, _LIVE_LOGITS[hidden_PD.device.type] // max(1, len(hidden_PD)))
    for start in range(0, real, width):
        yield slice(start, min(start + width, real))


def _slice_logits(hidden_PD: Tensor, weight_ND: Tensor) -> Tensor:
    return F.linear(hidden_PD, weight_ND).to(_wide_dtype(hidden_PD))


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; torch has no product of bf16 factors that adds to a float32 sum."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _combined(peak_P: Tensor, total_P: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log sum over all shards, from each shard's peak and its sum relative to that peak."""
    if group.size() == 1:
        return peak_P + total_P.log()
    highest_P = peak_P.clone()
    dist.all_reduce(highest_P, op=dist.ReduceOp.MAX, group=group)
    sum_P = total_P * (peak_P - highest_P).exp()
    dist.all_reduce(sum_P, op=dist.ReduceOp.SUM, group=group)
    return highest_P + sum_P.log()
