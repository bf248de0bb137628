"""Combinations of ``model.lora`` with other keys that make no sense, each with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Iterator

from tawin_nemo.config.schema import Recipe


def lora_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    """(is wrong, message) of every combination of ``model.lora`` that makes no sense."""
    m, lora = r.model, r.model.lora
    if lora.rank == 0:
        return
    yield (
        not lora.target_modules or len(set(lora.target_modules)) < len(lora.target_modules),
        f"model.lora.target_modules={list(lora.target_modules)} must name one matrix or more, each once; leave it out "
        "for all of them, or set model.lora.rank=0",
    )
    yield (
        m.precision.startswith("fp8"),
        f"model.lora.rank={lora.rank} adds to products of fp32 and bf16 weights, but model.precision={m.precision}; "
        "set model.precision=bf16",
    )
    yield (
        r.eval.precision.startswith("fp8"),
        f"model.lora.rank={lora.rank} adds to products of fp32 and bf16 weights, but "
        f"eval.precision={r.eval.precision}; set eval.precision=model",
    )
    yield (
        r.rollout.precision.startswith("fp8"),
        f"model.lora.rank={lora.rank} adds to products of fp32 and bf16 weights, but "
        f"rollout.precision={r.rollout.precision}; set rollout.precision=model",
    )
    yield (
        m.freeze_backbone,
        f"model.lora.rank={lora.rank} trains adapters and model.freeze_backbone=true the rows of new tokens; train the "
        "rows first in a run of their own, then adapters with start=RUN_DIR/sft and model.freeze_backbone=false",
    )
    yield (
        r.reference.refresh != "off",
        f"model.lora.rank={lora.rank} takes the frozen weights as the reference, which cannot follow the policy, but "
        f"reference.refresh={r.reference.refresh}; set it to off",
    )
    yield (
        r.reference.precision not in ("model", m.precision),
        f"model.lora.rank={lora.rank} takes the frozen weights as the reference, in their own precision {m.precision}, "
        f"but reference.precision={r.reference.precision}; set it to model",
    )
