"""BigRec's grounding (``eval.grounding``) with what a run knows: texts, tokenizer, template."""

from __future__ import annotations

from functools import partial

from tawin_nemo.data.special_tokens import encode_prompts
from tawin_nemo.eval.grounding import ground
from tawin_nemo.eval.measured import Measured
from tawin_nemo.rollout.engine import Engine, RolloutEngine
from tawin_nemo.run.world import World
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


def grounding_metrics(world: World, engine: Engine, split: str, label: str) -> Measured | None:
    """The full ranking by embeddings of free text on a split (``eval.grounding``), logged; None where it is off."""
    if world.recipe.eval.grounding == 0:
        return None
    assert isinstance(engine, RolloutEngine)  # config/checks.py
    result = ground(
        engine, world.samples[split], world.catalog, [world.template.answer(text) for text in world.item_texts],
        partial(encode_prompts, world.tokenizer), world.tokenizer.decode, world.recipe.eval,
        eos=world.tokenizer.eos_id, dp=world.dp, label=label,
    )  # fmt: skip
    log.info("%s grounded: %s", label, ", ".join(f"{name} {value:.4f}" for name, value in result.means.items()))
    return result
