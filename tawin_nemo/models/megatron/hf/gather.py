"""Gather whole Hugging Face tensors from the shards of a model to world rank 0, one row of the table at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.models.megatron.hf.map import Entry, Kind, Segment, hf_names, hf_shapes, shard_segments

Row = tuple[Entry, int | None]


@dataclass(frozen=True)
class Export:
    """What every rank needs to take part in gathering."""

    model: GPTModel
    shape: Backbone
    dtype: torch.dtype
    local: Mapping[Row, Tensor]
    owner: dict[Row, int]  # pipeline stage that sends the row

    def allocate(self, rows: list[Row]) -> dict[str, Tensor]:
        """Allocate the output tensors of the rows of one file, by Hugging Face name.

        All are allocated before the first row is gathered: otherwise short-lived buffers would fragment the memory.
        """
        return {
            name: torch.empty(size, dtype=self.dtype)
            for row in rows
            for name, size in zip(hf_names(*row), hf_shapes(row[0], self.shape), strict=True)
        }

    def gather(self, row: Row, outputs: dict[str, Tensor] | None) -> None:
        """Gather the tensors of one row into ``outputs``, which is None except on world rank 0. Collective."""
        shapes = hf_shapes(row[0], self.shape)
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        own = None if outputs is None else [outputs[name] for name in hf_names(*row)]
        direct = own if on_cpu else None
        stages = self.model.pp_group
        owner, here = self.owner[row], stages.rank()
        tensors = self._assemble(row, direct) if here == owner else []
        if owner != 0 and self.model.tp_group.rank() == 0:
            if here == owner:
                for tensor in tensors:
                    dist.send(tensor, dist.get_global_rank(stages, 0), group=stages)
            elif here == 0:
                device = next(self.model.parameters()).device
                tensors = direct or [torch.empty(size, dtype=self.dtype, device=device) for size in shapes]
                for tensor in tensors:
                    dist.recv(tensor, dist.get_global_rank(stages, owner), group=stages)
        if own is not None and direct is None:
            for output, tensor in zip(own, tensors, strict=True):
                output.copy_(tensor)

    def _assemble(self, row: Row, outputs: list[Tensor] | None) -> list[Tensor]:
        """Whole tensors from the shards of this stage's TP group, on its first rank (in ``outputs`` if given)."""
        entry, shard = row[0], self.local[row].detach().to(self.dtype).contiguous()
        group = self.model.tp_group
        if group.size() > 1 and entry.kind is Kind.VOCAB:
            return self._assemble_vocabulary(entry, shard, outputs)
        if group.rank() != 0:
            if entry.kind is not Kind.REPLICATED:
                dist.send(shard, dist.get_global_rank(group, 0), group=group)
            return []
        tensors = outputs or [shard.new_empty(size) for size in hf_shapes(entry, self.shape)]
        size = 1 if entry.kind is Kind.REPLICATED else group.size()
        for tp_rank in range(size):
            part = shard if tp_rank == 0 else torch.empty_like(shard)
            if tp_rank > 0:  # one after the other: a gather over gloo keeps a second copy of all of them
                dist.recv(part, dist.get_global_rank(group, tp_rank), group=group)
            offset, padded_vocab = 0, part.shape[0] * size
            for segment in shard_segments(entry, self.shape, tp_rank, size, padded_vocab=padded_vocab):
                length = segment.stop - segment.start
                piece = part.narrow(entry.axis, offset, length)
                tensors[segment.source].narrow(entry.axis, segment.start, length).copy_(piece)
                offset += length
        return tensors

    def _assemble_vocabulary(self, entry: Entry, shard: Tensor, outputs: list[Tensor] | None) -> list[Tensor]:
        """``_assemble`` for the vocabulary matrices: rows are received in place, so that there is only one copy."""
        group = self.model.tp_group
        rows = shard.shape[0]
        (mine,) = shard_segments(entry, self.shape, group.rank(), group.size(), padded_vocab=rows * group.size()) or [
            Segment(0, 0, 0)
        ]
        first = dist.get_global_rank(group, 0)
        if group.rank() != 0:
            if mine.stop > mine.start:
                dist.send(shard[: mine.stop - mine.start], first, group=group)
            return []
        whole = outputs[0] if outputs else shard.new_empty(hf_shapes(entry, self.shape)[0])
        whole[: mine.stop] = shard[: mine.stop]
        for tp_rank in range(1, group.size()):
            low, high = min(tp_rank * rows, len(whole)), min((tp_rank + 1) * rows, len(whole))
            if low < high:
                dist.recv(whole[low:high], dist.get_global_rank(group, tp_rank), group=group)
        return [whole]
