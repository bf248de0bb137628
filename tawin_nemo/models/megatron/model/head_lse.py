"""Log-sum-exp over a sharded vocabulary, a slice of it at a time, forward and backward.

A slice's logits stay in the cache for all that is done with them, and its rows of the gradient buffer are written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

#: Logits alive at once: 4 MiB in float32 on a CPU, 64 MiB on a GPU.
_ALIVE = {"cpu": 2**20, "cuda": 2**24}
#: Exponentials that may be kept for the backward (32 MiB in float32); more of them are computed a second time.
_KEPT = 2**23
#: Fewest vocabulary rows of a slice: below, the matrix products get slow.
_NARROWEST = 256


def vocab_log_sum_exp(hidden_PD: Tensor, weight_VD: Tensor, real: int, group: dist.ProcessGroup) -> Tensor:
    """[P] in float32 or wider, over the first ``real`` rows of the shard of every rank of the TP ``group``; equal on
    all of them.

    Under tensor parallelism each rank's gradient to ``hidden_PD`` is that of its own shard: sum them.
    """
    result: Tensor = _LogSumExp.apply(hidden_PD, weight_VD, real, group)
    return result


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, real: int, group: dist.ProcessGroup) -> Tensor:
        keeps = ctx.needs_input_grad[0] and len(hidden_PD) * real <= _KEPT
        peak_P = torch.full((len(hidden_PD),), -torch.inf, dtype=_wide(hidden_PD), device=hidden_PD.device)
        total_P = torch.zeros_like(peak_P)
        kept: list[Tensor] = []
        for rows in _slices(hidden_PD, real):
            logits_PN = _logits(hidden_PD, weight_VD[rows])
            higher_P = torch.maximum(peak_P, logits_PN.amax(dim=1))
            exp_PN = logits_PN.sub_(higher_P[:, None]).exp_()
            total_P = total_P * (peak_P - higher_P).exp() + exp_PN.sum(dim=1)
            peak_P = higher_P
            if keeps:
                kept += [exp_PN, higher_P]
        lse_P = _reduced(peak_P, total_P, group)
        ctx.weight_VD, ctx.real = weight_VD, real  # the parameter itself: saved tensors lose its ``main_grad``
        ctx.save_for_backward(hidden_PD, lse_P, *kept)
        return lse_P

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_PD, lse_P, *kept = ctx.saved_tensors
        weight_VD = ctx.weight_VD
        buffer = getattr(weight_VD, "main_grad", None)
        grad_VD = torch.zeros_like(weight_VD) if buffer is None else buffer
        grad_PD = torch.zeros(hidden_PD.shape, dtype=_wide(hidden_PD), device=hidden_PD.device)
        for i, rows in enumerate(_slices(hidden_PD, ctx.real)):
            if kept:
                exp_PN, peak_P = kept[2 * i], kept[2 * i + 1]
                weighted_PN = exp_PN * ((peak_P - lse_P).exp() * grad_P)[:, None]
            else:
                weighted_PN = _logits(hidden_PD, weight_VD[rows]).sub_(lse_P[:, None]).exp_().mul_(grad_P[:, None])
            weighted_PN = weighted_PN.to(hidden_PD.dtype)
            _add_product(grad_PD, weighted_PN, weight_VD[rows])
            _add_product(grad_VD[rows], weighted_PN.t(), hidden_PD)
        return grad_PD.to(hidden_PD.dtype), (grad_VD if buffer is None else None), None, None


def _slices(hidden_PD: Tensor, real: int) -> Iterator[slice]:
    width = max(_NARROWEST, _ALIVE[hidden_PD.device.type] // max(1, len(hidden_PD)))
    for start in range(0, real, width):
        yield slice(start, min(start + width, real))


def _logits(hidden_PD: Tensor, weight_ND: Tensor) -> Tensor:
    return F.linear(hidden_PD, weight_ND).to(_wide(hidden_PD))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; torch has no product of bf16 factors that adds to a float32 sum."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _reduced(peak_P: Tensor, total_P: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log sum over all shards, from each shard's peak and its sum relative to that peak."""
    if group.size() == 1:
        return peak_P + total_P.log()
    highest_P = peak_P.clone()
    dist.all_reduce(highest_P, op=dist.ReduceOp.MAX, group=group)
    sum_P = total_P * (peak_P - highest_P).exp()
    dist.all_reduce(sum_P, op=dist.ReduceOp.SUM, group=group)
    return highest_P + sum_P.log()
