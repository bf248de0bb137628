"""The part of a checkpoint that megatron-core shards: the state dicts of the model and of its optimizer."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

#: Optimizer state in the shape of the parameters: the only format that can be loaded under another TP, PP and DP size.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class HasOptimizer(Protocol):
    """What is needed of a `Trainable`: its megatron-core optimizer."""

    @property
    def optimizer(self) -> Any: ...


def sharded_state(model: GPTModel, trainable: HasOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    """What ``dist_checkpointing`` saves, or loads into: ``model`` and, with ``trainable``, ``optimizer``."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharding = {**_SHARDING, "dp_cp_group": group}
    parts = {"model": model.sharded_state_dict(metadata=sharding)}
    if trainable is not None:
        complete_adam_state(trainable.optimizer)
        parts["optimizer"] = trainable.optimizer.sharded_state_dict(
            parts["model"], is_loading=is_loading, metadata=sharding
        )
    return parts


def load_state(model: GPTModel, trainable: HasOptimizer | None, loaded: dict[str, Any]) -> None:
    """Put what ``dist_checkpointing`` read into the model and the optimizer."""
    model.load_state_dict(loaded["model"])
    if trainable is None:
        return
    parts, states = _parts(trainable.optimizer), loaded["optimizer"]
    for number, part in enumerate(parts):
        _load_part(part, states if len(parts) == 1 else states[number])
    complete_adam_state(trainable.optimizer)


def _load_part(part: Any, state: dict[str, Any]) -> None:
    """``part.load_state_dict``, with two gaps of megatron-core 0.16 around torch's Adam filled.

    A common step of 0 is not stored, but Adam wants one. And the distributed optimizer looks for the step counters
    among the stored tensors, where they are not: they are put aside while it copies the moments.
    """
    adam_state = state.get("optimizer", state).get("state")
    if adam_state is not None and _is_torch_adam(part.optimizer):
        adam_state.setdefault("common_step", torch.tensor(0.0))
    param_state = state.pop("param_state", None)
    part.load_state_dict(state)
    if param_state is None:
        return
    steps = {param: kept.pop("step") for param, kept in part.optimizer.state.items() if "step" in kept}
    part.load_parameter_state_from_fully_reshardable(param_state)
    for param, step in steps.items():
        part.optimizer.state[param]["step"] = step


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

    megatron-core 0.16 can neither save nor load a distributed optimizer that has not stepped, and when it loads one it
    hands all parameters one and the same step tensor: the next update would count one step per parameter, and correct
    the bias of the moments wrongly.
    """
    for part in _parts(optimizer):
        if part.optimizer is None:  # a rank without parameters of this kind
            continue
        part.init_state_fn(part.optimizer, part.config)
        if _is_torch_adam(part.optimizer):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone() if "step" in state else torch.tensor(0.0)
