"""The parts of ``first_contact.sh``: each returns figures as a dict, or raises. No shape of a timed call comes twice,
unless the part says so: lengths change in every step of a real run, and libraries keep plans per shape."""

from __future__ import annotations

import statistics
import subprocess
import sys
from importlib import metadata
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.mfu import training_flops
from tests.gpu import contact_models, parts
from tests.gpu.contact_common import clock, fresh, on_gpu, out, tiny_rows, trainable_of
from tests.gpu.workload import Workload, is_dry, sizes

#: Steps at the end of a training that the profiler looks at.
PROFILED = 3


# -- attention -----------------------------------------------------------------------------------------------------
def sdpa() -> dict[str, Any]:
    """First and second call of new attention shapes, forward and backward, with and without cuDNN's kernels."""
    count, low, high = (3, 8, 40) if is_dry() else (20, 200, 4000)
    lengths = np.random.default_rng(1).choice(np.arange(low, high), size=4 * count, replace=False).tolist()
    result: dict[str, Any] = {}
    for number, (cudnn, masked) in enumerate((a, b) for a in (True, False) for b in (False, True)):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        before = psutil.Process().memory_info().rss
        times = [_attention_times(length, masked) for length in lengths[number * count : (number + 1) * count]]
        grown = psutil.Process().memory_info().rss - before
        name = f"{'with' if cudnn else 'without'} cudnn, {'masked' if masked else 'causal'}"
        result[name] = {
            "new_shape_ms": statistics.median(first for first, _, _ in times),
            "new_shape_max_ms": max(first for first, _, _ in times),
            "same_shape_ms": statistics.median(second for _, second, _ in times),
            "backend": sorted({backend for _, _, backend in times}),
            "host_memory_mib_per_shape": grown / 2**20 / count,
        }
    return result


def _attention_times(length: int, masked: bool) -> tuple[float, float, int]:
    """Milliseconds of the first and the second call with this shape, and torch's number of the backend."""
    shape, device = sizes().shape, parts.start("bf16") and runtime.device()
    folded = length * shape.heads // shape.kv_heads if masked else length
    heads = (shape.kv_heads if masked else shape.heads, shape.kv_heads, shape.kv_heads)
    rows = (folded, length, length)
    qkv = [
        torch.randn(1, h, n, shape.kv_channels, device=device, dtype=torch.bfloat16, requires_grad=True)
        for h, n in zip(heads, rows, strict=True)
    ]
    options: dict[str, Any] = {"is_causal": not masked, "enable_gqa": heads[0] != heads[1]}
    if masked:
        options["attn_mask"] = torch.zeros(1, 1, folded, length, device=device, dtype=torch.bfloat16)
    took = []
    for _ in range(2):
        begin = clock()
        F.scaled_dot_product_attention(*qkv, **options).sum().backward()
        took.append(1e3 * (clock() - begin))
    return took[0], took[1], int(torch._fused_sdp_choice(*qkv, **options))


# -- a first run ---------------------------------------------------------------------------------------------------
def first_steps() -> dict[str, Any]:
    """Save before the first step, update, save, load into another model, update: both end with the same weights."""
    given, folder = tiny_rows(2), out("first_steps")
    load, trainable = Workload(given), trainable_of(given)
    checkpoint.save_checkpoint(folder / "step_0", model=trainable.model, trainable=trainable, state={"step": 0})
    losses = [trainable.update(list(load.micro_batches(0)), lr=given.lr)["loss"]]
    checkpoint.save_checkpoint(folder / "step_1", model=trainable.model, trainable=trainable, state={"step": 1})
    losses.append(trainable.update(list(load.micro_batches(1)), lr=given.lr)["loss"])
    other = trainable_of(given)
    checkpoint.load_checkpoint(folder / "step_1", model=other.model, trainable=other)
    again = other.update(list(load.micro_batches(1)), lr=given.lr)["loss"]
    pairs = zip(trainable.model.parameters(), other.model.parameters(), strict=True)
    gap = max(float((a - b).abs().max()) for a, b in pairs)
    parts.require(abs(again - losses[1]) <= 1e-3 * abs(losses[1]), f"{again} after resuming, {losses[1]} without")
    figures = {"losses": losses, "resumed": again, "largest_weight_gap": gap, "optimizer": _adam(trainable)}
    return figures | {"package_installed": _installed()}


def _installed() -> bool:
    """Whether tawin-nemo is installed here; a checkout that is not must run as well."""
    try:
        metadata.version("tawin-nemo")
    except metadata.PackageNotFoundError:
        return False
    return True


def _adam(trainable: Trainable) -> str:
    optimizers = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    kind = type(optimizers[0].optimizer)
    return f"{kind.__module__}.{kind.__name__}"


def correctness() -> dict[str, Any]:
    """Attention against a dense softmax; on a GPU also the pytest file of this folder in bf16."""
    found = parts.attention()
    result: dict[str, Any] = {name: max(found[name].values()) for name in ("float32", "bfloat16")}
    if on_gpu():
        chosen = "dense or lean or inference or (search_after and bf16)"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/gpu/test_on_gpu.py",
            "-k",
            chosen,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        result["pytest"] = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
        parts.require(done.returncode == 0, result["pytest"] + done.stdout[-1500:])
    return result


def compiled() -> dict[str, Any]:
    """Seconds of the first updates and searches, whose lengths all differ, and how often torch.compile was at work."""
    from torch._dynamo.utils import counters

    given = fresh(5, tokens=8192)
    load, trainable = Workload(given), trainable_of(given)
    updates, searches = [], []
    for step in range(given.steps):
        begin = clock()
        trainable.update(list(load.micro_batches(step)), lr=given.lr)
        updates.append(clock() - begin)
    for step in range(given.steps):
        begin = clock()
        contact_models.rollout(trainable.model, load, step)
        searches.append(clock() - begin)
    frames = {key: dict(counters[key]) for key in ("frames", "recompiles") if key in counters}
    return {
        "update_s": updates,
        "search_s": searches,
        "dynamo": frames,
        "fused": trainable.config.bias_activation_fusion,
    }


def train_new_shapes() -> dict[str, Any]:
    """bf16 training of the 0.5B shape where no length repeats: speed, MFU, launches and gaps of three steps."""
    given = fresh(9 if is_dry() else 60, tokens=128 if is_dry() else 8192)
    load, trainable = Workload(given), trainable_of(given)
    seconds, tokens, flops, losses = [], [], [], []
    warmup = given.steps // 6
    for step in range(given.steps - PROFILED):
        micro = list(load.micro_batches(step))
        begin = clock()
        losses.append(trainable.update(micro, lr=given.lr)["loss"])
        seconds.append(clock() - begin)
        tokens.append(sum(len(part.batch.tokens_S) for part in micro))
        flops.append(training_flops([part.batch for part in micro], given.shape))
    last = [list(load.micro_batches(step)) for step in range(given.steps - PROFILED, given.steps)]
    rate = sum(flops[warmup:]) / sum(seconds[warmup:])
    return {
        "steps": given.steps, "first_step_s": seconds[0], "median_step_s": statistics.median(seconds[warmup:]),
        "slowest_step_s": max(seconds[warmup:]), "tokens_per_s": sum(tokens[warmup:]) / sum(seconds[warmup:]),
        "tflops": rate / 1e12, **parts._mfu("bf16", rate, on_gpu()), "losses": [losses[0], losses[-1]],
        "three_steps": contact_models.launches(lambda: [trainable.update(micro, lr=given.lr) for micro in last]),
    }  # fmt: skip
