"""Timers of a step's phases: seconds, tokens per second and model FLOP utilisation (MFU).

Wall-clock times differ between equal runs, so they go to ``timings.jsonl`` and to the loggers, never to
``metrics.jsonl``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.lora import training_passes
from tawin_nemo.config.schema import Recipe
from tawin_nemo.run.mfu import total_peak_flops, training_flops
from tawin_nemo.types import DataParallel, TokenBatch


class Timers:
    """Clock of one step: ``with timers("update"): ...`` adds to a phase, ``report`` returns everything
    measured and resets the clock.

    ``peak_flops`` is the peak of all processes together, in FLOP/s; ``training_passes`` the FLOPs of a training pass in
    forward passes. Phases must not be nested. On CUDA both ends of a phase wait for the device.
    """

    def __init__(self, peak_flops: float, dp: DataParallel, *, training_passes: float = 3.0) -> None:
        self._peak, self._dp, self.training_passes = peak_flops, dp, training_passes
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, np.ndarray] = {}

    @classmethod
    def of(cls, recipe: Recipe, dp: DataParallel) -> Timers:
        """The timers of a training stage."""
        return cls(total_peak_flops(recipe), dp, training_passes=training_passes(recipe.model.lora))

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = _now()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + _now() - begin

    def count(self, phase: str, *, tokens: int, rows: float, flops: float) -> None:
        """Add this replica's part of a phase: ``tokens`` produced, ``rows`` (tokens) that went through the decoder, and
        the FLOPs of this."""
        self._counts[phase] = self._counts.get(phase, np.zeros(3)) + np.array([tokens, rows, flops])

    def report(self) -> dict[str, float]:
        """``seconds/PHASE`` of every phase, and of counted phases ``tokens_per_second/``, ``rows/`` and ``mfu/``, over
        all replicas; ``mfu/step`` is that of all phases together. Every replica calls it with the same phases."""
        seconds = {phase: max(value, 1e-9) for phase, value in self._seconds.items()}
        measured = {f"seconds/{phase}": value for phase, value in seconds.items()}
        names = list(self._counts)
        totals = np.sum(self._dp.gather(np.array([self._counts[name] for name in names])), axis=0)
        for name, (tokens, rows, flops) in zip(names, totals, strict=True):
            measured |= {
                f"tokens_per_second/{name}": tokens / seconds[name],
                f"rows/{name}": rows,
                f"mfu/{name}": flops / (seconds[name] * self._peak),
            }
        if names:
            measured["mfu/step"] = float(totals[:, 2].sum()) / (sum(seconds.values()) * self._peak)
        self._seconds, self._counts = {}, {}
        return {name: float(f"{value:.6g}") for name, value in measured.items()}


def count_update(timers: Timers, batches: Sequence[TokenBatch], shape: Backbone, *, passes: int = 1) -> None:
    """Count ``passes`` training passes over the batches as phase ``update``; its tokens are the scored ones."""
    scored, rows = sum(len(batch.target_N) for batch in batches), sum(len(batch.tokens_S) for batch in batches)
    flops = timers.training_passes / 3.0 * training_flops(batches, shape)
    timers.count("update", tokens=passes * scored, rows=passes * rows, flops=passes * flops)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
