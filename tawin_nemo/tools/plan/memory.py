"""Memory of one rank by part and phase: what stays, and what the hungriest moment of each phase adds.

Weights in the precision's format; gradients in float32, or without ``trainer.grad_reduce_in_fp32`` in the weights'
format and, of the part that the rank's optimizer steps, in float32 as well; AdamW's two
moments in float32 and, unless the weights are float32 themselves, a float32 copy of the weights, all three divided over
the data-parallel ranks by the distributed optimizer. With ``model.lora`` that is so of the adapters alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from tawin_nemo.config.backbones import Backbone, stage_layers
from tawin_nemo.config.layout import Layout, padded_vocab, rollout_layout, training_layout
from tawin_nemo.config.lora import layer_parameters
from tawin_nemo.config.schema import LoraConfig, Recipe
from tawin_nemo.tools.plan.work import (
    Lengths,
    Numbers,
    Pass,
    backward_bytes,
    forward_bytes,
    head_bytes,
    preference_pass,
    rl_pass,
    saved_bytes,
    search_space,
    sft_pass,
    uses_reference,
)  # fmt: skip

GIB = 2.0**30
#: CUDA context, NCCL's and cuBLAS's buffers of one process. A rule of thumb, not measured here.
CONTEXT_BYTES = 2 * GIB


@dataclass(frozen=True)
class Parts:
    """Bytes of one rank at the fullest moment of a phase."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    reference: float = 0.0
    rollout_weights: float = 0.0  # where searches have another layout or precision than training
    activations: float = 0.0  # saved for the backward pass, all micro-batches under way
    working: float = 0.0  # passing tensors of one layer, as far as they exceed the logits, which come before
    logits: float = 0.0
    kv_cache: float = 0.0
    context: float = 0.0

    @property
    def total(self) -> float:
        return sum(float(getattr(self, item.name)) for item in fields(self))


@dataclass(frozen=True)
class Peak:
    """The fullest moment of ``phase`` and the pipeline stage (from 0) where it happens.

    ``ranks``: all, or with ``rollout.placement=separate`` those that train or those that search.
    """

    phase: str
    stage: int
    parts: Parts
    ranks: str = "all"


def stage_parameters(shape: Backbone, layout: Layout, stage: int) -> int:
    """Parameters of one rank of a pipeline stage (from 0), vocabulary padding included.

    Matrices are divided over TP, norms are not. The last stage holds the head; a tied head is the embedding itself on
    one stage and a second copy of it on several.
    """
    count = stage_layers(shape.layers, layout.pp)[stage] * shape.layer_parameters(layout.tp)
    vocabulary = padded_vocab(shape, layout.tp) // layout.tp * shape.hidden
    first, last = stage == 0, stage == layout.pp - 1
    count += vocabulary if first else 0
    count += vocabulary if last and not (first and shape.tied) else 0
    return count + (shape.hidden if last else 0)


def parameters(shape: Backbone) -> int:
    """Parameters of the whole model, without vocabulary padding."""
    return stage_parameters(shape, Layout(), 0)


def adapter_parameters(shape: Backbone, lora: LoraConfig, layout: Layout, stage: int) -> int:
    """Parameters of the adapters (``model.lora``) of one rank of a pipeline stage; 0 where the weights are trained."""
    return stage_layers(shape.layers, layout.pp)[stage] * layer_parameters(shape, lora, layout.tp)


def trained_parameters(shape: Backbone, lora: LoraConfig, layout: Layout, stage: int) -> int:
    """Parameters of one rank of a pipeline stage that are trained: its adapters, or all of them without any."""
    return adapter_parameters(shape, lora, layout, stage) or stage_parameters(shape, layout, stage)


def resident(shape: Backbone, recipe: Recipe, layout: Layout, numbers: Numbers, stage: int) -> Parts:
    """What a stage holds at all times while it trains; the reference is the caller's to add.

    With ``model.lora`` only the adapters have gradients and a state of the optimizer.
    """
    count, lora = stage_parameters(shape, layout, stage), recipe.model.lora
    adapters, trained = (of(shape, lora, layout, stage) for of in (adapter_parameters, trained_parameters))
    shards = layout.dp if recipe.trainer.distributed_optimizer else 1
    wide = recipe.trainer.grad_reduce_in_fp32 or numbers.bytes == 4
    cached = count * 2 if numbers.fp8 else 0  # Transformer Engine keeps the weights in FP8, and transposed
    return Parts(
        weights=(count + adapters) * numbers.bytes + cached,
        gradients=4 * trained if wide else numbers.bytes * trained + 4 * trained / shards,
        optimizer=(8 if numbers.bytes == 4 else 12) * trained / shards,
        context=CONTEXT_BYTES if numbers.device == "cuda" else 0.0,
    )


def least_rank_bytes(shape: Backbone, recipe: Recipe) -> float:
    """Bytes that the fullest training rank cannot do without: weights, gradients and its share of the optimizer."""
    layout, numbers = training_layout(recipe), Numbers.of(recipe.model.precision, device="cpu")
    return max(resident(shape, recipe, layout, numbers, stage).total for stage in range(layout.pp))


