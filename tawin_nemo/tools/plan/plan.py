"""The plan of a recipe on some GPUs: is its layout possible, does it fit, what does a step cost, and what fits best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.gpus import Gpu
from tawin_nemo.config.layout import (
    Layout,
    distance,
    possible,
    problems,
    rollout_layout,
    rollout_problems,
    training_layout,
)
from tawin_nemo.config.schema import Recipe
from tawin_nemo.tools.plan.memory import GIB, Peak, parameters, peaks, resident, stage_parameters, swap_bytes
from tawin_nemo.tools.plan.nodes import NodeTimes, node_times
from tawin_nemo.tools.plan.timing import Rates, StepTime, preference_step, rl_step, sft_step
from tawin_nemo.tools.plan.work import Lengths, Numbers
from tawin_nemo.util.errors import ConfigError

#: Share of a GPU's memory that a plan leaves free: the allocator's gaps, padding of uneven rows, what is not modelled.
MARGIN = 0.10


@dataclass(frozen=True)
class Question:
    """What is planned: ``lengths`` are mean tokens, ``mfu`` the assumed share of the GPUs' peak."""

    recipe: Recipe
    shape: Backbone
    gpus: int
    gpu: Gpu
    lengths: Lengths
    mfu: float

    @property
    def training_gpus(self) -> int:
        """Those that do not only search."""
        return self.gpus - self.recipe.rollout.devices


@dataclass(frozen=True)
class Plan:
    """The answer for one layout; ``best`` is the layout that the planner would take (None: nothing fits)."""

    question: Question
    layout: Layout
    peaks: list[Peak]
    sft: StepTime | None
    rl: StepTime | None
    best: Layout | None
    notes: list[str]
    preference: StepTime | None = None
    more_nodes: NodeTimes | None = None

    @property
    def fullest(self) -> Peak:
        return max(self.peaks, key=lambda peak: peak.parts.total)

    @property
    def parameters(self) -> int:
        return parameters(self.question.shape)

    @property
    def parameters_per_rank(self) -> int:
        """Of the fullest pipeline stage."""
        return max(stage_parameters(self.question.shape, self.layout, stage) for stage in range(self.layout.pp))


def limit_bytes(gpu: Gpu) -> float:
    """What a plan may use of one GPU."""
    return (1.0 - MARGIN) * gpu.memory_gib * GIB


def needed(question: Question, layout: Layout) -> Peak:
    """The fullest moment of the fullest stage."""
    found = peaks(question.shape, question.recipe, layout, question.lengths)
    return max(found, key=lambda peak: peak.parts.total)


def fits(question: Question, layout: Layout) -> bool:
    return needed(question, layout).parts.total <= limit_bytes(question.gpu)


def usable(question: Question) -> Iterator[Layout]:
    """Possible layouts under which rollouts can have theirs, best first (fewest model-parallel ranks: most replicas,
    least communication)."""
    shape, recipe, gpus = question.shape, question.recipe, question.training_gpus
    return (layout for layout in possible(shape, gpus) if not rollout_problems(shape, recipe, layout, gpus))


def fitting(question: Question) -> list[Layout]:
    """The usable layouts that fit."""
    return [layout for layout in usable(question) if fits(question, layout)]


def make_plan(question: Question) -> Plan:
    """The plan of the recipe's own layout.

    Raises ConfigError when the layout is not possible or does not fit, with the nearest layout that does, and when the
    number of GPUs is not whole nodes or the GPU lacks the precision.
    """
    for precision in (question.recipe.model.precision, question.recipe.rollout_precision):
        question.gpu.peak_flops(precision)
    layout = training_layout(question.recipe, question.training_gpus)
    good = fitting(question)
    wrong = problems(question.shape, layout, question.training_gpus)
    wrong += rollout_problems(question.shape, question.recipe, layout, question.training_gpus)
    if wrong:
        raise ConfigError(f"{layout} is not possible: {'; '.join(wrong)}. {remedy(question, layout, good)}")
    fullest = needed(question, layout)
    if fullest.parts.total > limit_bytes(question.gpu):
        raise ConfigError(
            f"{layout} does not fit: {fullest.phase} needs {fullest.parts.total / GIB:.1f} GiB on pipeline stage "
            f"{fullest.stage} ({largest(fullest)}), and {limit_bytes(question.gpu) / GIB:.1f} of the "
            f"{question.gpu.memory_gib:g} GiB of an {question.gpu.name} may be used. "
            f"{remedy(question, layout, good)}"
        )
    rates = Rates(
        question.shape, layout, question.gpu, question.recipe.model.precision, question.mfu,
        question.recipe.model.recompute, question.recipe.trainer, question.recipe.model.lora,
    )  # fmt: skip
    recipe, lengths = question.recipe, question.lengths
    return Plan(
        question,
        layout,
        peaks(question.shape, question.recipe, layout, question.lengths),
        sft=sft_step(recipe, lengths, rates) if recipe.sft.enabled or recipe.compare.sft_all else None,
        rl=rl_step(recipe, lengths, rates) if recipe.rl.enabled else None,
        best=good[0] if good else None,
        notes=list(notes(question, layout)),
        preference=preference_step(recipe, lengths, rates) if recipe.preference.enabled else None,
        more_nodes=node_times(question, rates, fits),
    )


