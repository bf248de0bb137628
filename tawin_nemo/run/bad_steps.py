"""Optimizer steps whose loss or gradient is not finite are skipped, counted and dumped for inspection.

More than ``trainer.max_skipped_steps`` of them end the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.stage import Progress, Stage
from tawin_nemo.types import TokenBatch
from tawin_nemo.util.errors import NonFiniteStep, TawinError
from tawin_nemo.util.files import atomic_path
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

Update = Callable[[], dict[str, float]]
Guard = Callable[[Update, Sequence[TokenBatch]], dict[str, float]]


def unguarded(update: Update, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """Call ``update`` and return its statistics; a NonFiniteStep passes through."""
    return update()


def step_guard(stage: Stage, done: Progress) -> Guard:
    """``guarded`` for the steps of a stage; the token batches of skipped steps are dumped in ``STAGE/skipped``."""
    limit, directory = stage.trainer.max_skipped_steps, stage.directory / "skipped"
    return partial(guarded, done=done, limit=limit, directory=directory)


def guarded(
    update: Update, batches: Sequence[TokenBatch], *, done: Progress, limit: int, directory: Path
) -> dict[str, float]:
    """The statistics that ``update`` returns, or ``{"skipped": 1.0}`` for a step that is not finite; then the rank's
    token batches are dumped in ``directory/step_N.rankR.safetensors`` (N counts from 1, as in metrics.jsonl).

    ``update`` must not change the weights when it raises NonFiniteStep, and must raise it on all ranks. Raises
    TawinError when more than ``limit`` (``trainer.max_skipped_steps``) steps were skipped.
    """
    try:
        return update()
    except NonFiniteStep as error:
        done.skipped_steps += 1
        path = directory / f"step_{done.step + 1}.rank{runtime.world_rank()}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(batch_tensors(batches), temporary)
        message = f"step {done.step + 1}: {error} Its token batches are in {path}"
        if done.skipped_steps > limit:
            raise TawinError(
                f"{message}. That makes {done.skipped_steps} of at most trainer.max_skipped_steps={limit}; "
                "lower the learning rate or look at those rows"
            ) from error
        log.warning("%s; step skipped, %d of at most %d", message, done.skipped_steps, limit)
        return {"skipped": 1.0}


def batch_tensors(batches: Sequence[TokenBatch]) -> dict[str, torch.Tensor]:
    """All tensors of the batches by ``NUMBER.FIELD``, nested ones as ``NUMBER.FIELD.FIELD``."""
    tensors: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        _collect(batch, str(number), tensors)
    return tensors


def _collect(node: Any, name: str, tensors: dict[str, torch.Tensor]) -> None:
    if isinstance(node, torch.Tensor):
        tensors[name] = node.detach().cpu().contiguous().clone()  # clone: safetensors accepts no shared memory
    elif is_dataclass(node):
        for item in fields(node):
            _collect(getattr(node, item.name), f"{name}.{item.name}", tensors)