def least_machine_bytes(shape: Backbone, recipe: Recipe) -> float:
    """The same of all processes of one machine together, on average; rollout ranks hold their weights alone."""
    layout, numbers = training_layout(recipe), Numbers.of(recipe.model.precision, device="cpu")
    per_stage = [resident(shape, recipe, layout, numbers, stage).total for stage in range(layout.pp)]
    job = layout.tp * layout.dp * sum(per_stage)
    if recipe.rollout.devices:
        searching = rollout_layout(recipe, layout)
        numbers = Numbers.of(recipe.rollout_precision, device="cpu")
        per_stage = [resident(shape, recipe, searching, numbers, stage).weights for stage in range(searching.pp)]
        job += searching.tp * searching.dp * sum(per_stage)
    return job / recipe.trainer.num_nodes


def update_parts(
    shape: Backbone, layout: Layout, numbers: Numbers, work: Pass, *, recompute: str, stage: int, micro_batches: int
) -> Parts:
    """What forward and backward passes add. Of 1F1B's schedule, stage s of P holds min(P - s, micro-batches) forward
    passes at once (Narayanan et al. 2021, arXiv 2104.04473)."""
    last = stage == layout.pp - 1
    layers = stage_layers(shape.layers, layout.pp)[stage]
    under_way = min(layout.pp - stage, micro_batches)
    saved = saved_bytes(shape, layout, numbers, work, recompute=recompute, layers=layers, last=last)
    working = backward_bytes(shape, layout, numbers, work, recompute)
    logits = head_bytes(shape, layout, numbers, work) if last else 0.0
    # the head's backward ends before the layers' begins: of logits and working memory only the larger one is there
    return Parts(activations=under_way * saved, working=max(0.0, working - logits), logits=logits)


