"""The verb train: the whole pipeline of stages, or a report of what it would run."""

from __future__ import annotations

from typing import Any

from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.world import World
from tawin_nemo.train.extension import extensions
from tawin_nemo.train.plan import plans, preference_steps, total_steps
from tawin_nemo.train.requirements import check_requirements


def train(world: World, *, dry_run: bool = False) -> dict[str, Any]:
    """Run the whole pipeline, or with ``dry_run`` only report its stages and sizes.

    Raises ConfigError, before anything is trained, for what a later stage would refuse.
    """
    longer = runtime.on_rank_0(lambda: extensions(world))
    check_requirements(world, [extension.stage for extension in longer])
    if not dry_run:
        from tawin_nemo.train.pipeline import run_pipeline  # megatron and more: seconds that a dry run does not need

        return run_pipeline(world)
    rl, body, preference = world.recipe.rl, world.shape.body_parameters, world.recipe.preference
    steps = preference_steps(preference, len(world.train_rows_for_preference)) if preference.enabled else 0
    return {
        "dry_run": True,
        "run_dir": str(world.run_dir),
        "items": len(world.catalog.titles),
        "stages": {plan.name: len(plan.rows) for plan in plans(world)},
        "rl_steps": total_steps(rl, len(world.train_rows_for_rl)) if rl.enabled else 0,
        **({"preference_steps": steps} if preference.enabled else {}),
        **({"continues": {part.stage: part.keys for part in longer}} if longer else {}),
        "body_parameters": body,
        "embedding_parameters": world.shape.vocab * world.shape.hidden * (1 if world.shape.tied else 2),
        "prompt_tokens_max": world.samples["train"].prompts.longest,
    }
