"""Model FLOP utilisation (MFU): the FLOPs that a batch needs, and the peak FLOP/s of the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import torch

from tawin_nemo.config.backbones import Backbone, FlopCount
from tawin_nemo.config.gpus import known_peak
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.parallel import disaggregated, runtime
from tawin_nemo.types import TokenBatch


def forward_flop_count(batches: Sequence[TokenBatch], vocab: int) -> FlopCount:
    """Count of one forward pass over token trees: every token once, and only the head rows that are read."""
    total = FlopCount()
    for batch in batches:
        tokens = len(batch.tokens_S)
        seen = int((batch.end_S - torch.arange(tokens, device=batch.end_S.device)).sum())
        logits = len(batch.index_P) * vocab if batch.children is None else len(batch.children.token_E)
        total += FlopCount(tokens, float(seen), logits)
    return total


def training_flops(batches: Sequence[TokenBatch], shape: Backbone) -> float:
    """FLOPs of forward and backward over the batches, without those of recomputation."""
    return 3.0 * forward_flop_count(batches, shape.vocab).forward_flops(shape)


def peak_flops(recipe: Recipe) -> float:
    """Peak of one process's device in FLOP/s: from ``trainer.peak_tflops``, the table of GPUs, or a measurement."""
    return 1e12 * (recipe.trainer.peak_tflops or _device_peak(recipe.model.precision, torch.get_num_threads()))


def total_peak_flops(recipe: Recipe) -> float:
    """Peak of all processes together in FLOP/s, assuming equal devices."""
    return peak_flops(recipe) * disaggregated.job_size()


@cache
def _device_peak(precision: str, threads: int) -> float:
    device = runtime.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return known_peak(name, precision) or matmul_tflops(dtype, device)


def matmul_tflops(dtype: torch.dtype, device: torch.device | str = "cpu", *, seconds: float = 0.3) -> float:
    """Measured peak of a device that is not in the table: the best rate of square matrix products, in TFLOP/s."""
    on_gpu = torch.device(device).type == "cuda"
    size = 8192 if on_gpu else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = left @ right
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        if on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        best = min(best, now - begin)
        if now > end:
            return 2.0 * size**3 / best / 1e12
