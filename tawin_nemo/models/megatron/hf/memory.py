"""Whole weights under their Hugging Face names, in memory: gathered from a training model, loaded into a rollout model.

Training gathers them on its first rank, in CPU memory for one copy. A rollout model loads one row of the table
(``hf.map.table``) at a time, so that ranks that share it need the memory of one row besides their shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.models.megatron.hf.files import HfWeights
from tawin_nemo.models.megatron.hf.gather import Export
from tawin_nemo.models.megatron.hf.io import fill_row, owners
from tawin_nemo.models.megatron.hf.map import hf_names, hf_shapes, local_parameters, table
from tawin_nemo.models.megatron.model.adapters import MergedShards

#: Name -> shape of the tensors of one row of the table.
Sizes = dict[str, tuple[int, ...]]


def rows_of(shape: Backbone) -> list[Sizes]:
    """Names and shapes of all tensors of a model of this shape, one dict per row of ``hf.map.table``."""
    return [dict(zip(hf_names(*row), hf_shapes(row[0], shape), strict=True)) for row in table(shape)]


@torch.no_grad()
def gather_hf(model: GPTModel, shape: Backbone) -> dict[str, Tensor] | None:
    """All weights by Hugging Face name on world rank 0, None on the other ranks.

    They are copies in CPU memory, in the parameters' dtype and the order of ``rows_of``, adapters merged. Collective
    over all training ranks.
    """
    whole: dict[str, Tensor] | None = {} if dist.get_rank() == 0 else None
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        local = MergedShards(model, local_parameters(model, shape))
        export = Export(model, shape, model.config.params_dtype, local, owners(model, shape, local))
        for row in table(shape):
            gathered = None if whole is None else export.allocate([row])
            export.gather(row, gathered)
            if whole is not None and gathered is not None:
                whole |= gathered
    return whole


class _InMemory(HfWeights):
    """Tensors in memory behind the interface of a safetensors file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.directory, self.files = Path("memory"), dict.fromkeys(tensors, "")
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        return self._tensors[name].narrow(axis, start, stop - start)


@torch.no_grad()
def fill_from_rows(model: GPTModel, shape: Backbone, rows: Iterable[Mapping[str, Tensor]]) -> None:
    """Load this rank's shard of ``model`` from the whole tensors of ``rows``, in the order of ``rows_of``.

    Raises CheckpointError for a tensor of another shape.
    """
    local = local_parameters(model, shape)
    for row, tensors in zip(table(shape), rows, strict=True):
        if row in local:
            fill_row(model, shape, row, local[row], _InMemory(tensors))
