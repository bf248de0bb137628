"""What the parts of ``first_contact.sh`` share: the clock, their folder, sizes without a length that comes twice."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tawin_nemo.config.schema import TrainerConfig
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tests.gpu import parts
from tests.gpu.workload import Sizes, is_dry, is_pretended, sizes


def on_gpu() -> bool:
    """Whether this process has a real GPU."""
    return torch.cuda.is_available() and not is_dry()


def pretend_if_asked() -> None:
    """``TAWIN_GPU_DRY=pretended``: the pretended device, until this process ends; before any model is built."""
    if is_pretended():
        from tests.simcuda import device

        device.install()


def check_pretended() -> None:
    """Raises TawinError when the pretended device saw what a GPU would not have done."""
    if is_pretended():
        from tests.simcuda import device

        parts.require(not device.FAULTS, "; ".join(device.FAULTS))


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def out(name: str) -> Path:
    folder = Path(os.environ.get("OUT", "first_contact")) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def fresh(steps: int, **changes: Any) -> Sizes:
    """The usual sizes with other prompts in every step, so that no flat row is as long as one before."""
    given = sizes()
    return replace(given, rows=given.prompts * steps, steps=steps, **changes)


def tiny_rows(steps: int) -> Sizes:
    """The 0.5B model on short rows: what matters is that every part of a step runs."""
    return fresh(steps, prompts=4, prompt_tokens=(8, 24), tokens=2048, items=200, candidates=4)


def trainable_of(given: Sizes, trainer: TrainerConfig | None = None) -> Trainable:
    cfg = parts.start("bf16")
    return Trainable(build_model(given.shape, cfg, seed=1), given.shape, trainer or TrainerConfig(), lr=given.lr)
