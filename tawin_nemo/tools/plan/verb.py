"""The verb ``plan``: options and a recipe in; a plan out, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tawin_nemo.config.backbones import Backbone, backbone, stage_layers, with_vocab
from tawin_nemo.config.gpus import NODE, gpu
from tawin_nemo.config.layout import Layout, padded_vocab, rollout_layout
from tawin_nemo.config.load import check, check_values, read_recipe
from tawin_nemo.config.lora import check_lora
from tawin_nemo.config.schema import Recipe
from tawin_nemo.tools.plan.memory import GIB, Parts
from tawin_nemo.tools.plan.nodes import HELPS
from tawin_nemo.tools.plan.plan import Plan, Question, limit_bytes, make_plan, overrides
from tawin_nemo.tools.plan.timing import DEFAULT_MFU, LAUNCH_S, StepTime
from tawin_nemo.tools.plan.work import default_lengths
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.hub import local_folder

HELP = f"""\
tawin-nemo plan --recipe F [--gpus N] [--gpu h800] [option=value ...] [key=value ...]

Memory per GPU by part and phase, what a step costs, from which batch another node helps, and the best layout; a layout
that is not possible or does not fit is refused with the nearest one that does (exit code 2). Needs no GPU and starts no
training. Lines that begin with "unverified" say what was never compared with a GPU.

options:
  gpus=N             GPUs in all (default: trainer.num_nodes x trainer.devices); above {NODE} a multiple of {NODE}
  gpu=NAME           h800 (default), h100, h200, a100, a100-40
  mfu=X              share of the peak that matrix products reach (default {DEFAULT_MFU:g}: an assumption, see
                     mfu/update in timings.jsonl of a run)
  prompt_tokens=N    mean tokens of a prompt, path_tokens=N of an item with its end, decision_tokens=N of an item up to
                     its last choice in the trie (defaults: 256, 29, 4 for titles; 96, 5, 4 for semantic IDs)
"""

#: Reads config.json of a Hugging Face folder; the layer above hands it in.
ReadShape = Callable[[Path], Backbone]
OPTIONS = ("gpus", "gpu", "mfu", "prompt_tokens", "path_tokens", "decision_tokens")


@dataclass(frozen=True)
class Options:
    """What is asked besides the recipe; 0 = not given."""

    gpus: int = 0
    gpu: str = "h800"
    mfu: float = DEFAULT_MFU
    prompt_tokens: int = 0
    path_tokens: int = 0
    decision_tokens: int = 0


def split_options(words: Sequence[str]) -> tuple[Options, list[str]]:
    """The planner's own options, and what is left for the recipe. Raises ConfigError for values out of limits."""
    mine = {word.split("=", 1)[0]: word.split("=", 1)[1] for word in words if word.split("=", 1)[0] in OPTIONS
            and "=" in word}  # fmt: skip
    rest = [word for word in words if word.split("=", 1)[0] not in OPTIONS or "=" not in word]
    mfu = _number("mfu", mine.get("mfu", str(DEFAULT_MFU)), float)
    if not 0.0 < mfu <= 1.0:
        raise ConfigError(f"mfu={mfu:g} must lie between 0 and 1; {DEFAULT_MFU:g} is the default")
    counts = {}
    for name in ("gpus", "prompt_tokens", "path_tokens", "decision_tokens"):
        counts[name] = int(_number(name, mine[name], int)) if name in mine else 0
        if name in mine and counts[name] < 1:
            raise ConfigError(f"{name}={counts[name]} must be 1 or more")
    return Options(gpu=mine.get("gpu", "h800"), mfu=mfu, **counts), rest


