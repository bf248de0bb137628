"""The model and the search engine behind ``checkpoint=``."""

from __future__ import annotations

from typing import Any

from tawin_nemo.models.megatron.model.precision import AS_MODEL
from tawin_nemo.placement.weight_sync import build_engine
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.world import World
from tawin_nemo.train.start import starting_model


def engine_of(world: World) -> Engine:
    """An engine with the weights of ``checkpoint`` in ``eval.precision``, ready to search."""
    precision, tokenizer = world.recipe.eval.precision, world.tokenizer.fingerprint
    model = checkpoint_model(world, precision)
    engine = build_engine(
        world.recipe, model, world.shape, world.catalog, tokenizer=tokenizer, precision=precision
    )  # fmt: skip
    engine.receive_weights()
    return engine


def checkpoint_model(world: World, precision: str = AS_MODEL) -> Any:
    """The model of ``checkpoint``, a stage directory (its chosen step) or one step_N directory; where that key is
    empty, what a run would start from."""
    return starting_model(world, None, checkpoint_path=world.recipe.checkpoint, precision=precision)
