"""Low-rank adapters of the decoder's linear layers (LoRA, arXiv 2106.09685): ``y = W x + scale * B A x``, W frozen.

A fused layer (q, k and v; gate and up) has factors of its own for each of its matrices, as Hugging Face's PEFT has:
``A`` holds those of its S adapted matrices one below the other, and a row of ``B`` is multiplied with the part of
``A x`` that belongs to the row's matrix. Rows of matrices without adapters stay 0.

Under tensor parallelism a column-parallel layer has all of A and its rows of B on every rank, a row-parallel one its
columns of A and all of B. Only ``A x``, ``rank`` numbers per token, is communicated: its gradient is summed over the
ranks in a column-parallel layer, it itself in a row-parallel one. Under sequence parallelism it is gathered along the
sequence, or summed and divided along it; then the whole factor sees a part of the tokens on each rank, and megatron
sums its gradient as it does for norms.

Axes: R rows of this rank's B (outputs), S adapted matrices of the layer, F their factors (S * rank), D inputs.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.lora import MARK, MATRICES, ROW_PARALLEL, targets
from tawin_nemo.config.schema import LoraConfig
from tawin_nemo.models.megatron.model import weight_init


class LowRank(torch.nn.Module):
    """The two factors of one linear layer; ``forward`` gives what they add to its output."""

    mask_RS: Tensor | None

    def __init__(self, linear: Any, name: str, shape: Backbone, lora: LoraConfig, *, dropout: float) -> None:
        """``name`` is that of the layer in its module. ``a`` is left undefined (``draw``), ``b`` is 0."""
        super().__init__()
        self.row_parallel, self.gated = name in ROW_PARALLEL, name == "linear_fc1"
        self.matrices, self.rank = targets(name, lora), lora.rank
        self.scale, self.dropout, self.active = lora.alpha / lora.rank, dropout, True
        self.tp_group, self.sequence_parallel = linear.tp_group, bool(linear.sequence_parallel)
        weight = linear.weight
        self.a = Parameter(weight.new_empty(len(self.matrices) * lora.rank, weight.shape[1]))
        self.b = Parameter(weight.new_zeros(weight.shape[0], lora.rank))
        cut, whole, axis = (self.a, self.b, 1) if self.row_parallel else (self.b, self.a, 0)
        set_tensor_model_parallel_attributes(cut, True, axis, 2 if self.gated else 1)
        set_tensor_model_parallel_attributes(whole, False, -1, 1)
        whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        mask_RS = _matrix_of_rows(name, len(weight), shape, self.matrices)
        alone = self.matrices == MATRICES[name] and len(self.matrices) == 1
        self.register_buffer("mask_RS", None if alone else mask_RS.to(weight), persistent=False)

    @torch.no_grad()
    def draw(self, name: str, seed: int) -> None:
        """Set ``a`` to Normal(0, 1 / (3 * inputs)), the variance of PEFT's, and ``b`` to 0; so nothing is added yet.

        Every matrix is drawn whole from a generator seeded by (seed, ``name`` of the layer in the whole model, matrix).
        """
        self.b.zero_()
        tp, size = self.tp_group.rank(), self.tp_group.size()
        inputs = self.a.shape[1] * (size if self.row_parallel else 1)
        for number, matrix in enumerate(self.matrices):
            part = self.a[number * self.rank : (number + 1) * self.rank]
            pieces = weight_init.shard_pieces("lora.a", part, 1 if self.row_parallel else None, tp, size)
            weight_init.fill(
                part, pieces, (self.rank, inputs), std=(3 * inputs) ** -0.5, key=f"{seed}/{name}{MARK}{matrix}"
            )

    def forward(self, input_SBD: Tensor) -> Tensor:
        """What is added to the layer's output, in its shape and under its parallelism."""
        if self.dropout and self.training:
            input_SBD = self._dropped(input_SBD)
        return self._added(input_SBD, self.sequence_parallel)

    def evaluated(self, input_SD: Tensor) -> Tensor:
        """``forward`` without dropout and sequence parallelism, whatever mode the model is in."""
        return self._added(input_SD, sequence_parallel=False)

    def _added(self, input_: Tensor, sequence_parallel: bool) -> Tensor:
        factors = self._across_ranks(torch.matmul(input_, self.a.t()), sequence_parallel)
        return torch.matmul(factors * self.scale, self.outputs_RF().t())

    def outputs_RF(self) -> Tensor:
        """B as one matrix over the factors of all matrices: 0 where row and factor belong to different ones."""
        if self.mask_RS is None:
            return self.b
        return (self.b[:, None, :] * self.mask_RS[:, :, None]).flatten(1)

    @torch.no_grad()
    def product(self) -> Tensor:
        """``scale * B A`` [R, D]: what the adapters add to this rank's weight, in float32 or wider."""
        wide = torch.promote_types(self.a.dtype, torch.float32)
        return (self.outputs_RF().to(wide) * self.scale) @ self.a.to(wide)

    def sharded(self, prefix: str, offsets: tuple[Any, ...], metadata: dict[str, Any]) -> dict[str, Any]:
        """The two factors for megatron-core's distributed checkpoints."""
        axes = {"a": 1} if self.row_parallel else {"b": 0}
        parts: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"a": self.a, "b": self.b}, prefix, axes, offsets,
            tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
        if self.gated:  # as megatron's own, each half is cut
            parts[f"{prefix}b"] = apply_swiglu_sharded_factory(parts[f"{prefix}b"], offsets)
        return parts

    def _dropped(self, input_SBD: Tensor) -> Tensor:
        """TP ranks that hold different inputs drop differently; sequence parallelism has forked already."""
        forks = self.row_parallel and not self.sequence_parallel
        with get_cuda_rng_tracker().fork() if forks else contextlib.nullcontext():
            return torch.nn.functional.dropout(input_SBD, self.dropout)

    def _across_ranks(self, factors: Tensor, sequence_parallel: bool) -> Tensor:
        if self.tp_group.size() == 1:
            return factors
        result: Tensor
        if self.row_parallel:
            summed = (
                reduce_scatter_to_sequence_parallel_region
                if sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            result = summed(factors, group=self.tp_group)
        elif sequence_parallel:
            result = gather_from_sequence_parallel_region(
                factors, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            result = copy_to_tensor_model_parallel_region(factors, group=self.tp_group)
        return result


class AdaptedColumn(ColumnParallelLinear):
    """megatron's column-parallel layer with adapters; its checkpoint holds the adapters only."""

    lora: LowRank

    def forward(self, input_: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *arguments, **named)
        return (output + self.lora(input_) if self.lora.active else output), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The adapters; the weights that they belong to are frozen."""
        return self.lora.sharded(f"{prefix}lora.", sharded_offsets, metadata)


class AdaptedRow(RowParallelLinear):
    """megatron's row-parallel layer with adapters; its checkpoint holds the adapters only."""

    lora: LowRank

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return (output + self.lora(input_) if self.lora.active else output), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The adapters; the weights that they belong to are frozen."""
        return self.lora.sharded(f"{prefix}lora.", sharded_offsets, metadata)


def _matrix_of_rows(name: str, rows: int, shape: Backbone, matrices: tuple[str, ...]) -> Tensor:
    """[R, S], 1.0 where a row of this rank's fused weight belongs to an adapted matrix.

    The fused ``linear_qkv`` has, for each group, its queries, its key and its value; ``linear_fc1`` has the gate's half
    and the up half on every rank.
    """
    row_R = torch.arange(rows)
    if name == "linear_qkv":
        queries, dim = shape.heads // shape.kv_heads, shape.kv_channels
        head_R = row_R // dim % (queries + 2)
        part_R = (head_R - (queries - 1)).clamp(min=0)
    elif name == "linear_fc1":
        part_R = row_R // (rows // 2)
    else:
        part_R = torch.zeros_like(row_R)
    wanted_S = torch.tensor([MATRICES[name].index(matrix) for matrix in matrices])
    return (part_R[:, None] == wanted_S).float()
