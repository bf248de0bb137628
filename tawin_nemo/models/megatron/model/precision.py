"""Number formats of the decoder's matrix products: what each needs, how megatron is configured, padding of tokens.

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
from tawin_nemo.config.schema import AS_MODEL, ModelConfig, Recipe
from tawin_nemo.models.megatron.model.fused import FOREIGN_REMEDY, INSTALL_GPU, find_apex
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
#: FP8 precisions that a committed run of tests/gpu has trained with; a test compares this with those run files.
VERIFIED: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that decide whether FP8 is supported.

    ``capability`` is the compute capability (major, minor) of the weakest GPU, None without a GPU.
    """

    capability: tuple[int, int] | None = None
    gpu: str = ""
    cuda: str = ""  # of torch's build
    engine: str = ""  # version of Transformer Engine; empty = not installed
    engine_error: str = ""  # why it cannot be imported
    foreign_apex: str = ""  # folder of an unrelated package that is also called apex


@dataclass(frozen=True)
class Unsupported:
    """Why a precision is not supported on a machine, and the remedy to print."""

    reason: str
    remedy: str


def unsupported_reason(precision: str, machine: Machine) -> Unsupported | None:
    """The first requirement of ``precision`` that ``machine`` does not meet; None where it is supported."""
    if precision not in FP8:
        return None
    if machine.capability is None:
        return Unsupported(
            f"{precision} needs a CUDA device of compute capability 9.0 (Hopper) or newer; there is none here",
            "use bf16 or fp32",
        )
    if machine.capability < HOPPER:
        major, minor = machine.capability
        return Unsupported(
            f"{precision} needs compute capability 9.0 (Hopper: H100, H200, H800) or newer; "
            f"{machine.gpu or 'the GPU'} has {major}.{minor}",
            "use bf16",
        )
    install = f"{INSTALL_GPU} (Transformer Engine {TRANSFORMER_ENGINE}), or use bf16"
    if machine.engine_error:
        return Unsupported(
            f"{precision} needs Transformer Engine, whose import failed: {machine.engine_error}", install
        )
    if not machine.engine:
        return Unsupported(f"{precision} needs Transformer Engine, which is not installed", install)
    if not _supported(machine.engine):
        return Unsupported(
            f"{precision} needs Transformer Engine {TRANSFORMER_ENGINE} with megatron-core 0.16; "
            f"{machine.engine} is installed",
            install,
        )
    if machine.foreign_apex:
        reason = f"the package apex in {machine.foreign_apex} is an unrelated web toolkit, not NVIDIA's"
        return Unsupported(f"{precision} cannot run beside it: {reason}", FOREIGN_REMEDY)
    if precision == "fp8-blockwise" and _numbers(machine.cuda) < BLOCKWISE_CUDA:
        return Unsupported(
            f"fp8-blockwise needs CUDA 12.9 or newer; torch has {machine.cuda}", "use fp8-tensorwise or bf16"
        )
    return None


