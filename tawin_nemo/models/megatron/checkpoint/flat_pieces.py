"""The distributed optimizer's state in a checkpoint: each rank writes and reads the flat pieces that it owns.

The distributed optimizer keeps master weights and moments as flat pieces of a padded gradient buffer, cut evenly over
the data-parallel ranks. A checkpoint that is to be read under another layout needs them in the shape of the
parameters. A piece is a range of a parameter's elements in row-major order, and such a range is a few blocks of the
tensor: the end of a row, whole rows, the beginning of a row. Every block is a view of the piece, so that nothing is
gathered or copied; whoever reads takes the blocks that overlap with its own, whichever layout wrote them.

megatron-core's own conversion (``fully_reshardable``) mixes up padded and unpadded positions: it zeroes the end of a
buffer whose parameters are not multiples of 64 long, and shifts every bucket after the first one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

#: Master weight and Adam moments; the step counter is common to all parameters and lies in the parameter groups.
KEYS = ("param", "exp_avg", "exp_avg_sq")
#: Elements of a block at most (64 MiB): what is copied to the host at once, and read at once for a part of it.
BLOCK = 2**24


def distributed_state(optimizer: DistributedOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """``groups`` (plain values) and ``state``: the blocks that this rank owns, as shards of the parameters' tensors.

    The blocks are views of the optimizer's own tensors: loading into them changes the optimizer.
    """
    entries = {id(entry.data): entry for entry in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    shards: dict[str, ShardedTensor] = {}
    for parameter in parameters(optimizer):
        owned = piece(optimizer, parameter)
        if owned is not None:
            for shard in _piece_shards(entries[id(parameter)], parameter.shape, *owned):
                shards[f"{shard.key}.{shard.global_offset}"] = shard
    return {"groups": optimizer.state_dict(), "state": shards}


def load_distributed_state(optimizer: DistributedOptimizer, loaded: dict[str, Any]) -> None:
    """Take over the parameter groups and step counters; the tensors have been read in place."""
    optimizer.load_state_dict(loaded["groups"])


def parameters(optimizer: DistributedOptimizer) -> Iterator[Tensor]:
    """Every parameter of the optimizer's buffers, also those of which this rank owns nothing, in the same order."""
    for buffer in optimizer.buffers:
        yield from buffer.param_index_map


def piece(optimizer: DistributedOptimizer, parameter: Tensor) -> tuple[int, int, dict[str, Tensor]] | None:
    """This rank's piece of a parameter: elements ``start:stop`` of it when flat, and the state of those by name."""
    if parameter not in optimizer.model_param_gbuf_map:
        return None
    owned = optimizer._get_model_param_range_map(parameter)["param"]
    return owned.start, owned.end, optimizer._get_main_param_and_optimizer_states(parameter)


def _piece_shards(
    entry: ShardedTensor | ShardedTensorFactory, shape: torch.Size, start: int, stop: int, tensors: dict[str, Tensor]
) -> Iterator[ShardedTensor]:
    """Shards of the state of elements ``start:stop`` of a parameter, whose place in the model is ``entry``."""
    for shard, first in _parts(entry, shape):
        begin, end = max(start, first), min(stop, first + math.prod(shard.local_shape))
        position = begin - start
        for offsets, sizes in blocks(shard.local_shape, begin - first, end - first):
            length = math.prod(sizes)
            for key in KEYS:
                values = tensors[key].detach()[position : position + length]
                yield _placed(shard, f"optimizer.state.{key}.{shard.key}", values, offsets, sizes)
            position += length


def _parts(entry: ShardedTensor | ShardedTensorFactory, shape: torch.Size) -> Iterator[tuple[ShardedTensor, int]]:
    """Where a parameter lies in the model's global tensors: its shards, each with its first flat element.

    Gate and up projection are one parameter and lie apart in the global tensor, so that TP ranks can share both. Raises
    ValueError for a factory whose shards are not contiguous ranges of the parameter.
    """
    if isinstance(entry, ShardedTensor):
        yield entry, 0
        return
    stand_in = torch.empty(shape, device="meta")
    for shard in nested_values(replace(entry, data=stand_in).build()):
        if shard.data is None or not shard.data.is_contiguous():
            raise ValueError(f"{shard.key} is not made of contiguous ranges of its parameter")
        yield shard, int(shard.data.storage_offset())


def _placed(
    shard: ShardedTensor, key: str, values: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> ShardedTensor:
    """The block ``offsets``, ``sizes`` of ``shard`` as a shard of the global tensor ``key``.

    The shards of a tensor form no regular grid. The last number of a replica id is the data-parallel rank, of which
    each owns other blocks; the others tell copies under TP and of tied embeddings, which are not written, apart.
    """
    before = (0,) * shard.prepend_axis_num
    data = values.view((1,) * shard.prepend_axis_num + sizes)
    place = tuple(outer + inner for outer, inner in zip(shard.global_offset, before + offsets, strict=True))
    replica = (*shard.replica_id[:-1], 0) if isinstance(shard.replica_id, tuple) else 0
    return replace(
        shard, key=key, data=data, dtype=data.dtype, local_shape=tuple(data.shape), global_offset=place,
        axis_fragmentations=None, prepend_axis_num=0, replica_id=replica,
    )  # fmt: skip


def blocks(
    shape: tuple[int, ...], start: int, stop: int, limit: int | None = None
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements ``start:stop`` (row-major) of a tensor of ``shape`` as (offsets, sizes) of blocks, in order.

    Each block is contiguous in the flat tensor and has at most ``limit`` (``BLOCK``) elements.

    >>> list(blocks((4, 3), 2, 11))
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 2))]
    """
    limit = limit or BLOCK
    if len(shape) == 1:
        yield from (((first,), (min(limit, stop - first),)) for first in range(start, stop, limit))
        return
    row, position = math.prod(shape[1:]), start
    while position < stop:
        index, within = divmod(position, row)
        rows = min(stop // row - index, limit // row) if within == 0 else 0
        if rows:
            yield (index, *(0 for _ in shape[1:])), (rows, *shape[1:])
            position += rows * row
            continue
        end = min(stop, (index + 1) * row)
        for offsets, sizes in blocks(shape[1:], within, end - index * row, limit):
            yield (index, *offsets), (1, *sizes)
        position = end
