"""The parts of ``run.sh``: each returns what it found as a dict, or raises; each runs in a process of its own."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tawin_nemo.config.gpus import known_peak
from tawin_nemo.config.schema import ModelConfig, RlConfig, RolloutConfig, TrainerConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.attention import PlannedAttention
from tawin_nemo.models.megatron.model.build import build_model, build_search_model, model_config
from tawin_nemo.models.megatron.model.precision import FP8
from tawin_nemo.models.megatron.model.reshard import SharedWeights
from tawin_nemo.models.megatron.model.tree_plan import TreePlan
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.placement.dispatch import generate_options
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.groups import found_in_both
from tawin_nemo.run.mfu import training_flops
from tawin_nemo.train.actor import Actor
from tawin_nemo.types import DataParallel, TokenBatch
from tests.gpu.workload import Workload, is_dry, sizes, spread

#: Two-call attention against a dense softmax in float64, relative to the largest entry: outputs and gradients.
ATTENTION_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
#: Mean difference of a bf16 log-prob from float32's, and least cosine of the two gradients of a tensor.
LOGP_TOLERANCE, LEAST_COSINE = 0.05, 0.98
#: The last steps' loss has to fall below this share of the first steps'.
LEARNED = 0.9
#: Train/rollout mismatch before the first update: mean change of a token's probability.
MISMATCH_TOLERANCE = {"bf16": 0.02} | dict.fromkeys(FP8, 0.05)


class PartError(Exception):
    """A figure outside its tolerance; the message has the figures."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise PartError(what)


def start(precision: str) -> ModelConfig:
    if not is_dry():
        require(torch.cuda.is_available(), "no CUDA device; TAWIN_GPU_DRY=1 tests the script without one")
    cfg = ModelConfig(precision=precision)
    runtime.initialize(cfg, seed=0)
    return cfg


def first_batch() -> TokenBatch:
    return next(Workload(sizes()).micro_batches(0)).batch


# -- correctness ---------------------------------------------------------------------------------------------------
def dense(batch: TokenBatch, query_SHD: Tensor, key_SGD: Tensor, value_SGD: Tensor) -> Tensor:
    """One softmax over the whole flat row in float64: token i sees token j if j <= i < end_j."""
    device, share = query_SHD.device, query_SHD.shape[1] // key_SGD.shape[1]
    place_S, end_S = torch.arange(len(batch.tokens_S), device=device), batch.end_S.to(device)
    visible_SK = (place_S[None] <= place_S[:, None]) & (place_S[:, None] < end_S[None])
    query, key, value = query_SHD.double(), *(x.double().repeat_interleave(share, 1) for x in (key_SGD, value_SGD))
    score_HSK = torch.einsum("shd,khd->hsk", query, key) / math.sqrt(query.shape[-1])
    weight_HSK = score_HSK.masked_fill(~visible_SK, -torch.inf).softmax(-1)
    return torch.einsum("hsk,khd->shd", weight_HSK, value)


