"""First scales of FP8 with delayed scaling (``model.precision=fp8-delayed``).

Transformer Engine takes a pass's scales from the maxima of passes before it, and updates them only at the end of a pass
with gradient enabled. All scales of a new model are therefore 1 until its first training pass: weights of about 0.02
would be quantised in steps of 2^-9 by the first rollout and by the reference. One discarded pass with gradient enabled
sets them. Scales belong to a checkpoint, so a resumed run has them and makes no such pass. Importing this module does
not import Transformer Engine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_calibrated: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def calibrate(model: torch.nn.Module, forward: Callable[[], object]) -> None:
    """Call ``forward`` once with gradient enabled when ``model`` has no scales yet; else do nothing.

    ``model`` is a GPTModel, ``forward`` runs it on the input of the pass to come; its result is discarded. Ranks that
    share a model call this together. Does nothing while gradient is enabled, since such a pass sets the scales itself.
    """
    if torch.is_grad_enabled() or model in _calibrated or not _is_delayed(model):
        return
    if all(bool((scale == 1).all()) for scale in _scales(model)):
        with torch.enable_grad():
            forward()
    _calibrated.add(model)


def _is_delayed(model: torch.nn.Module) -> bool:
    config: Any = model.config
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def _scales(model: torch.nn.Module) -> Iterator[Tensor]:
    """The scales of inputs and weights of every Transformer Engine module that has run or was loaded."""
    for module in model.modules():
        scaling = getattr(module, "fp8_meta", {}).get("scaling_fwd")
        if scaling is not None:
            yield scaling.scale
