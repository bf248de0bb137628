"""The model and the search engine behind ``checkpoint=``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.model.precision import AS_MODEL, in_precision
from tawin_nemo.placement.weight_sync import build_engine
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.world import World
from tawin_nemo.train.pipeline import named_checkpoint, starting_model


def engine_of(world: World) -> Engine:
    cfg = in_precision(world.recipe.model, world.recipe.eval.precision)
    model = checkpoint_model(world, world.recipe.eval.precision)
    recipe, known = replace(world.recipe, model=cfg), world.tokenizer.fingerprint
    engine = build_engine(recipe, model, world.shape, world.catalog, tokenizer=known)
    engine.receive_weights()
    return engine


def checkpoint_model(world: World, in_format: str = AS_MODEL) -> Any:
    """The model of ``checkpoint=``: a stage directory (its chosen step) or one step_N directory."""
    if not world.recipe.checkpoint:
        return starting_model(world, None, precision=in_format)
    recipe = world.recipe
    cfg = in_precision(recipe.model, in_format)
    model = build_model(
        world.shape, cfg, seed=recipe.seed, rollout_tp=recipe.rollout_layout[0], to_be_loaded=True
    )  # fmt: skip
    checkpoint.load_checkpoint(named_checkpoint(world.recipe, "checkpoint"), model=model)
    return model