def _supported(version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(TRANSFORMER_ENGINE).contains(version, prereleases=True)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


@cache
def this_machine() -> Machine:
    """The properties of this process's machine. Imports Transformer Engine where a GPU is available."""
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
    """Version and import error of Transformer Engine; importing a build for another torch or CUDA fails."""
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


def check_engine_import() -> None:
    """Raises ConfigError when Transformer Engine is installed in part; call it before megatron is imported.

    megatron-core 0.16 takes ``import transformer_engine`` for proof that all of it is there, and then imports
    ``transformer_engine.pytorch`` unguarded: a core without its torch extension, or one that was built for another
    torch, ends every run at import, also in bf16.
    """
    there = importlib.util.find_spec("transformer_engine") is not None
    for module in ("transformer_engine", "transformer_engine.pytorch") if there else ():
        try:
            importlib.import_module(module)
        except Exception as error:
            if module == "transformer_engine" and isinstance(error, ImportError):
                return  # megatron then does without it
            raise _broken(module, error) from error


def _broken(module: str, error: Exception) -> ConfigError:
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    return ConfigError(
        f"Transformer Engine is installed in part: import {module} fails with {said}, and megatron-core cannot be "
        f"imported beside it. {INSTALL_GPU} builds it for this torch; pip uninstall transformer_engine "
        "transformer_engine_torch transformer_engine_cu12 transformer_engine_cu13 removes it (bf16 does not need it)"
    )


def check_model_supported(
    shape: Backbone, cfg: ModelConfig, machine: Machine | None = None, *, section: str = "model"
) -> None:
    """Raises ConfigError when ``cfg.precision`` is not supported for this model on ``machine`` (None: this one).

    ``section`` is that of the recipe whose precision and layout ``cfg`` has: model or rollout.
    """
    wanted = FP8.get(cfg.precision)
    if wanted is None:
        return
    unsupported = unsupported_reason(cfg.precision, machine or this_machine())
    if unsupported is not None:
        raise ConfigError(f"{section}.precision={unsupported.reason}: {unsupported.remedy}")
    name, per_stage = f"{section}.precision={cfg.precision}", shape.layers // cfg.pipeline_model_parallel_size
    for end in ("start", "end"):
        layers = getattr(cfg, f"num_layers_at_{end}_in_bf16")
        if layers > per_stage:
            raise ConfigError(
                f"model.num_layers_at_{end}_in_bf16={layers} is more than the {per_stage} layers of a pipeline stage "
                f"of {cfg.backbone}: use at most {per_stage}, or {section}.precision=bf16"
            )
    for what, size in _features(shape, cfg.tensor_model_parallel_size).items():
        if size % FEATURES:
            raise ConfigError(
                f"{name} needs matrices whose sides are multiples of {FEATURES}; the {what} of {cfg.backbone} under "
                f"{section}.tensor_model_parallel_size={cfg.tensor_model_parallel_size} is {size}: use bf16, or "
                "another tensor-parallel size"
            )
    if wanted.tokens == BLOCK and cfg.sequence_parallel and shape.hidden % BLOCK:
        raise ConfigError(
            f"{name} with model.sequence_parallel=true gathers blocks of {BLOCK}, and the "
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
    """Arguments of megatron's ``TransformerConfig`` for FP8; empty for bf16 and fp32."""
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
    """The number of tokens of a forward pass is padded to a multiple of this.

    The share of every sequence-parallel rank is then a multiple of what FP8 products need.
    """
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    block = next((kind.tokens for kind in FP8.values() if kind.recipe == config.fp8_recipe), 1) if config.fp8 else 1
    return split * block


def in_precision(cfg: ModelConfig, wanted: str) -> ModelConfig:
    """``cfg`` with precision ``wanted`` (of rollouts, the reference or the evaluation); unchanged for ``AS_MODEL``."""
    return cfg if wanted == AS_MODEL else replace(cfg, precision=wanted)


def named_precisions(recipe: Recipe) -> dict[str, str]:
    """Recipe key -> precision, for every part of the run that computes."""
    named = {"model.precision": recipe.model.precision}
    if recipe.rollout.precision != AS_MODEL and recipe.rollout.placement != "server":  # servers check their own
        named["rollout.precision"] = recipe.rollout.precision
    if recipe.eval.precision != AS_MODEL:
        named["eval.precision"] = recipe.eval.precision
    rl, preference = recipe.rl, recipe.preference
    refers = (rl.enabled and rl.beta > 0) or (preference.enabled and preference.uses_reference)
    if refers and recipe.reference.precision != AS_MODEL:
        named["reference.precision"] = recipe.reference.precision
    return named


def check_supported(recipe: Recipe, machine: Machine | None = None) -> None:
    """Raises ConfigError when ``machine`` (None: this one) does not support a precision of the recipe.

    Call it before any data is read or any model is built.
    """
    for key, name in named_precisions(recipe).items():
        unsupported = unsupported_reason(name, machine or this_machine()) if name in FP8 else None
        if unsupported is not None:
            raise ConfigError(f"{key}={unsupported.reason}: {unsupported.remedy}")


def unverified(recipe: Recipe) -> list[str]:
    """Warnings to log at start-up: the FP8 precisions of the recipe that were never run on hardware."""
    new = {key: name for key, name in named_precisions(recipe).items() if name in FP8 and name not in VERIFIED}
    reason = "not verified on hardware (no run of tests/gpu with it is in recipes/results)"
    return [f"{key}={name}: {reason}" for key, name in new.items()]
