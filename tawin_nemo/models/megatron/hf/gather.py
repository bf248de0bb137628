"""Whole Hugging Face tensors out of the shards of a model, brought to world rank 0 one table row at a time."""

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
    """What every rank must agree on while gathering."""

    model: GPTModel
    shape: Backbone
    dtype: torch.dtype
    local: Mapping[Row, Tensor]
    owner: dict[Row, int]  # pipeline stage that sends the row

    def room(self, rows: list[Row]) -> dict[str, Tensor]:
        """Where ``gather`` puts the rows of one file. Taken before the first of them comes: memory for the pieces that
        come and go in between would otherwise lie in the gaps, and stay."""
        return {
            name: torch.empty(size, dtype=self.dtype)
            for row in rows
            for name, size in zip(hf_names(*row), hf_shapes(row[0], self.shape), strict=True)
        }

    def gather(self, row: Row, room: dict[str, Tensor] | None) -> None:
        """Bring the Hugging Face tensors of one row into ``room``, which only world rank 0 has. Collective."""
        shapes = hf_shapes(row[0], self.shape)
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        places = None if room is None else [room[name] for name in hf_names(*row)]
        direct = places if on_cpu else None
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
        if places is not None and direct is None:
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor)

    def _assemble(self, row: Row, places: list[Tensor] | None) -> list[Tensor]:
        """Whole tensors out of the shards of this stage's tensor-parallel group, on its first rank (in ``places``)."""
        entry, shard = row[0], self.local[row].detach().to(self.dtype).contiguous()
        group = self.model.tp_group
        if group.size() > 1 and entry.kind is Kind.VOCAB:
            return self._assemble_vocabulary(entry, shard, places)
        if group.rank() != 0:
            if entry.kind is not Kind.REPLICATED:
                dist.send(shard, dist.get_global_rank(group, 0), group=group)
            return []
        tensors = places or [shard.new_empty(size) for size in hf_shapes(entry, self.shape)]
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

    def _assemble_vocabulary(self, entry: Entry, shard: Tensor, places: list[Tensor] | None) -> list[Tensor]:
        """The same for the largest matrices, whose rows are received in their place: one copy of the whole, no more."""
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
        whole = places[0] if places else shard.new_empty(hf_shapes(entry, self.shape)[0])
        whole[: mine.stop] = shard[: mine.stop]
        for tp_rank in range(1, group.size()):
            low, high = min(tp_rank * rows, len(whole)), min((tp_rank + 1) * rows, len(whole))
            if low < high:
                dist.recv(whole[low:high], dist.get_global_rank(group, tp_rank), group=group)
        return [whole]
