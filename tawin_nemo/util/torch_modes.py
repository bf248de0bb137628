"""Calls of torch that bypass torch function modes, for loops of thousands of small operations.

On a machine without CUDA, megatron-core runs under a function mode that maps CUDA devices to the CPU. The mode sees
every call of torch, which costs about as much as a small operation itself. It is needed where megatron builds models,
schedules passes and steps an optimizer, but not in searches and forward passes, which name no device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_modes() -> contextlib.AbstractContextManager[Any]:
    """A context in which no torch function mode sees a call; does nothing where CUDA is available."""
    return contextlib.nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()


def plain_calls(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run ``function`` without gradients and outside of every torch function mode."""

    @wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with without_modes(), torch.no_grad():  # in this order: no_grad itself is a call that a mode sees
            return function(*args, **kwargs)

    return plain


def numbers(count: int, device: torch.device) -> Tensor:
    """0 .. count - 1 as int64: a view of a tensor that is kept, so that no operation runs. Not to be written to."""
    return _numbers(1 << max(6, (count - 1).bit_length()), device)[:count]


@cache
def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)
