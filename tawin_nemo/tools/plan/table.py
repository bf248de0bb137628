"""A plan for people (aligned text) and for programs (plain facts)."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from tawin_nemo.config.backbones import Backbone, stage_layers
from tawin_nemo.config.gpus import NODE
from tawin_nemo.tools.plan.layout import Layout, padded_vocab, rollout_layout
from tawin_nemo.tools.plan.memory import GIB, Parts
from tawin_nemo.tools.plan.plan import Plan, limit_bytes, overrides
from tawin_nemo.tools.plan.timing import StepTime


def plan_table(plan: Plan) -> str:
    """Several lines; memory in GiB of the fullest rank in each phase."""
    question, layout = plan.question, plan.layout
    shape, gpu = question.shape, question.gpu
    lines = [
        f"{question.recipe.model.backbone} on {question.gpus} x {gpu.name} ({gpu.memory_gib:g} GiB, "
        f"{gpu.peak_flops(question.recipe.model.precision) / 1e12:g} TFLOP/s in {question.recipe.model.precision})",
        f"layout      {layout}; {_layers(shape, layout)} layers per stage",
        f"divided     {shape.heads // layout.tp} heads, {shape.kv_heads // layout.tp} key-value heads, "
        f"{shape.ffn // layout.tp} FFN columns, {padded_vocab(shape, layout.tp) // layout.tp} vocabulary rows "
        f"({padded_vocab(shape, layout.tp) - shape.vocab} of padding in all) per rank",
        f"parameters  {plan.parameters / 1e9:.3f} B, {plan.parameters_per_rank / 1e9:.3f} B on the fullest rank",
        f"lengths     {question.lengths.prompt} tokens a prompt, {question.lengths.path} an item, "
        f"{question.lengths.decisions} of them up to its last choice (prompt_tokens= path_tokens= decision_tokens=)",
        "",
        *_memory(plan),
        "",
        *_times(plan),
    ]
    if plan.best and (plan.best.tp, plan.best.pp) != (layout.tp, layout.pp):
        lines.append(f"best        {plan.best}: fewest model-parallel ranks that fit ({overrides(plan.best)})")
    else:
        lines.append("best        this layout: fewest model-parallel ranks that fit")
    return "\n".join([*lines, *(f"note        {text}" for text in plan.notes)])


def _layers(shape: Backbone, layout: Layout) -> str:
    """One number where all stages hold equally many, else each stage's."""
    spread = stage_layers(shape.layers, layout.pp)
    return str(spread[0]) if len(set(spread)) == 1 else " + ".join(map(str, spread))


def _memory(plan: Plan) -> list[str]:
    names = [item.name for item in fields(Parts)]
    apart = any(peak.ranks != "all" for peak in plan.peaks)
    columns = [[peak.phase, *(_gib(getattr(peak.parts, name)) for name in names)] for peak in plan.peaks]
    columns = [
        [*column, f"{peak.parts.total / GIB:.2f}", str(peak.stage), *([peak.ranks] if apart else [])]
        for column, peak in zip(columns, plan.peaks, strict=True)
    ]
    first = [
        "GiB per GPU",
        *(name.replace("_", " ") for name in names),
        "total",
        "on pipeline stage",
        *(["on ranks of"] if apart else []),
    ]
    widths = [max(len(cell) for cell in column) for column in columns]
    rows = [
        f"{label:18}" + "".join(f"  {column[i]:>{width}}" for column, width in zip(columns, widths, strict=True))
        for i, label in enumerate(first)
    ]
    question = plan.question
    most = limit_bytes(question.gpu) / GIB
    return [*rows, f"fits: {plan.fullest.parts.total / GIB:.1f} of {most:.1f} GiB that may be used"]


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}" if value else "-"


def _times(plan: Plan) -> list[str]:
    lines = []
    for name, step in (("SFT step", plan.sft), ("preference step", plan.preference), ("RL step", plan.rl)):
        if step is not None:
            parts = ", ".join(f"{phase} {seconds:.3g}" for phase, seconds in step.seconds.items())
            lines.append(
                f"{name:10}  {step.flops / 1e12:.4g} TFLOP, {step.total:.3g} s at MFU {plan.question.mfu:g} ({parts})"
            )
    return lines


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The JSON object of the last line: bytes, FLOP, seconds."""
    question = plan.question
    return {
        "backbone": question.recipe.model.backbone,
        "gpus": question.gpus,
        "nodes": max(1, question.gpus // NODE),
        "gpu": question.gpu.name,
        "gpu_memory_gib": question.gpu.memory_gib,
        "layout": _layout_facts(plan.layout),
        "rollout_layout": _layout_facts(rollout_layout(question.recipe, plan.layout)),
        "best": _layout_facts(plan.best) if plan.best else None,
        "parameters": plan.parameters,
        "parameters_per_rank": plan.parameters_per_rank,
        "memory_bytes": {
            peak.phase: {**{name: round(value) for name, value in asdict(peak.parts).items()},
                         "total": round(peak.parts.total), "stage": peak.stage, "ranks": peak.ranks}
            for peak in plan.peaks
        },
        "peak_gib": round(plan.fullest.parts.total / GIB, 2),
        "usable_gib": round(limit_bytes(question.gpu) / GIB, 2),
        "mfu": question.mfu,
        "lengths": asdict(question.lengths),
        "sft_step": _step_facts(plan.sft),
        "rl_step": _step_facts(plan.rl),
        **({"preference_step": _step_facts(plan.preference)} if plan.preference is not None else {}),
        "notes": plan.notes,
    }  # fmt: skip


def _layout_facts(layout: Layout) -> dict[str, Any]:
    return {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "sequence_parallel": layout.sequence_parallel}


def _step_facts(step: StepTime | None) -> dict[str, Any] | None:
    if step is None:
        return None
    return {"flops": step.flops, "seconds": round(step.total, 4),
            "phases": {phase: round(seconds, 4) for phase, seconds in step.seconds.items()}}  # fmt: skip
