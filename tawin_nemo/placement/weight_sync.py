"""Weight synchronisation: builds the rollout engine and updates its weights to the actor's, with a version.

Rollouts in the training layout use the actor's own parameters: nothing is copied, only the version is raised; bf16 and
FP8 share them, each with a model of its own (``rollout.precision``). Rollouts in another layout
(``rollout.tensor_model_parallel_size``, ``rollout.pipeline_model_parallel_size``), in a precision with other parameters
(float32 and bf16) or on their own ranks (``rollout.placement: separate``) have their own model, into which the weights
are resharded and converted in memory. Generation
servers (``rollout.placement: server``) receive whole tensors through a process group. The engine stamps every rollout
with the version, and a rollout of an unexpected version is rejected, so that stale weights cannot go unnoticed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import AS_MODEL, Recipe
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import (
    build_rollout_model,
    build_search_model,
    parameter_dtype,
    rollout_dtype,
)
from tawin_nemo.models.megatron.model.precision import FP8, in_precision
from tawin_nemo.models.megatron.model.reshard import Refit, SharedWeights
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

    That is in the training processes with the model itself, with another that shares its weights or with a resharded
    copy, on the rollout ranks, or on generation servers, whose tokenizer must have the fingerprint ``tokenizer``.
    ``precision``: that of ``model`` and of its searches; ``AS_MODEL``: the model is in ``model.precision``, and
    searches are in ``rollout.precision``. Unless the engine uses the model's weights, its own are undefined until its
    first ``receive_weights``. Raises ConfigError when the model's shape does not fit the layout or a server does not
    match, ServersLost when no server is available.
    """
    if precision != AS_MODEL:  # engines build their models from the recipe
        searches = replace(recipe.rollout, precision=AS_MODEL)
        recipe = replace(recipe, model=in_precision(recipe.model, precision), rollout=searches)
    if recipe.rollout.placement == "server":
        return ServerEngine(recipe, model, shape, catalog, tokenizer=tokenizer)
    if disaggregated.is_disaggregated():
        return RemoteEngine(recipe, model, shape, catalog)
    trained = recipe.model
    if recipe.rollout_layout != (trained.tensor_model_parallel_size, trained.pipeline_model_parallel_size):
        return engine_with_own_model(recipe, model, shape, catalog)[0]
    if recipe.rollout_precision == trained.precision:
        return _engine_of_model(recipe, model, shape, catalog)
    searched = in_precision(trained, recipe.rollout_precision)
    if parameter_dtype(searched) == parameter_dtype(trained):
        return engine_with_shared_weights(recipe, model, shape, catalog, precision=searched.precision)
    return engine_with_own_model(recipe, model, shape, catalog)[0]


class Received:
    """What an engine calls for new weights: ``copy`` into the model of ``lm``, and tell ``lm`` of them."""

    def __init__(self, lm: MegatronLM, copy: Refit | SharedWeights | None = None) -> None:
        self._lm, self._copy = lm, copy

    def __call__(self) -> None:
        """Bring the model of the rollouts up to date."""
        if self._copy is not None:
            self._copy()
        self._lm.weights_changed()

    def check_equal(self) -> None:
        """Raises TawinError unless the weights are those that were last copied, tensor by tensor."""
        if self._copy is not None:
            self._copy.check_equal()


def engine_with_shared_weights(
    recipe: Recipe, model: GPTModel, shape: Backbone, catalog: Catalog, *, precision: str
) -> RolloutEngine:
    """An engine that searches in ``precision`` with the weights of ``model`` themselves, in its layout.

    The precision's parameters have the number format of the model's: bf16 and FP8 do, in either direction.
    """
    cfg = in_precision(recipe.model, precision)
    searching = build_search_model(shape, model, cfg)
    log.info("rollouts in %s with the weights of training, which are in %s", precision, recipe.model.precision)
    lm = MegatronLM(searching, shape, keep_quantised=True)
    shared = Received(lm, SharedWeights(model, searching))
    shared()
    return RolloutEngine(MeteredLM(lm), catalog, recipe.rollout, seed=recipe.seed, receive_weights=shared)


def comparing_engine(recipe: Recipe, model: GPTModel, shape: Backbone, catalog: Catalog) -> RolloutEngine | None:
    """An engine that finds what rollouts would find in another precision, with the weights of ``model`` in its layout.

    It searches in ``model.precision`` where rollouts do not, and in bf16 where both are in one FP8 precision; None
    where both are in bf16 or in float32. Every rank of training builds it.
    """
    recipe = replace(recipe, rollout=replace(recipe.rollout, cuda_graphs="off"))
    if recipe.rollout_precision != recipe.model.precision:
        return _engine_of_model(recipe, model, shape, catalog)
    if recipe.model.precision in FP8:
        return engine_with_shared_weights(recipe, model, shape, catalog, precision="bf16")
    return None


def _engine_of_model(recipe: Recipe, model: GPTModel, shape: Backbone, catalog: Catalog) -> RolloutEngine:
    lm = MegatronLM(model, shape, keep_quantised=True)
    return RolloutEngine(MeteredLM(lm), catalog, recipe.rollout, seed=recipe.seed, receive_weights=Received(lm))


def engine_with_own_model(
    recipe: Recipe, source: GPTModel | None, shape: Backbone, catalog: Catalog
) -> tuple[RolloutEngine, GPTModel]:
    """An engine in the rollout layout and precision and its model, whose weights are resharded from ``source``.

    ``source`` is None on a rollout rank, whose weights come from the training ranks.
    """
    layout, precision = recipe.rollout_layout, recipe.rollout_precision
    searching = build_rollout_model(shape, recipe.model, *layout, precision)
    dp = rollout_replicas(*layout)
    log.info(
        "rollouts and evaluation under TP %d x PP %d x DP %d in %s, with weights of their own",
        *layout, dp.size, precision,
    )  # fmt: skip
    lm = MegatronLM(searching, shape, keep_quantised=True)
    refit = Refit(source, searching, dtype=rollout_dtype(recipe))
    engine = RolloutEngine(
        MeteredLM(lm), catalog, recipe.rollout, seed=recipe.seed, dp=dp, receive_weights=Received(lm, refit)
    )
    return engine, searching


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
    elif isinstance(engine.receive_weights, Received):
        engine.receive_weights.check_equal()


def check_version(rollout: Rollout, expected: int) -> None:
    """Raises TawinError unless the rollout was made with weights of version ``expected``."""
    if rollout.weight_version != expected:
        raise TawinError(f"rollout of weight version {rollout.weight_version} where version {expected} is due")
