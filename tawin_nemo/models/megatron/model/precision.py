"""Number formats of the decoder's matrix products: what each needs, what megatron is told, how tokens are padded.

Embedding, LM head, norms and attention are computed in the format of the weights (float32, or bf16 under bf16 and FP8):
FP8 is for the four linear layers of a decoder layer, whose weights stay bf16 and are quantised in every pass
(Transformer Engine; "FP8 Formats for Deep Learning", arXiv 2209.05433). What the FP8 precisions need was read in
megatron-core 0.16.1 and Transformer Engine 2.11. Importing this module imports neither of them, nor torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import Any, Protocol

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, Recipe
from tawin_nemo.models.megatron.model.fused import FOREIGN_REMEDY, find_apex
from tawin_nemo.util.errors import ConfigError


@dataclass(frozen=True)
class Fp8:
    """``format`` and ``recipe`` in megatron's words; tokens of a pass are padded to a multiple of ``tokens``."""

    format: str
    recipe: str
    tokens: int


#: Products need multiples of 16 in every dimension; block scaling has a scale per 128 values, and gathers (sequence
#: parallelism) whole blocks only.
FP8 = {
    "fp8-blockwise": Fp8("e4m3", "blockwise", 128),
    "fp8-tensorwise": Fp8("hybrid", "tensorwise", 16),
    "fp8-delayed": Fp8("hybrid", "delayed", 16),
}
FEATURES, BLOCK = 16, 128
HOPPER = (9, 0)
#: Transformer Engine asks for this CUDA (torch's) before it scales by blocks.
BLOCKWISE_CUDA = (12, 9)
#: What megatron-core 0.16.1 names in its own requirements.
TRANSFORMER_ENGINE = ">=2.9,<2.12"
#: ``reference.precision`` and ``eval.precision``: that of ``model.precision``.
AS_MODEL = "model"


#: FP8 precisions that a committed run of tests/gpu has trained with; a test compares this with those run files.
VERIFIED: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Machine:
    """What decides whether FP8 can run; ``capability`` is that of the weakest GPU, None without one."""

    capability: tuple[int, int] | None = None
    gpu: str = ""
    cuda: str = ""  # of torch's build
    engine: str = ""  # version of Transformer Engine; empty = not installed
    engine_error: str = ""  # why it cannot be imported
    foreign_apex: str = ""  # where a package lies that only has the name of NVIDIA's apex


@dataclass(frozen=True)
class Lack:
    """Why a precision cannot run, and what to do about it."""

    reason: str
    remedy: str


def lack(precision: str, machine: Machine) -> Lack | None:
    """The first thing that ``machine`` lacks for ``precision``; None if it can run there."""
    if precision not in FP8:
        return None
    if machine.capability is None:
        return Lack(
            f"{precision} needs a CUDA device of compute capability 9.0 (Hopper) or newer; there is none here",
            "use bf16 or fp32",
        )
    if machine.capability < HOPPER:
        major, minor = machine.capability
        return Lack(
            f"{precision} needs compute capability 9.0 (Hopper: H100, H200, H800) or newer; "
            f"{machine.gpu or 'the GPU'} has {major}.{minor}",
            "use bf16",
        )
    install = f"pip install -r requirements-gpu.txt (Transformer Engine {TRANSFORMER_ENGINE}), or use bf16"
    if machine.engine_error:
        return Lack(f"{precision} needs Transformer Engine, whose import failed: {machine.engine_error}", install)
    if not machine.engine:
        return Lack(f"{precision} needs Transformer Engine, which is not installed", install)
    if not _supported(machine.engine):
        return Lack(
            f"{precision} needs Transformer Engine {TRANSFORMER_ENGINE} with megatron-core 0.16; "
            f"{machine.engine} is installed",
            install,
        )
    if machine.foreign_apex:
        reason = f"the package apex in {machine.foreign_apex} is an unrelated web toolkit, not NVIDIA's"
        return Lack(f"{precision} cannot run beside it: {reason}", FOREIGN_REMEDY)
    if precision == "fp8-blockwise" and _numbers(machine.cuda) < BLOCKWISE_CUDA:
        return Lack(f"fp8-blockwise needs CUDA 12.9 or newer; torch has {machine.cuda}", "use fp8-tensorwise or bf16")
    return None


