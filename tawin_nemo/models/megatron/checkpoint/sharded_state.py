"""The part of a checkpoint that megatron-core shards: the state of the model and of its optimizer.

The distributed optimizer keeps master weights and moments as flat pieces of a padded gradient buffer, cut evenly over
the data-parallel ranks. A checkpoint that is to be read under another layout needs them in the shape of the
parameters. megatron-core's own conversion (``fully_reshardable``) mixes up padded and unpadded positions: it zeroes
the end of a buffer whose parameters are not multiples of 64 long, and shifts every bucket after the first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from tawin_nemo.models.megatron.model.adapters import adapter_state, adapters_of

#: Master weight and Adam moments; the step counter is common to all parameters and lies in the parameter groups.
_KEYS = ("param", "exp_avg", "exp_avg_sq")


class HasOptimizer(Protocol):
    """What is needed of a `Trainable`: its megatron-core optimizer."""

    @property
    def optimizer(self) -> Any: ...


def sharded_state(model: GPTModel, trainable: HasOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    """What ``dist_checkpointing`` saves, or loads into: ``model`` and, with ``trainable``, ``optimizer``.

    Both are in the shape of the parameters, so that they can be loaded under another TP, PP and DP size. Of a model
    with adapters they hold the adapters only.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    parts: dict[str, Any] = {"model": model.sharded_state_dict(metadata={"dp_cp_group": group})}
    if adapters_of(model) is not None:
        parts["model"] = adapter_state(parts["model"])
    if trainable is not None:
        complete_adam_state(trainable.optimizer)
        parts["optimizer"] = {
            str(number): _sharded_part(part, parts["model"], is_loading=is_loading)
            for number, part in enumerate(_parts(trainable.optimizer))
        }
    return parts


def _sharded_part(part: Any, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    if isinstance(part, DistributedOptimizer):
        return _distributed_state(part, model_state, is_loading=is_loading)
    return part.sharded_state_dict(model_state, is_loading=is_loading)


def load_state(model: GPTModel, trainable: HasOptimizer | None, loaded: dict[str, Any]) -> None:
    """Put what ``dist_checkpointing`` read into the model and the optimizer."""
    model.load_state_dict(loaded["model"], strict=adapters_of(model) is None)
    if trainable is None:
        return
    for number, part in enumerate(_parts(trainable.optimizer)):
        state = loaded["optimizer"][str(number)]
        if isinstance(part, DistributedOptimizer):
            _load_distributed_state(part, state)
            continue
        # A common step of 0 is not stored, but torch's Adam wants one.
        if _is_torch_adam(part.optimizer):
            state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(0.0))
        part.load_state_dict(state)
    complete_adam_state(trainable.optimizer)


def optimizer_kind(trainable: HasOptimizer | None) -> str | None:
    """Class names of megatron-core's optimizers: each kind has its own state format."""
    if trainable is None:
        return None
    return "+".join(type(part).__name__ for part in _parts(trainable.optimizer))


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _is_torch_adam(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def complete_adam_state(optimizer: Any) -> None:
    """Give torch's Adam the state it would make in its first step, and every parameter a step counter of its own.

    A fused or capturable Adam reads the counter in its kernel, so the counter lies on the parameter's device; any other
    keeps it on the CPU. torch does the same, but only for a state that is still empty.

    megatron-core 0.16 can neither save nor load a distributed optimizer that has not stepped, and when it loads one it
    hands all parameters one and the same step tensor: the next update would count one step per parameter, and correct
    the bias of the moments wrongly.
    """
    for part in _parts(optimizer):
        if part.optimizer is None:  # a rank without parameters of this kind
            continue
        part.init_state_fn(part.optimizer, part.config)
        if _is_torch_adam(part.optimizer):
            for group in part.optimizer.param_groups:
                in_kernel = group.get("fused") or group.get("capturable")
                for parameter in group["params"]:
                    state = part.optimizer.state[parameter]
                    device = parameter.device if in_kernel else torch.device("cpu")
                    step = state.get("step", torch.tensor(0.0))
                    state["step"] = step.clone() if step.device == device else step.to(device)


# -- Distributed optimizer ---------------------------------------------------------------------------------------------


def _distributed_state(
    optimizer: DistributedOptimizer, model_state: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
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
def _load_distributed_state(optimizer: DistributedOptimizer, loaded: dict[str, Any]) -> None:
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
    piece = optimizer._get_model_param_range_map(parameter)["param"]
    return piece.start, piece.end, optimizer._get_main_param_and_optimizer_states(parameter)[key]


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
