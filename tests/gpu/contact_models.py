"""Parts of ``first_contact.sh`` on models larger than 0.5B, with the profiler's counts of launches and waits."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import BACKBONES, Backbone
from tawin_nemo.config.schema import RolloutConfig, TrainerConfig
from tawin_nemo.models.megatron.decode.lm import Cache, MegatronLM
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.run.mfu import training_flops
from tawin_nemo.tools.plan.verb import plan_recipe
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError
from tests.gpu import parts
from tests.gpu.contact_common import clock, on_gpu
from tests.gpu.workload import Sizes, Workload, is_dry, sizes

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def of_size(backbone: str, **changes: Any) -> Sizes:
    """The usual sizes with another model (dry: the tiny one)."""
    given = sizes()
    return replace(given, shape=given.shape if is_dry() else BACKBONES[backbone], **changes)


def random_model(shape: Backbone) -> GPTModel:
    """bf16 weights drawn on the device: only the vocabulary's are drawn on the host, which takes minutes at 7B."""
    model = build_model(shape, parts.start("bf16"), seed=1, to_be_loaded=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(0.0 if parameter.shape[0] % shape.hidden else 1.0)
    return model


def launches(work: Callable[[], object]) -> dict[str, Any]:
    """Kernel launches, host waits and copies of one call, by the profiler; host operations only without a real GPU.

    ``device_busy``: the kernels' share of the call's time; the rest are gaps in which the GPU waits for the host.
    """
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
    begin = clock()
    with profile(activities=kinds) as seen:
        work()
        ended = clock()
    events = seen.key_averages()
    counts = {event.key: event.count for event in events}
    busy = sum(getattr(event, "self_device_time_total", 0.0) for event in events) / 1e6

    def total(*names: str) -> int:
        return sum(count for key, count in counts.items() if any(name in key for name in names))

    return {
        "launches": total("cudaLaunchKernel", "cuLaunchKernel"), "waits": total("Synchronize"),
        "copies": total("cudaMemcpyAsync"), "operations": total("aten::"), "device_busy": busy / (ended - begin),
    }  # fmt: skip


def rollout(model: GPTModel, load: Workload, step: int, lm: MegatronLM | None = None) -> None:
    """Beam search for the prompts of a step."""
    given = load.sizes
    engine = RolloutEngine(lm or MegatronLM(model, given.shape), load.catalog, RolloutConfig(), seed=0)
    engine.generate(load.prompt_batch(step), given.candidates, negatives="beam", policy_space="trie", step=step)


@dataclass
class Calls:
    """Seconds and number of calls, by method."""

    seconds: dict[str, float] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, begin: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + clock() - begin
        self.count[name] = self.count.get(name, 0) + 1


class TimedLM(MegatronLM):
    """Waits for the device around every call, so that each one's time is its own."""

    def __init__(self, model: GPTModel, shape: Backbone) -> None:
        super().__init__(model, shape)
        self.calls = Calls()

    def prefill(self, prompts: TokenRows) -> Cache:
        begin = clock()
        cache = super().prefill(prompts)
        self.calls.add("prefill", begin)
        return cache

    def extend(self, cache: Cache, parent_R: Tensor, chains: TokenRows) -> Cache:
        begin = clock()
        cache = super().extend(cache, parent_R, chains)
        self.calls.add("extend", begin)
        return cache

    def logprobs(self, cache: Cache, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        begin = clock()
        logp_E = super().logprobs(cache, row_N, position_E, token_E, space)
        self.calls.add("logprobs", begin)
        return logp_E


def decode_7b() -> dict[str, Any]:
    """Milliseconds of a search and of its model calls, at 2, 8 and 32 prompts; launches and waits of the smallest."""
    model = random_model(of_size("qwen2.5-7b").shape).eval()
    result: dict[str, Any] = {}
    for prompts in (2, 4) if is_dry() else (2, 8, 32):
        given = of_size(
            "qwen2.5-7b", prompts=prompts, rows=6 * prompts, prompt_tokens=(5, 20) if is_dry() else (60, 355)
        )
        load, whole, lm = Workload(given), [], TimedLM(model, given.shape)
        rollout(model, load, 0)  # libraries load their kernels
        for step in (1, 2, 3):
            begin = clock()
            rollout(model, load, step)
            whole.append(1e3 * (clock() - begin))
        begin = clock()
        rollout(model, load, 4, lm)
        total, calls = clock() - begin, lm.calls
        per_call = {name: 1e3 * seconds / calls.count[name] for name, seconds in calls.seconds.items()}
        rest = total - sum(calls.seconds.values())
        result[f"{prompts} prompts"] = {
            "search_ms": statistics.median(whole),
            "ms_per_call": per_call,
            "calls": calls.count,
            "select_ms": 1e3 * rest,
        }
        if "search" not in result:
            counted = launches(partial(rollout, model, load, 5))
            result["search"] = counted | {"synchronising": _syncs(model, load)}
    return result


def _syncs(model: GPTModel, load: Workload) -> int:
    """Operations that make the host wait in one search, as torch's own debug mode counts them."""
    if not on_gpu():
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rollout(model, load, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in said)


def graphs() -> dict[str, Any]:
    """Searches with 256 beams below 1,000 tokens over 100,000 items of three codes, usual form against CUDA graphs.

    Milliseconds of the first search, which captures, and the median of five later ones; share of equal items.
    """
    items, beams, tokens = (60, 4, 12) if is_dry() else (100_000, 256, 1000)
    shape, draw = of_size("qwen3-1.7b").shape, np.random.default_rng(0)
    model, codes = random_model(shape).eval(), min(256, (shape.vocab - 1) // 3)
    paths = TokenRows.from_lists(list(1 + draw.integers(0, codes, (items, 3)) + codes * np.arange(3)))
    names = [str(item) for item in range(items)]
    catalog, result = Catalog(names, names, "sid", paths, TokenTrie.from_paths(paths)), {}
    for prompts in (1, 8):
        rows = TokenRows.from_lists(list(draw.integers(1, shape.vocab, (prompts, tokens))))
        found: dict[str, Tensor] = {}
        for mode in ("off", "on"):
            cfg = RolloutConfig(cuda_graphs=mode)
            search = partial(RolloutEngine(MegatronLM(model, shape), catalog, cfg, seed=0).search, rows, beams)
            seconds = []
            for _ in range(6):
                begin = clock()
                found[mode] = search().items_BW
                seconds.append(clock() - begin)
            result[f"{prompts} prompts, graphs {mode}"] = {
                "first_ms": 1e3 * seconds[0], "search_ms": 1e3 * statistics.median(seconds[1:]), **launches(search)
            }  # fmt: skip
        result[f"{prompts} prompts, equal items"] = float((found["on"] == found["off"]).float().mean())
    return result


def update_3b() -> dict[str, Any]:
    """Forward and backward of the 3B model at 450, 2,000 and 8,000 tokens: milliseconds, MFU, peak memory by plan."""
    given = of_size("qwen2.5-3b")
    trainable = Trainable(random_model(given.shape), given.shape, TrainerConfig(), lr=1e-5)
    result: dict[str, Any] = {}
    for prompts in (2, 4) if is_dry() else (2, 9, 36):  # about 226 tokens a prompt with its tree
        load = Workload(replace(given, prompts=prompts, rows=5 * prompts, tokens=16384))
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        rows = []
        for step in range(5):
            micro = list(load.micro_batches(step))
            begin = clock()
            trainable.accumulate(micro)
            seconds, batches = clock() - begin, [part.batch for part in micro]
            rows.append((seconds, sum(len(b.tokens_S) for b in batches), training_flops(batches, given.shape)))
        seconds, tokens, flops = rows[0][0], *(sum(column) for column in list(zip(*rows[1:], strict=True))[1:])
        rate = flops / sum(row[0] for row in rows[1:])
        result[f"{prompts} prompts"] = {
            "tokens": tokens / 4, "first_ms": 1e3 * seconds, "ms": 1e3 * statistics.median(row[0] for row in rows[1:]),
            **parts._mfu("bf16", rate, on_gpu()),
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu() else None,
        }  # fmt: skip
    del trainable
    gc.collect()
    return {**result, "plan_gib": _planned()}


def _planned() -> float | None:
    """What ``plan`` says about RL of the 3B model on one H200, without a reference."""
    words = ["gpus=1", "gpu=h200", "trainer.devices=1", "rl.beta=0", "reference.mode=off"]
    try:
        plan = plan_recipe(RECIPES / "tawin_qwen3b.yaml", words, lambda folder: BACKBONES["qwen2.5-3b"])
    except ConfigError:
        return None
    return plan.fullest.parts.total / 2**30