def _number(name: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{name}={text} is not a number; write for example {name}=8") from None


def plan_recipe(path: str | Path | None, words: Sequence[str], read_shape: ReadShape) -> Plan:
    """The plan of a recipe file with options and overrides. Raises ConfigError as ``make_plan``, ``load_recipe`` do."""
    options, keys = split_options(words)
    recipe = read_recipe(path, keys)
    if recipe.baseline.model != "off":
        raise ConfigError(f"baseline.model={recipe.baseline.model} needs one device; plan is for baseline.model=off")
    check_values(recipe)
    trainer = recipe.trainer
    gpus = options.gpus or trainer.num_nodes * trainer.devices
    if gpus > NODE and gpus % NODE:
        named = "" if options.gpus else f" (trainer.num_nodes={trainer.num_nodes} x trainer.devices={trainer.devices})"
        raise ConfigError(
            f"gpus={gpus}{named} is not a whole number of nodes of {NODE}; use {gpus // NODE * NODE} or "
            f"{(gpus // NODE + 1) * NODE}"
        )
    check(_without_layout(recipe))
    if recipe.rollout.devices >= gpus:
        raise ConfigError(
            f"rollout.devices={recipe.rollout.devices} of {gpus} GPUs would only search: none is left to train; lower "
            "rollout.devices or raise gpus="
        )
    shape = recipe_shape(recipe, read_shape)
    check_lora(shape, recipe.model.lora)
    usual = default_lengths(recipe)
    lengths = replace(
        usual,
        prompt=options.prompt_tokens or usual.prompt,
        path=options.path_tokens or usual.path,
        decisions=min(options.decision_tokens or usual.decisions, options.path_tokens or usual.path),
    )
    return make_plan(Question(recipe, shape, gpus, gpu(options.gpu), lengths, options.mfu))


def _without_layout(recipe: Recipe) -> Recipe:
    """The recipe on one process, or one per side: whether its layout is right is the planner's to say."""
    apart = min(1, recipe.rollout.devices)
    return replace(
        recipe,
        model=replace(
            recipe.model, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, sequence_parallel=False
        ),
        trainer=replace(recipe.trainer, num_nodes=1, devices=1 + apart),
        rollout=replace(recipe.rollout, tensor_model_parallel_size=0, pipeline_model_parallel_size=0, devices=apart),
    )


def recipe_shape(recipe: Recipe, read_shape: ReadShape) -> Backbone:
    """The shape in ``model.init`` if that is here, also in the hub's cache, else the named backbone; the vocabulary of
    backbones for a CPU is the tokenizer's."""
    folder = local_folder(recipe.model.init, recipe.model.revision)
    found = recipe.model.init != "random" and folder.is_dir()
    shape = read_shape(folder) if found else backbone(recipe.model.backbone)
    return shape if shape.vocab else with_vocab(shape, recipe.data.bpe_vocab_size)


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
        *_more_nodes(plan),
        *_unverified(plan),
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


def _more_nodes(plan: Plan) -> list[str]:
    """Step times by batch and number of nodes, and from which batch on twice as many nodes help."""
    times = plan.more_nodes
    if times is None:
        return []
    heads = [f"{nodes} node{'s' * (nodes > 1)}" for nodes in times.nodes]
    lines = [f"more nodes  {times.key:>{len(times.key)}}" + "".join(f"{head:>10}" for head in heads) + "  (s a step)"]
    for batch, seconds in times.seconds.items():
        lines.append(f"{'':12}{batch:>{len(times.key)}}" + "".join(f"{value:>10.3g}" for value in seconds))
    for nodes, smallest in times.helps_from.items():
        fewer = f"{nodes // 2} node{'s' * (nodes > 2)}"
        lines.append(
            f"{'':12}{nodes} nodes are {HELPS:g} times as fast as {fewer} "
            + (f"from {times.key}={smallest} on" if smallest else "at no batch")
        )
    return lines


def _unverified(plan: Plan) -> list[str]:
    """What of this plan was never compared with a GPU."""
    lines = ["unverified  memory was compared with processes on a CPU, never with a GPU"]
    if plan.sft or plan.preference or plan.rl:
        lines.append(
            "unverified  no time was compared with a GPU: launches were counted on a pretended device, "
            f"{LAUNCH_S * 1e6:g} us a launch and MFU {plan.question.mfu:g} are assumed, links run as data sheets say"
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
        **({"preference_step": _step_facts(plan.preference)} if plan.preference is not None else {}),
        "rl_step": _step_facts(plan.rl),
        "more_nodes": None if plan.more_nodes is None else asdict(plan.more_nodes),
        "never_compared_with_a_gpu": [
            "memory_bytes",
            *(f"{name}_step" for name in ("sft", "preference", "rl") if getattr(plan, name) is not None),
            *(["more_nodes"] if plan.more_nodes is not None else []),
        ],
        "notes": plan.notes,
    }  # fmt: skip


def _layout_facts(layout: Layout) -> dict[str, Any]:
    return {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "sequence_parallel": layout.sequence_parallel}


def _step_facts(step: StepTime | None) -> dict[str, Any] | None:
    if step is None:
        return None
    return {"flops": step.flops, "seconds": round(step.total, 4),
            "phases": {phase: round(seconds, 4) for phase, seconds in step.seconds.items()}}  # fmt: skip
