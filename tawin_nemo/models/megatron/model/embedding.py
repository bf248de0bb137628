"""Embedding whose backward writes only the rows that were read, without a dense [V, D] gradient.

Embedding and LM head have a row per vocabulary entry, a step touches few of them. torch's own backward makes a dense
[V, D] gradient for each use and megatron then adds it to the gradient buffer: at 151,936 x 896 that is more time and
memory than a small step itself. Here the rows go straight into the buffer, as megatron's fused weight gradients do.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor


def add_rows(weight: Tensor, index_N: Tensor, grad_ND: Tensor) -> Tensor | None:
    """Add gradient rows to megatron's buffer of ``weight`` and return what autograd gets (``written_gradient``).

    Without such a buffer return a dense gradient.
    """
    if hasattr(weight, "main_grad"):
        weight.main_grad.index_add_(0, index_N, grad_ND.to(weight.main_grad.dtype))
        return written_gradient(weight)
    return torch.zeros_like(weight).index_add_(0, index_N, grad_ND)


def written_gradient(weight: Tensor) -> Tensor | None:
    """What autograd gets for a gradient that lies in megatron's buffer already.

    None, or under ``trainer.overlap_grad_reduce`` a sparse gradient without entries: with it autograd runs megatron's
    hook on the thread of the backward pass, once, after the last use of the parameter (the embedding may be the head).
    The hook then registers the gradient as ready to be reduced.
    """
    return getattr(weight, "ready_gradient", None)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, index_N: Tensor) -> Tensor:
        ctx.weight_VD = weight_VD  # the parameter itself: saved tensors lose its ``main_grad``
        ctx.save_for_backward(index_N)
        return weight_VD.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, None]:
        (index_N,) = ctx.saved_tensors
        return add_rows(ctx.weight_VD, index_N, grad_ND), None


class RowEmbedding(VocabParallelEmbedding):
    """megatron's vocabulary-parallel embedding with gradients by row."""

    def forward(self, input_: Tensor) -> Tensor:
        """Token ids [B, S] -> [B, S, D], or this rank's part of [S, B, D] under sequence parallelism."""
        local = (input_ - self.vocab_start_index).flatten()
        here = (local >= 0) & (local < self.weight.shape[0])
        rows = _Rows.apply(self.weight, torch.where(here, local, 0))
        if self.tp_group.size() > 1:
            rows = torch.where(here[:, None], rows, 0)
        output = rows.view(*input_.shape, -1)
        if self.reduce_scatter_embeddings:
            output = output.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
