"""Work below torch function modes: thousands of small calls of torch, none of which a mode has to see.

On a machine without CUDA megatron-core runs on a mode that reads CUDA devices as CPU and so looks at each call of
torch, at a cost like that of a small call itself. It is needed where megatron builds models, schedules passes and steps
an optimizer; searches and passes through a model name no device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_modes() -> contextlib.AbstractContextManager[Any]:
    """Inside, no torch function mode sees a call; nothing at all where CUDA is there, and with it no such mode."""
    return contextlib.nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()


def plain_calls(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` without gradient and below every mode."""

    @wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with without_modes(), torch.no_grad():  # in this order: no_grad itself is a call that a mode sees
            return function(*args, **kwargs)

    return plain
