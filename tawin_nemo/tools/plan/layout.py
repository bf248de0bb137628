"""Layouts of a model over GPUs: which ones are possible, and which of those is nearest to a wrong one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tawin_nemo.config.backbones import Backbone, stage_layers
from tawin_nemo.config.gpus import NODE
from tawin_nemo.config.schema import Recipe


@dataclass(frozen=True)
class Layout:
    """Tensor-, pipeline- and data-parallel sizes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one model together."""
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"TP {self.tp} x PP {self.pp} x DP {self.dp}{', sequence parallel' if self.sequence_parallel else ''}"


def layout_on(gpus: int, tp: int, pp: int, *, sequence_parallel: bool) -> Layout:
    """The layout that fills ``gpus``; DP is rounded down where TP x PP does not divide them (``problems`` says so)."""
    return Layout(tp, pp, max(1, gpus // (tp * pp)), sequence_parallel)


def problems(shape: Backbone, layout: Layout, gpus: int) -> list[str]:
    """Why the layout is not possible, each with the key and the value; empty = it is possible."""
    tp, pp = layout.tp, layout.pp
    key = f"model.tensor_model_parallel_size={tp}"
    found = [
        f"{key} does not divide the {value} {what}"
        for what, value in (
            ("attention heads", shape.heads),
            ("key-value heads", shape.kv_heads),
            ("columns of the FFN", shape.ffn),
        )
        if value % tp
    ]
    if tp > NODE:
        found.append(f"{key} is more than the {NODE} GPUs of one node, and tensor parallelism needs their fast links")
    if not stage_layers(shape.layers, pp):
        found.append(
            f"model.pipeline_model_parallel_size={pp}: {shape.layers} layers cannot be spread over {pp} stages"
        )
    if gpus % layout.model_ranks:
        found.append(f"TP {tp} x PP {pp} = {layout.model_ranks} ranks do not divide {gpus} GPUs")
    if layout.sequence_parallel and tp == 1:
        found.append("model.sequence_parallel=true needs model.tensor_model_parallel_size > 1")
    return found


def rollout_layout(recipe: Recipe, training: Layout) -> Layout:
    """The layout of searches, on the GPUs of ``training`` or on ``rollout.devices`` others; the same object where the
    recipe asks for no other."""
    tp = recipe.rollout.tensor_model_parallel_size or training.tp
    pp = recipe.rollout.pipeline_model_parallel_size or training.pp
    if recipe.rollout.devices:
        return layout_on(recipe.rollout.devices, tp, pp, sequence_parallel=False)
    if (tp, pp) == (training.tp, training.pp):
        return training
    return layout_on(training.model_ranks * training.dp, tp, pp, sequence_parallel=False)


def rollout_problems(shape: Backbone, recipe: Recipe, training: Layout, gpus: int) -> list[str]:
    """Why searches cannot have the layout that the recipe gives them; empty = they can. ``gpus`` are those of
    training."""
    searching = rollout_layout(recipe, training)
    if searching is training:
        return []
    found = problems(shape, searching, recipe.rollout.devices or gpus)
    return [text.replace("model.", "rollout.") for text in found]


def possible(shape: Backbone, gpus: int) -> Iterator[Layout]:
    """Every possible layout, fewest model-parallel ranks first and tensor before pipeline parallelism, which idles
    at both ends of a step. Sequence parallelism is on wherever there is tensor parallelism: it only saves memory."""
    sizes = [(tp, pp) for tp in range(1, min(NODE, gpus) + 1) for pp in range(1, shape.layers + 1) if tp * pp <= gpus]
    for tp, pp in sorted(sizes, key=lambda size: (size[0] * size[1], size[1])):
        layout = layout_on(gpus, tp, pp, sequence_parallel=tp > 1)
        if not problems(shape, layout, gpus):
            yield layout


def distance(first: Layout, second: Layout) -> tuple[float, int]:
    """How far apart two layouts are: doublings of TP and PP between them, then model-parallel ranks of the second."""
    steps = abs(math.log2(second.tp / first.tp)) + abs(math.log2(second.pp / first.pp))
    return round(steps, 6), second.model_ranks


def padded_vocab(shape: Backbone, tp: int) -> int:
    """Vocabulary rows rounded up to a multiple of TP."""
    return -(-shape.vocab // tp) * tp
