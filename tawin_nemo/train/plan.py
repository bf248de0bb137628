"""The stages of a run, their rows and steps. Imports no megatron, so that a dry run is fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tawin_nemo.config.schema import PreferenceConfig, RlConfig
from tawin_nemo.run.world import World


@dataclass(frozen=True)
class Plan:
    """One stage: its directory name, the stage whose weights it starts from (None = model.init), its rows."""

    name: str
    start: str | None
    rows: np.ndarray
    kind: str  # zero_shot | sft | preference | rl


def plans(world: World) -> Iterator[Plan]:
    """The stages that the recipe asks for, in order."""
    recipe = world.recipe
    fresh = world.train_rows_for_rl
    rl_start = None if recipe.rl.init == "base" else recipe.rl.init
    if recipe.compare.zero_shot:
        yield Plan("zero_shot", None, np.zeros(0, dtype=np.int64), "zero_shot")
    if recipe.sft.enabled:
        yield Plan("sft", None, world.train_rows_for_sft, "sft")
    if recipe.preference.enabled:
        start = "sft" if recipe.preference.init == "sft" else None
        yield Plan("preference", start, world.train_rows_for_preference, "preference")
    if recipe.rl.enabled:
        if recipe.compare.sft_continued and rl_start == "sft":
            yield Plan("sft_continued", rl_start, fresh, "sft")
        yield Plan("rl", rl_start, fresh, "rl")
    if recipe.compare.sft_all:
        yield Plan("sft_all", None, world.all_rows, "sft")


def total_steps(rl: RlConfig, rows: int) -> int:
    """Steps of a run: ``rl.max_steps``, or what ``rl.epochs`` passes over ``rows`` need at most."""
    return rl.max_steps or max(1, round(rl.epochs * rows / min(rl.prompts_per_step, rows)))


def preference_steps(cfg: PreferenceConfig, rows: int) -> int:
    """Steps of preference optimisation: ``preference.max_steps``, or what ``preference.epochs`` needs over ``rows``."""
    return cfg.max_steps or max(1, round(cfg.epochs * rows / min(cfg.global_batch_size, rows)))
