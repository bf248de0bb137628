"""At which batch another node helps: step times on 1, 2 and 4 nodes, by the batch of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from tawin_nemo.config.gpus import NODE
from tawin_nemo.config.layout import Layout, problems, rollout_problems
from tawin_nemo.config.schema import Recipe
from tawin_nemo.tools.plan.timing import Rates, StepTime, preference_step, rl_step, sft_step
from tawin_nemo.tools.plan.work import Lengths

if TYPE_CHECKING:
    from tawin_nemo.tools.plan.plan import Question

NODES = (1, 2, 4)
#: Twice as many nodes help from the batch on at which they make a step this much faster: 80 % of the ideal.
HELPS = 1.6
#: Batches of the table, in batches of the recipe.
FACTORS = (1, 4, 16, 64)
#: Larger batches are not looked at.
LARGEST = 2**20


@dataclass(frozen=True)
class NodeTimes:
    """``seconds[batch]``: of a step with that value of the recipe's ``key``, by entry of ``nodes``.

    ``helps_from[n]``: the smallest batch at which n nodes are ``HELPS`` times as fast as half as many, None for none.
    """

    key: str
    nodes: tuple[int, ...]
    seconds: dict[int, tuple[float, ...]]
    helps_from: dict[int, int | None]


@dataclass(frozen=True)
class _Stage:
    """The stage whose batch the table is about."""

    key: str
    batch: int
    with_batch: Callable[[int], Recipe]
    step: Callable[[Recipe, Lengths, Rates], StepTime]


def node_times(question: Question, rates: Rates, fits: Callable[[Question, Layout], bool]) -> NodeTimes | None:
    """The table for the layout of ``rates``, with more or fewer replicas.

    Only numbers of nodes on which the layout ``fits``. None for less than a whole node, for ranks that only search
    (their number would have to change as well), and where fewer than two numbers of nodes fit.
    """
    if question.gpus < NODE or question.recipe.rollout.devices:
        return None
    stage = _stage(question.recipe)
    layouts = {nodes: replace(rates.layout, dp=nodes * NODE // rates.layout.model_ranks) for nodes in NODES}
    usable = tuple(nodes for nodes in NODES if _possible(question, layouts[nodes], nodes * NODE, fits))
    if stage is None or len(usable) < 2:
        return None

    def seconds(batch: int, nodes: int) -> float:
        recipe = stage.with_batch(batch)
        return stage.step(recipe, question.lengths, replace(rates, layout=layouts[nodes])).total

    def helps(nodes: int, batch: int) -> bool:
        return seconds(batch, nodes // 2) / seconds(batch, nodes) >= HELPS

    batches = [factor * stage.batch for factor in FACTORS]
    table = {batch: tuple(seconds(batch, nodes) for nodes in usable) for batch in batches}
    more = [nodes for nodes in usable if nodes // 2 in usable]
    smallest = {nodes: _smallest(partial(helps, nodes), layouts[nodes].dp) for nodes in more}
    return NodeTimes(stage.key, usable, table, smallest)


def _possible(question: Question, layout: Layout, gpus: int, fits: Callable[[Question, Layout], bool]) -> bool:
    other = replace(question, gpus=gpus)
    wrong = problems(other.shape, layout, gpus) or rollout_problems(other.shape, other.recipe, layout, gpus)
    return not wrong and fits(other, layout)


def _stage(r: Recipe) -> _Stage | None:
    """RL where the recipe has it, else the last stage before."""
    if r.rl.enabled:
        rl = r.rl
        return _Stage(
            "rl.prompts_per_step", rl.prompts_per_step,
            lambda batch: replace(r, rl=replace(rl, prompts_per_step=batch)), rl_step,
        )  # fmt: skip
    if r.preference.enabled:
        preference = r.preference
        return _Stage(
            "preference.global_batch_size", preference.global_batch_size,
            lambda batch: replace(r, preference=replace(preference, global_batch_size=batch)), preference_step,
        )  # fmt: skip
    sft = r.sft
    return _Stage(
        "sft.global_batch_size", sft.global_batch_size,
        lambda batch: replace(r, sft=replace(sft, global_batch_size=batch)), sft_step,
    ) if sft.enabled else None  # fmt: skip


def _smallest(helps: Callable[[int], bool], step: int) -> int | None:
    """The smallest multiple of ``step`` at which more nodes help, by doubling and halving; None up to ``LARGEST``."""
    high = step
    while not helps(high):
        high *= 2
        if high > LARGEST:
            return None
    low = high // 2
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (low, middle) if helps(middle) else (middle, high)
    return high