def attention() -> dict[str, Any]:
    """The two calls of the tree attention against a dense softmax, forward and backward."""
    cfg, given = start("fp32"), sizes()
    shape, batch = given.shape, _cut(first_batch())
    core = PlannedAttention(model_config(shape, cfg), 1)
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Any] = {"tokens": len(batch.tokens_S), "prompts": len(batch.chain_B)}
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    drawn = [torch.randn(len(batch.tokens_S), h, shape.kv_channels, generator=generator) for h in heads]
    for dtype, tolerance in ATTENTION_TOLERANCE.items():
        inputs = [x.to(runtime.device(), dtype, copy=True).requires_grad_() for x in drawn]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        ours, want = TreePlan(batch, runtime.device()).attend(core, *inputs), dense(batch, *exact)
        weight = torch.linspace(-1, 1, want.numel(), device=want.device, dtype=torch.float64).view_as(want)
        (ours.double() * weight).sum().backward()
        (want * weight).sum().backward()
        pairs = {"output": (ours, want)} | {
            name: (a.grad, b.grad) for name, a, b in zip(("query", "key", "value"), inputs, exact, strict=True)
        }
        errors = {name: float((a.double() - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}
        found[str(dtype).removeprefix("torch.")] = errors
        require(max(errors.values()) <= tolerance, f"{dtype}: {errors} above {tolerance}")
    return found


def _cut(batch: TokenBatch, prompts: int = 6) -> TokenBatch:
    """The first prompts only: the dense reference is quadratic in all tokens."""
    size_B = (batch.chain_B + batch.tree_B)[:prompts]
    S = int(size_B.sum())
    none = torch.zeros(0, dtype=torch.long)
    return TokenBatch(
        batch.tokens_S[:S], batch.position_S[:S], batch.end_S[:S], batch.chain_B[:prompts], batch.tree_B[:prompts],
        none, none, none,
    )  # fmt: skip


def _gradients(precision: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients of one micro-batch, float32 on the CPU."""
    cfg = start(precision)
    shape = spread(sizes().shape)
    trainable = Trainable(build_model(shape, cfg, seed=1), shape, TrainerConfig(), lr=1e-4)
    micro = next(Workload(sizes()).micro_batches(0))
    trainable.accumulate([micro])
    gradients = {name: p.main_grad.float().cpu() for name, p in trainable.model.named_parameters()}
    return trainable.score([micro.batch])[0].float().cpu(), gradients


def bf16_vs_fp32() -> dict[str, Any]:
    """The same weights and trees in both formats: log-probs and gradients."""
    (wide_N, wide), (narrow_N, narrow) = _gradients("fp32"), _gradients("bf16")
    cosine = {
        name: float(torch.nn.functional.cosine_similarity(wide[name].flatten(), narrow[name].flatten(), 0))
        for name in wide
        if not name.endswith("linear_qkv.bias")  # key biases have no gradient but rounding
    }
    worst = min(cosine, key=lambda name: cosine[name])
    difference = (wide_N - narrow_N).abs()
    found = {
        "logp_mean_difference": float(difference.mean()), "logp_max_difference": float(difference.max()),
        "gradient_cosine_least": cosine[worst], "gradient_cosine_least_in": worst,
        "gradient_cosine_median": statistics.median(cosine.values()),
    }  # fmt: skip
    require(found["logp_mean_difference"] <= LOGP_TOLERANCE and cosine[worst] >= LEAST_COSINE, str(found))
    return found


# -- training ------------------------------------------------------------------------------------------------------
def train(precision: str) -> dict[str, Any]:
    """A loss curve, and the speed and peak memory of its steps (forward, backward, optimizer)."""
    cfg, given = start(precision), sizes()
    load = Workload(given)
    on_gpu = runtime.device().type == "cuda"
    trainable = Trainable(build_model(given.shape, cfg, seed=1), given.shape, TrainerConfig(), lr=given.lr)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds, tokens, flops = [], [], 0, 0.0
    for step in range(given.steps):
        micro = list(load.micro_batches(step))
        lr = given.lr * min(1.0, (step + 1) / max(given.warmup, 1))
        begin = _clock(on_gpu)
        losses.append(trainable.update(micro, lr=lr)["loss"])
        took = _clock(on_gpu) - begin
        if step >= given.warmup:
            seconds.append(took)
            tokens += sum(len(part.batch.tokens_S) for part in micro)
            flops += training_flops([part.batch for part in micro], given.shape)
    window = max(1, given.steps // 10)
    first, last = statistics.fmean(losses[:window]), statistics.fmean(losses[-window:])
    found = {
        "steps": given.steps, "losses": [round(loss, 4) for loss in losses], "first": first, "last": last,
        "seconds_per_step": statistics.median(seconds), "tokens_per_s": tokens / sum(seconds),
        "tflops": flops / sum(seconds) / 1e12, **_mfu(precision, flops / sum(seconds), on_gpu),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }  # fmt: skip
    require(all(math.isfinite(loss) for loss in losses), f"losses {found['losses']}")
    require(last < LEARNED * first, f"the loss went from {first:.4f} to {last:.4f}")
    return found


def _clock(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _mfu(precision: str, flops_per_s: float, on_gpu: bool) -> dict[str, float | None]:
    """Against the data sheet's dense peak of the precision, and of bf16; None for a device that is in no table."""
    name = torch.cuda.get_device_name() if on_gpu else ""
    peaks = {"mfu": known_peak(name, precision), "mfu_of_bf16_peak": known_peak(name, "bf16")}
    return {key: flops_per_s / peak / 1e12 if peak else None for key, peak in peaks.items()}


def mismatch(precision: str) -> dict[str, Any]:
    """How far the training forward pass is from the search's, with the same weights: what RL logs in every step; under
    FP8 also which share of the candidates a search in bf16 finds."""
    cfg, given = start(precision), sizes()
    load, shape = Workload(given), spread(given.shape)
    model = build_model(shape, cfg, seed=1)
    trainable = Trainable(model, shape, TrainerConfig(), lr=0.0)
    rl = RlConfig(group_size=given.candidates, beta=0.0, micro_batch_tokens=given.tokens, policy_space="trie")
    engine = RolloutEngine(MegatronLM(model, shape), load.catalog, RolloutConfig(), seed=0)
    begin = _clock(runtime.device().type == "cuda")
    options = generate_options(rl, step=0)
    rollout = engine.generate(load.prompt_batch(0), **options).to("cpu")
    took = _clock(runtime.device().type == "cuda") - begin
    ones_BG = torch.ones(rollout.items_BG.shape)
    actor = Actor(trainable, load.catalog, rl, DataParallel())
    packed = actor.pack(rollout, ones_BG, ones_BG)
    stats = actor.update(rollout, packed, ones_BG, ones_BG, None, lr=0.0)
    found = {name: stats[name] for name in ("mismatch_kl", "mismatch_prob_error", "ratio_mean")}
    found |= {"rollout_seconds": took, "prompts": given.prompts}
    if precision in FP8:
        wide = build_search_model(shape, model, replace(cfg, precision="bf16"))
        SharedWeights(model, wide)()
        engine = RolloutEngine(MegatronLM(wide, shape), load.catalog, RolloutConfig(), seed=0)
        shared, candidates = found_in_both(rollout, engine.generate(load.prompt_batch(0), **options).to("cpu"))
        found["mismatch_beam_overlap"] = shared / candidates
    require(found["mismatch_prob_error"] <= MISMATCH_TOLERANCE[precision], str(found))
    return found


# -- the machine ---------------------------------------------------------------------------------------------------
def nccl() -> dict[str, Any]:
    """doctor's all-reduce over one process per GPU (dry: two with gloo)."""
    from tawin_nemo.tools.doctor.all_reduce import all_reduce
    from tawin_nemo.tools.doctor.check import Status
    from tawin_nemo.tools.doctor.probe import probe

    found = probe(("torch",))
    seen = all_reduce(found, max(1, len(found.torch.gpus)), launched=False)
    require(seen.status == Status.OK, f"{seen.value}; {seen.remedy}")
    return {"says": seen.value}


def pytests() -> dict[str, Any]:
    """The pytest files of this folder that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_on_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    summary = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    require(done.returncode == 0, summary + done.stdout[-1500:])
    return {"says": summary}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "attention": attention,
    "bf16_vs_fp32": bf16_vs_fp32,
    **{f"train_{name}": partial(train, name) for name in ("bf16", *FP8)},
    **{f"mismatch_{name}": partial(mismatch, name) for name in ("bf16", *FP8)},
    "nccl": nccl,
    "pytest": pytests,
}
