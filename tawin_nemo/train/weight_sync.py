"""Give the rollout engine the actor's newest weights, and say which version they are.

Where rollouts have the training layout they read the actor's own parameters: nothing is copied, only the version is
raised. Where they have their own (``rollout.tensor_model_parallel_size``, ``rollout.pipeline_model_parallel_size``)
the engine has a model of its own, into which the weights are resharded in memory. The engine stamps every rollout with
the version, and the actor refuses a rollout of another one, so that stale weights cannot go unnoticed.
"""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel

from tawin_nemo.backbones import Backbone
from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config import Recipe
from tawin_nemo.errors import TawinError
from tawin_nemo.log import get_logger
from tawin_nemo.models.megatron.build import build_rollout_model
from tawin_nemo.models.megatron.groups import rollout_replicas
from tawin_nemo.models.megatron.lm import MegatronLM
from tawin_nemo.models.megatron.refit import Refit
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.metered import MeteredLM
from tawin_nemo.types import Rollout

log = get_logger(__name__)


def build_engine(recipe: Recipe, model: GPTModel, shape: Backbone, catalog: Catalog) -> RolloutEngine:
    """An engine that searches with the weights of ``model``: in place, or under the rollout layout of the recipe.

    In the second case the engine's weights are undefined until its first ``receive_weights``. Raises ConfigError when
    the model's shape cannot be divided that way.
    """
    settings, trained = recipe.rollout, recipe.model
    layout = recipe.rollout_layout
    if layout == (trained.tensor_model_parallel_size, trained.pipeline_model_parallel_size):
        return RolloutEngine(MeteredLM(MegatronLM(model, shape)), catalog, settings, seed=recipe.seed)
    searching, dp = build_rollout_model(shape, trained, *layout), rollout_replicas(*layout)
    log.info("rollouts and evaluation under TP %d x PP %d x DP %d, with weights of their own", *layout, dp.size)
    return RolloutEngine(
        MeteredLM(MegatronLM(searching, shape)), catalog, settings, seed=recipe.seed,
        dp=dp, receive_weights=Refit(model, searching),
    )  # fmt: skip


def sync_weights(engine: RolloutEngine, *, version: int) -> None:
    """Bring the engine's weights up to date, as ``version``. Raises TawinError when the version would go backwards."""
    if version < engine.weight_version:
        raise TawinError(f"weight version {version} is older than the rollout engine's {engine.weight_version}")
    engine.receive_weights()
    engine.weight_version = version


def check_equal(engine: RolloutEngine) -> None:
    """Raises TawinError unless the engine's weights are, tensor by tensor, the actor's; every rank calls it."""
    if isinstance(engine.receive_weights, Refit):
        engine.receive_weights.check_equal()


def check_version(rollout: Rollout, expected: int) -> None:
    """Raises TawinError when a rollout was made with other weights than the actor's."""
    if rollout.weight_version != expected:
        raise TawinError(f"rollout of weight version {rollout.weight_version} reached an actor at version {expected}")
