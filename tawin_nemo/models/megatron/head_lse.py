"""Log-sum-exp over a sharded vocabulary, a few rows at a time, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

#: Logits alive at once (64 MiB in float32), and the softmax that may be kept for the backward (128 MiB): larger ones
#: are computed a second time.
_ALIVE, _KEPT = 2**24, 2**25
#: Rows of a float32 gradient buffer that a bf16 product is added to at once.
_BUFFER_ROWS = 8192


def vocab_log_sum_exp(hidden_PD: Tensor, weight_VD: Tensor, real: int) -> Tensor:
    """[P] in float32 or wider, over the first ``real`` rows of every TP rank's shard; equal on all TP ranks.

    Under tensor parallelism each rank's gradient to ``hidden_PD`` is that of its own shard: sum them.
    """
    result: Tensor = _LogSumExp.apply(hidden_PD, weight_VD, real)
    return result


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, real: int) -> Tensor:
        keeps = ctx.needs_input_grad[0] and len(hidden_PD) * real <= _KEPT
        rows = _rows_at_once(real)
        peaks, totals, kept = [], [], []
        for part_ND in hidden_PD.split(rows):
            logits_NV = _logits(part_ND, weight_VD[:real])
            peak_N = logits_NV.amax(dim=1) if real else logits_NV.new_full((len(part_ND),), -torch.inf)
            peaks.append(peak_N)
            exp_NV = logits_NV.sub_(torch.where(peak_N.isinf(), 0, peak_N)[:, None]).exp_()
            totals.append(exp_NV.sum(dim=1))
            if keeps:
                kept.append(exp_NV)
        wide = _wide_dtype(hidden_PD)
        peak_P = torch.cat(peaks) if peaks else hidden_PD.new_zeros(0, dtype=wide)
        total_P = torch.cat(totals) if totals else hidden_PD.new_zeros(0, dtype=wide)
        lse_P = _reduced(peak_P, total_P)
        ctx.weight_VD, ctx.real, ctx.rows = weight_VD, real, rows
        ctx.save_for_backward(hidden_PD, lse_P, peak_P, *kept)
        return lse_P

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden_PD, lse_P, peak_P, *kept = ctx.saved_tensors
        weight_VD, real = ctx.weight_VD, ctx.real
        buffer = getattr(weight_VD, "main_grad", None)
        grad_VD = torch.zeros_like(weight_VD) if buffer is None else buffer
        grads = []
        for i, part_ND in enumerate(hidden_PD.split(ctx.rows)):
            rows = slice(i * ctx.rows, i * ctx.rows + len(part_ND))
            if kept:
                weighted_NV = kept[i] * ((peak_P[rows] - lse_P[rows]).exp() * grad_P[rows])[:, None]
            else:
                logits_NV = _logits(part_ND, weight_VD[:real])
                weighted_NV = logits_NV.sub_(lse_P[rows, None]).exp_().mul_(grad_P[rows, None])
            narrow_NV = weighted_NV.to(hidden_PD.dtype)
            grads.append(narrow_NV @ weight_VD[:real])
            _add_outer(grad_VD[:real], narrow_NV, part_ND)
        grad_PD = torch.cat(grads) if grads else torch.zeros_like(hidden_PD)
        return grad_PD, (grad_VD if buffer is None else None), None


def _add_outer(grad_VD: Tensor, left_NV: Tensor, right_ND: Tensor) -> None:
    """``grad_VD += left_NV.T @ right_ND``; a wider buffer takes a few rows at a time, torch has no mixed product."""
    if grad_VD.dtype == left_NV.dtype:
        grad_VD.addmm_(left_NV.t(), right_ND)
        return
    for start in range(0, len(grad_VD), _BUFFER_ROWS):
        rows = slice(start, start + _BUFFER_ROWS)
        grad_VD[rows].add_(left_NV[:, rows].t() @ right_ND)


def _rows_at_once(real: int) -> int:
    return max(1, _ALIVE // max(1, real))


def _logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    return F.linear(hidden_ND, weight_VD).to(_wide_dtype(hidden_ND))


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _reduced(peak_P: Tensor, total_P: Tensor) -> Tensor:
    """log sum over all shards, from each shard's peak and its sum relative to that peak."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return peak_P + total_P.log()
    highest_P = peak_P.clone()
    dist.all_reduce(highest_P, op=dist.ReduceOp.MAX, group=group)
    sum_P = total_P * (peak_P - highest_P).exp()
    dist.all_reduce(sum_P, op=dist.ReduceOp.SUM, group=group)
    return highest_P + sum_P.log()
