"""State of megatron-core's distributed optimizer, parameter by parameter.

The distributed optimizer keeps master weights and moments as flat pieces of a padded gradient buffer, cut evenly over
the data-parallel ranks. A checkpoint that is to be read under another layout needs them in the shape of the
parameters. megatron-core's own conversion (``fully_reshardable``) mixes up padded and unpadded positions: it zeroes
the end of a buffer whose parameters are not multiples of 64 long, and shifts every bucket after the first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

#: Master weight and Adam moments; the step counter is common to all parameters and lies in the parameter groups.
_KEYS = ("param", "exp_avg", "exp_avg_sq")


def sharded_state(optimizer: DistributedOptimizer, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """``groups`` (plain values) and ``state`` (sharded like the parameters). Collective over data-parallel ranks.

    When saving, only data-parallel rank 0, whose copy is written, holds data; the others hold views of one zero.
    """
    entries = {id(entry.data): entry for entry in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    state: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        entry = entries[id(parameter)]
        state[number] = {}
        for key in _KEYS:
            whole = torch.empty(parameter.shape) if is_loading else _whole(optimizer, parameter, key)
            fields = {} if isinstance(entry, ShardedTensorFactory) else {"dtype": whole.dtype}
            state[number][key] = replace(entry, key=f"optimizer.state.{key}.{entry.key}", data=whole, **fields)
    return {"groups": optimizer.state_dict(), "state": state}


@torch.no_grad()
def load_state(optimizer: DistributedOptimizer, loaded: dict[str, Any]) -> None:
    """Take this rank's piece of every loaded tensor."""
    optimizer.load_state_dict(loaded["groups"])
    for number, parameter in enumerate(_parameters(optimizer)):
        for key in _KEYS:
            piece = _piece(optimizer, parameter, key)
            if piece is not None:
                start, stop, mine = piece
                mine.copy_(loaded["state"][number][key].flatten()[start:stop])


def _parameters(optimizer: DistributedOptimizer) -> Iterator[Tensor]:
    """Every parameter of the optimizer's buffers, also those of which this rank owns nothing, in the same order."""
    for buffer in optimizer.buffers:
        yield from buffer.param_index_map


def _piece(optimizer: DistributedOptimizer, parameter: Tensor, key: str) -> tuple[int, int, Tensor] | None:
    """This rank's flat piece ``start:stop`` of a parameter's state."""
    if parameter not in optimizer.model_param_gbuf_map:
        return None
    place = optimizer._get_model_param_range_map(parameter)["param"]
    return place.start, place.end, optimizer._get_main_param_and_optimizer_states(parameter)[key]


@torch.no_grad()
def _whole(optimizer: DistributedOptimizer, parameter: Tensor, key: str) -> Tensor:
    group = optimizer.data_parallel_group
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    piece = _piece(optimizer, parameter, key)
    if piece is not None:
        start, stop, mine = piece
        whole[start:stop] = mine
    if group.size() > 1:  # the pieces are disjoint: adding zeros changes nothing
        dist.reduce(whole, dst=dist.get_global_rank(group, 0), group=group)
    if group.rank() != 0:
        return torch.zeros(()).expand(parameter.shape)
    return whole.view(parameter.shape).cpu()
