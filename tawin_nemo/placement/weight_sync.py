"""Give the rollout engine the actor's newest weights, and say which version they are.

Where rollouts have the training layout they read the actor's own parameters: nothing is copied, only the version is
raised. Where they have their own (``rollout.tensor_model_parallel_size``, ``rollout.pipeline_model_parallel_size``) or
their own ranks (``rollout.placement: separate``) the engine has a model of its own, into which the weights are
resharded in memory. Generation servers (``rollout.placement: server``) get them whole, through a process group. The
engine stamps every rollout with the version, and the actor refuses a rollout of another one than it expects, so that
stale weights cannot go unnoticed.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.models.gpt import GPTModel

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

log = get_logger(__name__)


def build_engine(
    recipe: Recipe, model: GPTModel, shape: Backbone, catalog: Catalog, *, tokenizer: str = "",
    precision: str = AS_MODEL,
) -> Engine:  # fmt: skip
    """An engine that searches with the weights of ``model``: in place, under the rollout layout of the recipe, on the
    rollout ranks, or on generation servers, whose tokenizer then has to have the fingerprint ``tokenizer``.
    ``precision``: that of ``model``, where it differs from the recipe's.

    But in the first case the engine's weights are undefined until its first ``receive_weights``. Raises ConfigError
    when the model's shape cannot be divided that way or a server does not fit, ServersLost when there is none.
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
    """An engine under the rollout layout, and its model, whose weights are to come from ``source`` (None: from the
    training ranks)."""
    layout = recipe.rollout_layout
    searching, dp = build_rollout_model(shape, recipe.model, *layout), rollout_replicas(*layout)
    log.info("rollouts and evaluation under TP %d x PP %d x DP %d, with weights of their own", *layout, dp.size)
    lm = MeteredLM(MegatronLM(searching, shape))
    refit = Refit(source, searching)
    return RolloutEngine(lm, catalog, recipe.rollout, seed=recipe.seed, dp=dp, receive_weights=refit), searching


def sync_weights(engine: Engine, *, version: int) -> None:
    """Bring the engine's weights up to date, as ``version``. Raises TawinError when the version would go backwards."""
    if version < engine.weight_version:
        raise TawinError(f"weight version {version} is older than the rollout engine's {engine.weight_version}")
    engine.receive_weights()
    engine.weight_version = version


def check_equal(engine: Engine) -> None:
    """Raises TawinError unless the engine's weights are, tensor by tensor, the actor's; every rank calls it."""
    if isinstance(engine, RemoteEngine):
        engine.check_equal()
    elif isinstance(engine.receive_weights, Refit):
        engine.receive_weights.check_equal()


def check_version(rollout: Rollout, expected: int) -> None:
    """Raises TawinError when a rollout was made with other weights than those it has to come from: the actor's, or
    with ``rollout.ahead`` the ones before."""
    if rollout.weight_version != expected:
        raise TawinError(f"rollout of weight version {rollout.weight_version} where version {expected} is due")
