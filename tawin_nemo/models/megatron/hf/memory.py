"""Whole weights under their Hugging Face names, in memory: out of a model in training, and into a model that searches.

Training gathers them on its first rank (CPU memory for one copy). A model takes them row of the table by row, so that
ranks that share it need one row at a time besides their shards.
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

#: Name -> shape of the tensors of one row of the table.
Sizes = dict[str, tuple[int, ...]]


def rows_of(shape: Backbone) -> list[Sizes]:
    """What a model of this shape consists of, in the order of the table."""
    return [dict(zip(hf_names(*row), hf_shapes(row[0], shape), strict=True)) for row in table(shape)]


@torch.no_grad()
def gather_hf(model: GPTModel, shape: Backbone) -> dict[str, Tensor] | None:
    """A copy of all weights on world rank 0 (in CPU memory, in the parameters' number format, in the order of the
    table), None elsewhere. Collective: every rank of training calls it."""
    whole: dict[str, Tensor] | None = {} if dist.get_rank() == 0 else None
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        local = local_parameters(model, shape)
        export = Export(model, shape, model.config.params_dtype, local, owners(model, shape, local))
        for row in table(shape):
            room = None if whole is None else export.room([row])
            export.gather(row, room)
            if whole is not None and room is not None:
                whole |= room
    return whole


class _InMemory(HfWeights):
    """Some tensors, read as a file of them would be."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.directory, self.files = Path("memory"), dict.fromkeys(tensors, "")
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        return self._tensors[name].narrow(axis, start, stop - start)


@torch.no_grad()
def fill_from_rows(model: GPTModel, shape: Backbone, rows: Iterable[Mapping[str, Tensor]]) -> None:
    """Fill ``model`` (this rank's shard of it) from the whole tensors of every row, which come in the order of
    ``rows_of``. Raises CheckpointError for a tensor of another shape."""
    local = local_parameters(model, shape)
    for row, tensors in zip(table(shape), rows, strict=True):
        if row in local:
            fill_row(model, shape, row, local[row], _InMemory(tensors))
