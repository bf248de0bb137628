"""Weight synchronisation: builds the rollout engine and updates its weights to the actor's, with a version.

Rollouts in the training layout use the actor's own parameters: nothing is copied, only the version is raised. Rollouts
in another layout (``rollout.tensor_model_parallel_size``, ``rollout.pipeline_model_parallel_size``) or on their own
ranks (``rollout.placement: separate``) have their own model, into which the weights are resharded in memory. Generation
servers (``rollout.placement: server``) receive whole tensors through a process group. The engine stamps every rollout
with the version, and a rollout of an unexpected version is rejected, so that stale weights cannot go unnoticed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import build_rollout_model
from tawin_nemo.models.megatron.model.precision import AS_MODEL, in_precision
from tawin_nemo.models.megatron.model.reshard import Refit
from tawin_nemo.models.megatron.parallel import disaggregated
from tawin_nemo.models.megatron.parallel.groups import rollout_replicas
from tawin_nemo.placement.remote_engine import RemoteEngine
from tawin_nemo.placement.server_engine import ServerEngine
from tawin_nemo.rollout.engine import Engine, RolloutEngine
from tawin_nemo.rollout.lm import MeteredLM
from tawin_nemo.types import Rollout
from tawin_nemo.util.errors import TawinError
from tawin_nemo.util.log import get_logger

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

log = get_logger(__name__)


def build_engine(
    recipe: Recipe, model: GPTModel, shape: Backbone, catalog: Catalog, *, tokenizer: str = "",
    precision: str = AS_MODEL,
) -> Engine:  # fmt: skip
    """An engine that searches with the weights of ``model``, where and in the layout that the recipe says.

    That is in the training processes with the model itself or with a resharded copy, on the rollout ranks, or on
    generation servers, whose tokenizer must have the fingerprint ``tokenizer``. ``precision``: that of ``model``, where
    it differs from the recipe's. Unless the engine uses the model itself, its weights are undefined until its first
    ``receive_weights``. Raises ConfigError when the model's shape does not fit the layout or a server does not match,
    ServersLost when no server is available.
    """
    recipe = replace(recipe, model=in_precision(recipe.model, precision))  # engines build their models from it
    if recipe.rollout.placement == "server":
        return ServerEngine(recipe, model, shape, catalog, tokenizer=tokenizer)
    if disaggregated.is_disaggregated():
        return RemoteEngine(recipe, model, shape, catalog)
    trained = recipe.model
    if recipe.rollout_layout == (trained.tensor_model_parallel_size, trained.pipeline_model_parallel_size):
        return RolloutEngine(MeteredLM(MegatronLM(model, shape)), catalog, recipe.rollout, seed=recipe.seed)
    engine, _ = engine_with_own_model(recipe, model, shape, catalog)
    return engine


def engine_with_own_model(
    recipe: Recipe, source: GPTModel | None, shape: Backbone, catalog: Catalog
) -> tuple[RolloutEngine, GPTModel]:
    """An engine in the rollout layout and its model, whose weights are resharded from ``source``.

    ``source`` is None on a rollout rank, whose weights come from the training ranks.
    """
    layout = recipe.rollout_layout
    searching, dp = build_rollout_model(shape, recipe.model, *layout), rollout_replicas(*layout)
    log.info("rollouts and evaluation under TP %d x PP %d x DP %d, with weights of their own", *layout, dp.size)
    lm = MeteredLM(MegatronLM(searching, shape))
    refit = Refit(source, searching)
    return RolloutEngine(lm, catalog, recipe.rollout, seed=recipe.seed, dp=dp, receive_weights=refit), searching


def sync_weights(engine: Engine, *, version: int) -> None:
    """Update the engine's weights and set their ``version``. Raises TawinError when the version would decrease."""
    if version < engine.weight_version:
        raise TawinError(f"weight version {version} is older than the rollout engine's {engine.weight_version}")
    engine.receive_weights()
    engine.weight_version = version


def check_equal(engine: Engine) -> None:
    """Raises TawinError unless the engine's weights equal the actor's, tensor by tensor. Collective over all ranks."""
    if isinstance(engine, RemoteEngine):
        engine.check_equal()
    elif isinstance(engine.receive_weights, Refit):
        engine.receive_weights.check_equal()


def check_version(rollout: Rollout, expected: int) -> None:
    """Raises TawinError unless the rollout was made with weights of version ``expected``."""
    if rollout.weight_version != expected:
        raise TawinError(f"rollout of weight version {rollout.weight_version} where version {expected} is due")
