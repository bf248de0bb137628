"""The candidate protocol (``eval.candidates``) with what a run knows: texts, tokenizer, seed."""

from __future__ import annotations

from tawin_nemo.eval.candidates import evaluate_candidates
from tawin_nemo.eval.measured import Measured
from tawin_nemo.rollout.engine import Engine, RolloutEngine
from tawin_nemo.run.world import World
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


def candidate_metrics(world: World, engine: Engine, split: str, label: str) -> Measured | None:
    """The candidate protocol on a split (``eval.candidates``), logged; None where it is off."""
    if world.recipe.eval.candidates == 0:
        return None
    assert isinstance(engine, RolloutEngine)  # config/checks.py
    result = evaluate_candidates(
        engine, world.samples[split], world.catalog, world.item_texts, world.tokenizer.decode, world.recipe.eval,
        eos=world.tokenizer.eos_id, seed=world.recipe.seed, dp=world.dp, label=label,
    )  # fmt: skip
    log.info("%s among candidates: %s", label, ", ".join(f"{name} {value:.4f}" for name, value in result.means.items()))
    return result
