"""The auxiliary recommender of section ``rollout.assist`` joins an engine's searches that are given histories.

Finished stages are evaluated with it, and so do ``evaluate``, ``generate`` and ``serve`` search. Training never does:
rollouts, mined negatives and the checks on valid are the model's own, so that ratios and early stopping mean the
policy that is trained.
"""

from __future__ import annotations

from tawin_nemo.baselines.assist import CatalogAssistant, load_auxiliary_recommender
from tawin_nemo.rollout.engine import Engine, RolloutEngine
from tawin_nemo.run.world import World


def add_assistant(world: World, engine: Engine) -> None:
    """Give ``engine`` the assistant of the recipe, if it names one. Raises ConfigError as its loading does."""
    recommender = load_auxiliary_recommender(world.recipe.rollout.assist, world.catalog.external_ids)
    if recommender is not None:
        assert isinstance(engine, RolloutEngine)  # config/checks.py
        engine.assistant = CatalogAssistant(recommender, world.catalog.trie)
