"""Layouts of a model over processes: the one place that says which are possible, for training and for rollouts.

The recipe's checks, the model builder, ``plan`` and ``doctor`` call it. Tensor parallelism (TP) divides every layer,
pipeline parallelism (PP) the list of layers; data parallelism (DP) is the number of replicas that the processes hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tawin_nemo.config.backbones import Backbone, stage_layers
from tawin_nemo.config.gpus import NODE
from tawin_nemo.config.schema import Recipe
from tawin_nemo.util.errors import ConfigError

SEQUENCE_PARALLEL_NEEDS_TP = "model.sequence_parallel=true needs model.tensor_model_parallel_size > 1"


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

    def divides(self, processes: int) -> bool:
        """Whether ``processes`` hold a whole number of models."""
        return processes % self.model_ranks == 0

    @property
    def sequence_parallel_alone(self) -> bool:
        """Whether sequence parallelism has no TP ranks to divide the sequence between, which is an error."""
        return self.sequence_parallel and self.tp == 1

    def __str__(self) -> str:
        return f"TP {self.tp} x PP {self.pp} x DP {self.dp}{', sequence parallel' if self.sequence_parallel else ''}"


@dataclass(frozen=True)
class Problem:
    """One reason why a shape cannot have a layout: recipe key, its value, and the values that are possible."""

    key: str
    value: int
    reason: str
    possible: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.key}={self.value}{self.reason}"


def layout_on(processes: int, tp: int, pp: int, *, sequence_parallel: bool = False) -> Layout:
    """The layout that fills ``processes``; DP is rounded down where TP x PP does not divide them."""
    return Layout(tp, pp, max(1, processes // (tp * pp)), sequence_parallel)


def training_layout(recipe: Recipe, processes: int = 0) -> Layout:
    """The layout of the processes that train, on ``processes`` of them instead of the recipe's where that is given."""
    model = recipe.model
    return layout_on(
        processes or recipe.training_processes, model.tensor_model_parallel_size, model.pipeline_model_parallel_size,
        sequence_parallel=model.sequence_parallel,
    )  # fmt: skip


def rollout_layout(recipe: Recipe, training: Layout) -> Layout:
    """The layout of rollouts and evaluation, on the processes of ``training`` or on ``rollout.devices`` others; the
    same object where the recipe asks for no other."""
    tp = recipe.rollout.tensor_model_parallel_size or training.tp
    pp = recipe.rollout.pipeline_model_parallel_size or training.pp
    if recipe.rollout.devices:
        return layout_on(recipe.rollout.devices, tp, pp)
    if (tp, pp) == (training.tp, training.pp):
        return training
    return layout_on(training.model_ranks * training.dp, tp, pp)


def shape_problems(shape: Backbone, layout: Layout, section: str = "model", *, name: str = "") -> Iterator[Problem]:
    """Why a model of this shape cannot have this layout.

    ``section`` is that of the recipe: model or rollout. ``name`` is the backbone's, for the text.
    """
    of = f" of {name}" if name else ""
    divided = {"attention heads": shape.heads, "key-value heads": shape.kv_heads, "FFN width": shape.ffn}
    sizes = tuple(n for n in range(1, shape.kv_heads + 1) if not any(size % n for size in divided.values()))
    for what, size in divided.items():
        if size % layout.tp:
            reason = f" does not divide the {size} {what}{of}"
            yield Problem(f"{section}.tensor_model_parallel_size", layout.tp, reason, sizes)
    if not stage_layers(shape.layers, layout.pp):
        stages = tuple(n for n in range(1, shape.layers + 1) if stage_layers(shape.layers, n))
        reason = f": the {shape.layers} layers{of} cannot be spread over so many stages"
        yield Problem(f"{section}.pipeline_model_parallel_size", layout.pp, reason, stages)


def check_shape(shape: Backbone, layout: Layout, *, name: str, section: str = "model") -> None:
    """Raises ConfigError where a model of this shape cannot have this layout. ``name`` is that of the backbone."""
    for problem in shape_problems(shape, layout, section, name=name):
        raise ConfigError(f"{problem}: use one of {', '.join(map(str, problem.possible))}")


def problems(shape: Backbone, layout: Layout, gpus: int, section: str = "model") -> list[str]:
    """Why ``gpus`` GPUs cannot run a model of this shape under this layout, each reason with its key and value."""
    found = [str(problem) for problem in shape_problems(shape, layout, section)]
    if layout.tp > NODE:
        found.append(
            f"{section}.tensor_model_parallel_size={layout.tp} is more than the {NODE} GPUs of one node, and tensor "
            "parallelism needs their fast links"
        )
    if not layout.divides(gpus):
        found.append(f"TP {layout.tp} x PP {layout.pp} = {layout.model_ranks} ranks do not divide {gpus} GPUs")
    return found + ([SEQUENCE_PARALLEL_NEEDS_TP] if layout.sequence_parallel_alone else [])


def rollout_problems(shape: Backbone, recipe: Recipe, training: Layout, gpus: int) -> list[str]:
    """Why rollouts cannot have the layout that the recipe gives them. ``gpus`` are those of training."""
    searching = rollout_layout(recipe, training)
    return [] if searching is training else problems(shape, searching, recipe.rollout.devices or gpus, "rollout")


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


def padded_vocab(shape: Backbone, *tensor_parallel_sizes: int) -> int:
    """Vocabulary rows rounded up to a multiple of the TP sizes; rows from ``shape.vocab`` on are never scored."""
    multiple = math.lcm(*tensor_parallel_sizes)
    return -(-shape.vocab // multiple) * multiple
