"""Weights that other ranks are still sending (``trainer.overlap_param_gather``): whoever reads a model waits for them.

The gather of new weights may run beside what follows an optimizer step. A training pass waits module by module, through
hooks on the model; code that reads parameters in any other way calls ``wait_for_weights`` first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

_waits: weakref.WeakKeyDictionary[torch.nn.Module, Callable[[], None]] = weakref.WeakKeyDictionary()


def wait_with(model: torch.nn.Module, wait: Callable[[], None]) -> None:
    """Let ``wait`` complete the weights of ``model``; it returns at once when none are under way."""
    _waits[model] = wait


def wait_for_weights(model: torch.nn.Module | None) -> None:
    """Return when all weights of ``model`` are those of the last optimizer step.

    ``model`` is the bare model, not one wrapped for data parallelism. Does nothing for None, and for models whose
    weights are never gathered in the background. Not collective: every rank has started the gather already.
    """
    wait = _waits.get(model) if model is not None else None
    if wait is not None:
        wait()