def _supported(version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(TRANSFORMER_ENGINE).contains(version, prereleases=True)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


@cache
def this_machine() -> Machine:
    """The GPUs of this process, and Transformer Engine, which is imported here if a GPU is there to run it."""
    import torch

    if not torch.cuda.is_available():
        return Machine(cuda=torch.version.cuda or "")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    weakest = min(devices, key=lambda device: (device.major, device.minor))
    version, error = _engine()
    apex, cuda = find_apex(), torch.version.cuda or ""
    foreign = apex.folder if apex.foreign else ""
    return Machine((weakest.major, weakest.minor), weakest.name, cuda, version, error, foreign)


def _engine() -> tuple[str, str]:
    """Version and import error of Transformer Engine; a build for another torch or CUDA raises when it is imported."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "", ""
    try:
        module = importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        return "", f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        return metadata.version("transformer-engine"), ""
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "")), ""


def check(shape: Backbone, cfg: ModelConfig, machine: Machine | None = None) -> None:
    """Raises ConfigError where this model cannot be computed in ``cfg.precision``, here or on another ``machine``."""
    wanted = FP8.get(cfg.precision)
    if wanted is None:
        return
    lacking = lack(cfg.precision, machine or this_machine())
    if lacking is not None:
        raise ConfigError(f"model.precision={lacking.reason}: {lacking.remedy}")
    per_stage = shape.layers // cfg.pipeline_model_parallel_size
    for end in ("start", "end"):
        layers = getattr(cfg, f"num_layers_at_{end}_in_bf16")
        if layers > per_stage:
            raise ConfigError(
                f"model.num_layers_at_{end}_in_bf16={layers} is more than the {per_stage} layers of a pipeline stage "
                f"of {cfg.backbone}: use at most {per_stage}, or model.precision=bf16"
            )
    for what, size in _features(shape, cfg.tensor_model_parallel_size).items():
        if size % FEATURES:
            raise ConfigError(
                f"model.precision={cfg.precision} needs matrices whose sides are multiples of {FEATURES}; the {what} "
                f"of {cfg.backbone} under model.tensor_model_parallel_size={cfg.tensor_model_parallel_size} is {size}: "
                "use bf16, or another tensor-parallel size"
            )
    if wanted.tokens == BLOCK and cfg.sequence_parallel and shape.hidden % BLOCK:
        raise ConfigError(
            f"model.precision={cfg.precision} with model.sequence_parallel=true gathers blocks of {BLOCK}, and the "
            f"hidden width of {cfg.backbone} is {shape.hidden}: set model.sequence_parallel=false or use fp8-tensorwise"
        )


def _features(shape: Backbone, tp: int) -> dict[str, int]:
    """Both sides of the four matrices of a layer on one tensor-parallel rank."""
    heads = shape.heads * shape.kv_channels
    return {
        "hidden width": shape.hidden,
        "width of query, key and value": (heads + 2 * shape.kv_heads * shape.kv_channels) // tp,
        "width of the attention's output": heads // tp,
        "FFN width": shape.ffn // tp,
    }


def config_fields(cfg: ModelConfig) -> dict[str, Any]:
    """What ``TransformerConfig`` is told besides the types of weights and activations."""
    wanted = FP8.get(cfg.precision)
    if wanted is None:
        return {}
    first, last = cfg.num_layers_at_start_in_bf16, cfg.num_layers_at_end_in_bf16
    return {
        "fp8": wanted.format,
        "fp8_recipe": wanted.recipe,
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
        # Delayed scaling reduces its maxima over ranks in every pass; data-parallel ranks may run different numbers of
        # passes, so that only the ranks of one model may take part.
        "tp_only_amax_red": True,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        # Quantised weights would be kept from one training pass to the next: a search after an optimizer step, or a
        # reference that is swapped in, would then run the weights of the step before.
        "disable_parameter_transpose_cache": True,
    }


class _Layout(Protocol):
    """The fields of megatron's TransformerConfig that decide about padding."""

    tensor_model_parallel_size: int
    sequence_parallel: bool
    fp8: Any
    fp8_recipe: Any


def row_multiple(config: _Layout) -> int:
    """Tokens of a forward pass are padded to a multiple of this: every rank's share is one of FP8's, too."""
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    block = next((kind.tokens for kind in FP8.values() if kind.recipe == config.fp8_recipe), 1) if config.fp8 else 1
    return split * block


def in_precision(cfg: ModelConfig, wanted: str) -> ModelConfig:
    """The model of a reference or an evaluation that has a precision of its own (``AS_MODEL``: the same)."""
    return cfg if wanted == AS_MODEL else replace(cfg, precision=wanted)


def named_precisions(recipe: Recipe) -> dict[str, str]:
    """The precisions that parts of a run will use, by recipe key."""
    named = {"model.precision": recipe.model.precision}
    if recipe.eval.precision != AS_MODEL:
        named["eval.precision"] = recipe.eval.precision
    rl, preference = recipe.rl, recipe.preference
    refers = (rl.enabled and rl.beta > 0) or (preference.enabled and preference.uses_reference)
    if refers and recipe.reference.precision != AS_MODEL:
        named["reference.precision"] = recipe.reference.precision
    return named


def refuse(recipe: Recipe, machine: Machine | None = None) -> None:
    """Raises ConfigError, before anything is read or built, for a precision that this machine cannot compute in."""
    for key, name in named_precisions(recipe).items():
        lacking = lack(name, machine or this_machine()) if name in FP8 else None
        if lacking is not None:
            raise ConfigError(f"{key}={lacking.reason}: {lacking.remedy}")


def unverified(recipe: Recipe) -> list[str]:
    """What to say when a run starts: the FP8 precisions of the recipe that were never run on hardware."""
    return [
        f"{key}={name}: not verified on hardware (no run of tests/gpu with it is in recipes/results)"
        for key, name in named_precisions(recipe).items()
        if name in FP8 and name not in VERIFIED
    ]
