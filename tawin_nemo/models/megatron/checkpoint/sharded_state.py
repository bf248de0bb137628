"""The part of a checkpoint that megatron-core shards: the state of the model and of its optimizer."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from tawin_nemo.models.megatron.checkpoint import flat_pieces
from tawin_nemo.models.megatron.model.adapters import adapter_state, adapters_of
from tawin_nemo.models.megatron.model.in_flight import wait_for_weights


class HasOptimizer(Protocol):
    """What is needed of a `Trainable`: its megatron-core optimizer."""

    @property
    def optimizer(self) -> Any: ...


def sharded_state(model: GPTModel, trainable: HasOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    """What ``dist_checkpointing`` saves, or loads into: ``model`` and, with ``trainable``, ``optimizer``.

    Both are in the shape of the parameters, so that they can be loaded under another TP, PP and DP size. Loading writes
    into the model's and the distributed optimizer's own tensors. Of a model with adapters they hold the adapters only.
    """
    wait_for_weights(model)
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
        return flat_pieces.distributed_state(part, model_state)
    return part.sharded_state_dict(model_state, is_loading=is_loading)


def load_state(model: GPTModel, trainable: HasOptimizer | None, loaded: dict[str, Any]) -> None:
    """Put what ``dist_checkpointing`` read into the model and the optimizer."""
    model.load_state_dict(loaded["model"], strict=adapters_of(model) is None)
    if trainable is None:
        return
    for number, part in enumerate(_parts(trainable.optimizer)):
        state = loaded["optimizer"][str(number)]
        if isinstance(part, DistributedOptimizer):
            flat_pieces.load_distributed_state(part, state)
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
