"""Process groups of the pretended device: gloo carries what NCCL would, and refuses what NCCL would refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.simcuda.ledger import record
from tests.simcuda.tags import CPU, CUDA
from tests.simcuda.transfers import fault

#: Name of a group -> the backend that was asked for.
_backends: dict[str, str] = {}


def backend_of(group: Any = None) -> str:
    """The backend that a group pretends to have."""
    return _backends.get((group or dist.group.WORLD).group_name, "nccl")


def check_collective(name: str, args: Sequence[Any], inputs: list[Tensor], tags: list[str]) -> None:
    """Count a collective. Raises DeviceFault for a CPU tensor over NCCL, and for one of the device over gloo."""
    backend = "nccl"
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            with contextlib.suppress(Exception):  # an operator object, not a group
                backend = _backends.get(dist.ProcessGroup.unbox(argument).group_name, "nccl")
                break
    if CUDA in tags:
        record("collectives", name)
    wrong = CPU if backend == "nccl" else CUDA
    for tensor, tag in zip(inputs, tags, strict=True):
        if tag == wrong:
            fault(f"{name} over {backend} got a tensor of {tag}: {list(tensor.shape)} {tensor.dtype}")


def replacements() -> dict[str, object]:
    """Dotted names of torch.distributed -> what stands in for them."""
    init, new_group, barrier = dist.init_process_group, dist.new_group, dist.barrier
    c10d = "torch.distributed.distributed_c10d"
    made = {
        "init_process_group": _initialised(init), "new_group": _made(new_group), "get_backend": backend_of,
        "barrier": lambda group=None, async_op=False, device_ids=None: barrier(group, async_op),
    }  # fmt: skip
    return {
        **{f"torch.distributed.{name}": value for name, value in made.items()},
        **{f"{c10d}.{name}": value for name, value in made.items()},
        f"{c10d}._get_object_coll_device": lambda group=None: "cpu" if backend_of(group) == "gloo" else "cuda",
    }


def _initialised(real: Callable[..., Any]) -> Callable[..., Any]:
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        real("gloo", *args, **kwargs)
        _backends[dist.group.WORLD.group_name] = backend or "nccl"

    return init_process_group


def _made(real: Callable[..., Any]) -> Callable[..., Any]:
    def new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if name not in ("pg_options", "device_id")}
        group = real(ranks, timeout, "gloo", *args, **given)
        with contextlib.suppress(AttributeError):  # not a member: a number, not a group
            _backends[group.group_name] = backend or backend_of()
        return group

    return new_group