def search_parts(
    shape: Backbone, layout: Layout, numbers: Numbers, lengths: Lengths, *, budget: int, width: int, space: str,
    stage: int,
) -> Parts:  # fmt: skip
    """A beam search that fills its token budget: keys and values of all its tokens, and the prompts' forward pass.

    Prompts count once, their beams with all tokens they may come to.
    """
    last = stage == layout.pp - 1
    layers = stage_layers(shape.layers, layout.pp)[stage]
    per_token = 2 * layers * shape.kv_heads * shape.kv_channels / layout.tp * numbers.bytes
    per_prompt = lengths.prompt + width * lengths.run(space)
    prompts = max(1, budget // per_prompt)
    scored = Pass(0, scored=prompts * width, vocabulary=space == "vocab")
    share = shape.heads // shape.kv_heads
    mask = prompts * width * per_prompt * (1 + share * numbers.bytes)
    working = max(forward_bytes(shape, layout, numbers, prompts * lengths.prompt), mask)
    logits = head_bytes(shape, layout, numbers, scored, backward=False) if last else 0.0
    return Parts(kv_cache=per_token * budget, working=max(0.0, working - logits), logits=logits)


def updates(shape: Backbone, recipe: Recipe, layout: Layout, numbers: Numbers, lengths: Lengths, stage: int) -> (
    Iterator[tuple[str, Parts]]
):  # fmt: skip
    """What each kind of update that the recipe runs adds on a stage."""
    recompute, rl = recipe.model.recompute, recipe.rl
    if recipe.sft.enabled or recipe.compare.sft_all:
        rows = -(-recipe.sft.global_batch_size // layout.dp)
        work = sft_pass(recipe, lengths)
        yield "SFT update", update_parts(
            shape, layout, numbers, work, recompute=recompute, stage=stage,
            micro_batches=micro_batches(rows, work.keys, work.tokens),
        )  # fmt: skip
    if recipe.preference.enabled:
        rows = -(-recipe.preference.global_batch_size // layout.dp)
        work = preference_pass(recipe, lengths)
        plain = Numbers(numbers.bytes, numbers.fp8, numbers.device)  # without dropout
        yield "preference update", update_parts(
            shape, layout, plain, work, recompute=recompute, stage=stage,
            micro_batches=micro_batches(rows, work.keys, work.tokens),
        )  # fmt: skip
    if rl.enabled:
        rows = -(-rl.prompts_per_step // layout.dp)
        work = rl_pass(recipe, lengths)
        plain = Numbers(numbers.bytes, numbers.fp8, numbers.device)  # RL runs without dropout
        yield "RL update", update_parts(
            shape, layout, plain, work, recompute=recompute, stage=stage,
            micro_batches=micro_batches(rows, work.keys, work.tokens),
        )  # fmt: skip


def searches(shape: Backbone, recipe: Recipe, layout: Layout, numbers: Numbers, lengths: Lengths, stage: int) -> (
    Iterator[tuple[str, Parts]]
):  # fmt: skip
    """What rollouts and evaluation add on a stage of the layout that searches."""
    if recipe.rl.enabled:
        plain = Numbers(numbers.bytes, numbers.fp8, numbers.device)  # RL runs without dropout
        yield "rollout", search_parts(
            shape, layout, plain, lengths, budget=recipe.rollout.token_budget,
            width=recipe.rollout.width or recipe.rl.group_size, space=search_space(recipe), stage=stage,
        )  # fmt: skip
    yield "evaluation", search_parts(
        shape, layout, numbers, lengths, budget=recipe.eval.token_budget, width=recipe.eval.beams,
        space=recipe.rollout.score_space, stage=stage,
    )  # fmt: skip


def rollout_weights(shape: Backbone, recipe: Recipe, layout: Layout) -> float:
    """Bytes of the second set of weights, of the fullest stage, where searches have another layout or precision on the
    ranks of training. bf16 and FP8 share one set in the same layout, to which FP8 adds its quantised weights."""
    searching = rollout_layout(recipe, layout)
    if recipe.rollout.devices or recipe.rollout.placement == "server":
        return 0.0
    own, trained = Numbers.of(recipe.rollout_precision), Numbers.of(recipe.model.precision)
    if searching is layout and recipe.rollout_precision == recipe.model.precision:
        return 0.0
    count = max(stage_parameters(shape, searching, stage) for stage in range(searching.pp))
    copied = 0 if searching is layout and own.bytes == trained.bytes else own.bytes
    return float(count * (copied + (1 if own.fp8 else 0)))


def micro_batches(rows: int, tokens_per_row: int, budget: int) -> int:
    """Micro-batches of a replica's ``rows`` rows: whole rows under the budget, one at least each."""
    return -(-rows // max(1, budget // tokens_per_row))


def peaks(shape: Backbone, recipe: Recipe, layout: Layout, lengths: Lengths, *, device: str = "cuda") -> list[Peak]:
    """The fullest stage of every phase. The reference lies on the device in RL only, and not with mode=swap, which
    keeps it in CPU memory. Of searches in another layout on the ranks of training, the last stage counts."""
    numbers = Numbers.of(recipe.model.precision, device=device, dropout=recipe.model.dropout)
    fullest: dict[str, Peak] = {}
    apart, searching = recipe.rollout.devices > 0, rollout_layout(recipe, layout)
    rolling = Numbers.of(recipe.rollout_precision, device=device, dropout=recipe.model.dropout)
    for stage in range(layout.pp):
        base = resident(shape, recipe, layout, numbers, stage)
        copied = uses_reference(recipe) and recipe.reference.mode == "copy" and not recipe.model.lora.rank
        phases = list(updates(shape, recipe, layout, numbers, lengths, stage))
        if not apart and recipe.rollout.placement != "server":
            search_stage = stage if searching is layout else searching.pp - 1
            phases += searches(shape, recipe, searching, rolling, lengths, search_stage)
        for phase, extra in phases:
            reference = base.weights if copied and phase != "SFT update" else 0.0
            trains = 0.0 if recipe.trainer.offload_optimizer and phase in ("rollout", "evaluation") else 1.0
            parts = Parts(
                weights=base.weights, gradients=trains * base.gradients, optimizer=trains * base.optimizer,
                context=base.context,
                reference=reference, rollout_weights=rollout_weights(shape, recipe, layout),
                activations=extra.activations, working=extra.working, logits=extra.logits,
                kv_cache=extra.kv_cache,
            )  # fmt: skip
            if phase not in fullest or parts.total > fullest[phase].parts.total:
                fullest[phase] = Peak(phase, stage, parts, "training" if apart else "all")
    if apart:
        fullest |= _peaks_apart(shape, recipe, searching, rolling, lengths)
    return list(fullest.values())


def _peaks_apart(
    shape: Backbone, recipe: Recipe, layout: Layout, numbers: Numbers, lengths: Lengths
) -> dict[str, Peak]:
    """The fullest stage of every search on ranks that hold nothing but the weights that search."""
    fullest: dict[str, Peak] = {}
    for stage in range(layout.pp):
        base = resident(shape, recipe, layout, numbers, stage)
        for phase, extra in searches(shape, recipe, layout, numbers, lengths, stage):
            parts = replace(extra, weights=base.weights, context=base.context)
            if phase not in fullest or parts.total > fullest[phase].parts.total:
                fullest[phase] = Peak(phase, stage, parts, "rollout")
    return fullest


def swap_bytes(shape: Backbone, recipe: Recipe, layout: Layout) -> float:
    """CPU memory of one rank (the fullest stage) for a reference that is swapped in; 0 without one.

    The reference of adapters is the model without them.
    """
    if not uses_reference(recipe) or recipe.reference.mode != "swap" or recipe.model.lora.rank:
        return 0.0
    bytes_per_weight = Numbers.of(recipe.model.precision).bytes
    return float(max(stage_parameters(shape, layout, stage) for stage in range(layout.pp)) * bytes_per_weight)