def largest(peak: Peak, count: int = 3) -> str:
    """The largest parts of a peak, in words."""
    parts = sorted(vars(peak.parts).items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name.replace('_', ' ')} {value / GIB:.1f}" for name, value in parts)


def remedy(question: Question, layout: Layout, good: list[Layout]) -> str:
    """The nearest layout that fits, as overrides, or what else could be changed."""
    if good:
        near = min(good, key=lambda other: distance(layout, other))
        return f"The nearest layout that fits: {near} ({overrides(near)})"
    possible_ones = list(usable(question))
    if not possible_ones:
        return f"No layout is possible on {question.training_gpus} GPUs with the recipe's layout of rollouts"
    least = min(possible_ones, key=lambda other: needed(question, other).parts.total)
    peak = needed(question, least)
    return (
        f"No layout fits on {question.training_gpus} x {question.gpu.name}; {least} comes nearest with "
        f"{peak.parts.total / GIB:.1f} GiB in {peak.phase} ({largest(peak)}). {SAVINGS[peak.phase]}"
    )


_UPDATE = "model.recompute=full, a lower {}.micro_batch_tokens, reference.mode=swap and more GPUs all save memory"
#: What to lower, by the phase that is too large.
SAVINGS = {
    "SFT update": _UPDATE.format("sft"),
    "preference update": _UPDATE.format("preference"),
    "RL update": _UPDATE.format("rl"),
    "rollout": "Lower rollout.token_budget, or set trainer.offload_optimizer=true or reference.mode=swap",
    "evaluation": "Lower eval.token_budget, or set trainer.offload_optimizer=true or reference.mode=swap",
}


def overrides(layout: Layout) -> str:
    """The recipe keys of a layout."""
    keys = [
        f"model.tensor_model_parallel_size={layout.tp}",
        f"model.pipeline_model_parallel_size={layout.pp}",
        f"model.sequence_parallel={str(layout.sequence_parallel).lower()}",
    ]
    return " ".join(keys)


def notes(question: Question, layout: Layout) -> list[str]:
    """What a reader should know about this plan."""
    recipe, found = question.recipe, []
    if recipe.rl.enabled and recipe.rl.prompts_per_step < layout.dp:
        found.append(
            f"rl.prompts_per_step={recipe.rl.prompts_per_step} is below the {layout.dp} replicas: "
            f"{layout.dp - recipe.rl.prompts_per_step} of them idle in RL"
        )
    groups = -(-recipe.preference.global_batch_size // recipe.preference.group_rows)
    if recipe.preference.enabled and groups < layout.dp:
        found.append(
            f"a step of preference optimisation has {groups} sharing groups for {layout.dp} replicas: "
            f"{layout.dp - groups} of them idle; raise preference.global_batch_size or lower preference.share_group"
        )
    searching = rollout_layout(recipe, layout)
    if recipe.rollout.devices:
        found.append(
            f"{question.training_gpus} GPUs train; {recipe.rollout.devices} others only roll out and evaluate, under "
            f"{searching}; {'both work at once' if recipe.rollout.ahead else 'either waits while the others work'}"
        )
    elif recipe.rollout.placement == "server":
        found.append(
            "rollouts and evaluation run on generation servers, whose memory is not counted; the time of a rollout is "
            "that of as many GPUs as train"
        )
    elif searching is not layout:
        found.append(f"rollouts and evaluation run under {searching}, with weights of their own")
    if recipe.rl.enabled and searching.pp > 1:
        found.append(
            "a search runs its pipeline stages one after the other: most of them idle during rollouts; "
            "rollout.pipeline_model_parallel_size=1 avoids that"
        )
    if recipe.rollout_precision != recipe.model.precision:
        found.append(f"rollouts run in {recipe.rollout_precision}, training in {recipe.model.precision}")
    if recipe.model.precision.startswith("fp8"):
        found.append("FP8 saves activations that are counted here at two bytes; not verified on hardware")
    if recipe.model.dropout:
        found.append("attention dropout on a CPU keeps a matrix of all token pairs, which is not counted")
    if recipe.trainer.offload_optimizer:
        numbers = Numbers.of(recipe.model.precision)
        away = max(resident(question.shape, recipe, layout, numbers, s).optimizer for s in range(layout.pp))
        found.append(f"the offloaded optimizer state takes {away / GIB:.1f} GiB of pinned CPU memory per process")
    swapped = swap_bytes(question.shape, recipe, layout)
    if swapped:
        found.append(f"the swapped reference takes {swapped / GIB:.1f} GiB of pinned CPU memory per process")
    return found
