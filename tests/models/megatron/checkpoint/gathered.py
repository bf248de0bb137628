"""The slow reference of ``flat_pieces``: data-parallel rank 0 gathers and writes, and every rank reads, whole tensors.

It is how checkpoints were written and read before; the files have the same format. Also the other side of
``tests.benchmarks.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from tawin_nemo.models.megatron.checkpoint import dcp_save, flat_pieces


@contextmanager
def saving() -> Iterator[None]:
    """Inside, checkpoints are written by data-parallel rank 0 alone."""
    with (
        patch.object(flat_pieces, "distributed_state", partial(_state, loading=False)),
        patch.object(dcp_save, "share_replicas", lambda state: None),
    ):
        yield


@contextmanager
def loading() -> Iterator[None]:
    """Inside, every rank reads whole tensors and takes its pieces of them."""
    with (
        patch.object(flat_pieces, "distributed_state", partial(_state, loading=True)),
        patch.object(flat_pieces, "load_distributed_state", _load),
    ):
        yield


def _state(optimizer: Any, model_state: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    entries = {id(entry.data): entry for entry in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    state: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(flat_pieces.parameters(optimizer)):
        entry = entries[id(parameter)]
        state[number] = {}
        for key in flat_pieces.KEYS:
            whole = torch.empty(parameter.shape) if loading else _whole(optimizer, parameter, key)
            fields = {} if isinstance(entry, ShardedTensorFactory) else {"dtype": whole.dtype}
            state[number][key] = replace(entry, key=f"optimizer.state.{key}.{entry.key}", data=whole, **fields)
    return {"groups": optimizer.state_dict(), "state": state}


@torch.no_grad()
def _load(optimizer: Any, loaded: dict[str, Any]) -> None:
    optimizer.load_state_dict(loaded["groups"])
    for number, parameter in enumerate(flat_pieces.parameters(optimizer)):
        owned = flat_pieces.piece(optimizer, parameter)
        if owned is not None:
            start, stop, tensors = owned
            for key in flat_pieces.KEYS:
                tensors[key].copy_(loaded["state"][number][key].flatten()[start:stop])


@torch.no_grad()
def _whole(optimizer: Any, parameter: Tensor, key: str) -> Tensor:
    """The state of a whole parameter on data-parallel rank 0, and views of one zero on the others."""
    group = optimizer.data_parallel_group
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    owned = flat_pieces.piece(optimizer, parameter)
    if owned is not None:
        start, stop, tensors = owned
        whole[start:stop] = tensors[key]
    if group.size() > 1:
        dist.reduce(whole, dst=dist.get_global_rank(group, 0), group=group)
    if group.rank() != 0:
        return torch.zeros(()).expand(parameter.shape)
    return whole.view(parameter.shape).cpu()
