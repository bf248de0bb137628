"""Searching without torch function modes: thousands of small calls of torch, none of which a mode has to see."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def plain_calls(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` without gradient and below every mode.

    On a machine without CUDA megatron-core runs on a mode that looks at each call of torch, at a cost like that of the
    call itself. It is needed where megatron builds and trains; what a search does names no CUDA device.
    """

    @wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return plain
