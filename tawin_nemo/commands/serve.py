"""``tawin-nemo serve``: run a server with a recipe and a checkpoint until a signal or ``/shutdown``."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tawin_nemo.api.secrets_files import control_token, read_keys
from tawin_nemo.baselines.assist import load_auxiliary_recommender
from tawin_nemo.commands.serve_versions import check_start, follower_of, known_numbers, version_world
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import AssistConfig, ModelConfig, Recipe
from tawin_nemo.models.megatron.checkpoint.checkpoint import check_form
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.hf.io import check_hf
from tawin_nemo.models.megatron.hf.memory import fill_from_rows, rows_of
from tawin_nemo.models.megatron.model.build import build_rollout_model, parameter_dtype
from tawin_nemo.models.megatron.model.precision import in_precision
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.lm import LM, MeteredLM
from tawin_nemo.run.published import VERSIONS
from tawin_nemo.run.trained import check_tokenizer, resolve_checkpoint
from tawin_nemo.run.world import World
from tawin_nemo.serve.engine.catalog import PromptFormat, ServedCatalog
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.engine.item_fields import MatchCache, fields_of
from tawin_nemo.serve.engine.items_file import read_items
from tawin_nemo.serve.engine.jobs import Limits
from tawin_nemo.serve.engine.numbering import numbered
from tawin_nemo.serve.engine.ranks import Leader, Ranks, SingleProcess, follow
from tawin_nemo.serve.engine.replica import FromTensors, Replica
from tawin_nemo.serve.engine.saved_changes import SavedChanges
from tawin_nemo.serve.engine.telemetry import Metrics
from tawin_nemo.serve.engine.weight_sources import VERSION_PREFIX
from tawin_nemo.serve.http.requests import ServerContext
from tawin_nemo.serve.http.server import Secrets, Server, roots_and_folder
from tawin_nemo.train.item_tokens import check_no_item_tokens
from tawin_nemo.train.start import engine_of
from tawin_nemo.util.errors import CheckpointError, ConfigError, TawinError
from tawin_nemo.util.files import write_json
from tawin_nemo.util.log import get_logger
from tawin_nemo.util.trusted import confined

log = get_logger(__name__)
SWITCH_INTERVAL_S = 1e-4  # of Python threads
FIRST_VERSION = 1  # of the weights and of the catalog that a server starts with


class ProcessGroupRanks:
    """The ``Ranks`` of a server with several processes: all processes of the job, over the default process group."""

    def __init__(self) -> None:
        self.size = runtime.world_size()

    def send(self, data: bytes) -> None:
        runtime.broadcast_bytes(data)

    def receive(self) -> bytes:
        return runtime.broadcast_bytes(None)

    def barrier(self) -> None:
        runtime.any_rank(False)

    def first_problem(self, problem: str) -> str:
        return next((text for text in runtime.gather_objects(problem) if text), "")

    def broadcast_tensor(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return runtime.broadcast_tensor(tensor, shape, dtype)


def serve(world: World) -> dict[str, Any]:
    """Serve ``checkpoint`` until SIGTERM or /shutdown; rank 0 runs the HTTP server, the other ranks follow it.

    Returns ``served``, ``weight_version`` and ``catalog_version`` on rank 0, an empty result on the others.

    Raises ConfigError (layout, ports, keys, item tokens), CatalogError (``serve.catalogue``), TawinError as the engine.
    """
    check_no_item_tokens(world.recipe, "the server's catalog changes, and new items have no vector")
    if world.recipe.serve.follow:
        check_start(world)
    catalog = first_catalog(world)
    # The recipe may be that of a job that this server works for. The catalog has the auxiliary recommender already.
    rollout = replace(world.recipe.rollout, placement="colocated", assist=AssistConfig())
    world = replace(world, recipe=replace(world.recipe, rollout=rollout))
    recipe, settings = world.recipe, world.recipe.serve
    # The engine releases the interpreter's lock at every call of torch, thousands of times per step. Another thread
    # that takes it, for example to build a catalog, keeps it for one switch interval each time. With the default of
    # 5 ms requests would take seconds.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.freeze()  # exclude all objects so far from garbage collections, which block every request
    tp, pp = recipe.rollout_layout
    if tp * pp != runtime.world_size():
        raise ConfigError(
            f"serve runs one model: trainer.num_nodes x trainer.devices = {runtime.world_size()} must be TP {tp} x "
            f"PP {pp} of rollouts; start several servers for several replicas"
        )
    build_from_tensors = from_tensors(world.shape, model_in(recipe), recipe.rollout_layout)
    replica = Replica(
        loader(world), check=checker(world), length_penalty=recipe.rollout.length_penalty,
        from_tensors=build_from_tensors,
    )  # fmt: skip
    roots, folder = roots_and_folder(settings, world.run_dir)
    saved = SavedChanges(folder / "catalog.json", catalog, follows=bool(settings.follow))
    catalog = saved.restored(catalog)
    replica.models[FIRST_VERSION] = replica.load("")
    replica.tries[catalog.version] = catalog.trie
    ranks: Ranks = ProcessGroupRanks() if runtime.world_size() > 1 else SingleProcess()
    if runtime.world_rank() > 0:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # rank 0 drains and then stops this rank
        follow(replica, ranks)
        return {}
    model = replica.models[FIRST_VERSION]
    catalog.validate(vocab=model.vocab_size, positions=model.max_positions)
    catalog.warm()
    keys = read_keys(settings.api_keys_file)
    token = control_token(settings.control_token_file, folder / "control_token", keys)
    metrics = Metrics(settings.variant)
    engine = Engine(
        Leader(replica, ranks), catalog, metrics=metrics, weights=FIRST_VERSION, on_thread=runtime.use_device,
        limits=Limits.of(settings),
    )  # fmt: skip
    context = context_of(world, model, filters_of(world, catalog))
    del model, catalog  # so that this frame does not keep them in memory after they are replaced
    server = Server(engine, context, Secrets(keys, token), roots=roots, saved=saved)
    if settings.follow:
        server.follow(follower_of(world, server, of_a_request))
    engine.start()
    server.run(lambda: _announce(server, world, folder))
    return {"served": True, "weight_version": engine.weights, "catalog_version": engine.catalog.version}


def context_of(world: World, model: LM, filters: MatchCache) -> ServerContext:
    """What the requests of a server that starts with ``model`` are parsed with."""
    recipe, settings = world.recipe, world.recipe.serve
    return ServerContext(
        settings, recipe.name, min(settings.beams or recipe.eval.beams, settings.max_beams),
        recipe.rollout.score_space, recipe.rollout.length_penalty, model.max_positions, model.vocab_size,
        world.tokenizer.fingerprint, model_in(recipe).precision, filters,
    )  # fmt: skip


def _announce(server: Server, world: World, folder: Path) -> None:
    settings, (data, control) = world.recipe.serve, server.ports
    addresses = {
        "data": f"http://{reachable(settings.host)}:{data}",
        "control": f"http://{reachable(settings.control_host)}:{control}",
        "pid": os.getpid(),
    }  # fmt: skip
    write_json(folder / "address.json", addresses)
    log.info("serving %s on %s, control plane on %s", world.recipe.name, addresses["data"], addresses["control"])


def reachable(host: str) -> str:
    """The host name under which other machines reach a server that listens on ``host``."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"[{name}]" if ":" in name else name


def first_catalog(world: World) -> ServedCatalog:
    """Version 1 of the served catalog: that of ``serve.catalogue``, or of the data set, with ``rollout.assist``.

    Items of a published version have the numbers that they had in the versions before. Raises CatalogError, and
    ConfigError for an auxiliary recommender that cannot be used.
    """
    data = world.recipe.data
    prompt_format = PromptFormat(world.tokenizer, world.template, data.max_history, data.max_prompt_tokens)
    recommender = load_auxiliary_recommender(world.recipe.rollout.assist, world.catalog.external_ids)
    known = known_numbers(world.export)
    trained = numbered(world.catalog, world.item_texts, prompt_format, known, recommender=recommender)
    file = world.recipe.serve.catalogue
    return trained.replaced(read_items(Path(file)), FIRST_VERSION) if file else trained


def filters_of(world: World, catalog: ServedCatalog) -> MatchCache:
    """Filters by the items' fields: those of the data set, or of an export that has them; else only ids and titles."""
    settings = world.recipe.serve
    return MatchCache(
        fields_of(world, catalog.external_ids),
        max_filters=settings.max_filters,
        max_bytes=settings.filter_cache_mb * 1_000_000,
    )


def loader(world: World) -> Callable[[str], LM]:
    """A function that loads a model from a stage, a step or a Hugging Face folder; empty path: the recipe's weights.

    Of a path, which comes from a request, all files must lie below ``serve.roots`` when they are opened; those of a
    published version (``FromVersion``) below ``serve.follow``, and its model has the version's own vocabulary. The
    function raises CheckpointError for weights that cannot be loaded or are not finite, ConfigError for a disaggregated
    placement.
    """
    roots, _ = roots_and_folder(world.recipe.serve, world.run_dir)

    def load(path: str) -> LM:
        if not path:
            return finite(load_unconfined(path), "these weights")
        if path.startswith(VERSION_PREFIX):
            folder = path.removeprefix(VERSION_PREFIX)
            with of_a_request(folder, [Path(world.recipe.serve.follow) / VERSIONS]):
                return finite(lm_of(version_world(world, Path(folder))), folder)
        with of_a_request(path, roots):
            return finite(load_unconfined(path), path)

    def load_unconfined(path: str) -> LM:
        recipe = world.recipe
        if (Path(path) / "config.json").is_file() and path:
            recipe = replace(recipe, checkpoint="", start="", model=replace(recipe.model, init=path))
        elif path:
            recipe = replace(recipe, checkpoint=path)
        return lm_of(replace(world, recipe=recipe))

    def lm_of(surroundings: World) -> LM:
        runtime.use_device()
        recipe, engine = surroundings.recipe, engine_of(surroundings)
        if not isinstance(engine, RolloutEngine):
            raise ConfigError(
                f"rollout.placement={recipe.rollout.placement} keeps some processes for training, and serve has none; "
                "set rollout.placement=colocated"
            )
        return engine.lm

    return load


@contextlib.contextmanager
def of_a_request(path: str, roots: list[Path]) -> Iterator[None]:
    """Inside the block files are opened below ``roots`` only, and every error is a TawinError that names ``path``."""
    try:
        with confined(roots):
            yield
    except TawinError:
        raise
    except Exception as error:  # files in any shape: whatever the libraries raise for them
        raise CheckpointError(f"{path} cannot be loaded ({type(error).__name__}: {error})") from error


def checker(world: World) -> Callable[[str], None]:
    """A function that raises a TawinError for a path that cannot be loaded, as far as headers say; not collective."""
    roots, _ = roots_and_folder(world.recipe.serve, world.run_dir)

    def check(path: str) -> None:
        if path.startswith(VERSION_PREFIX):
            folder = path.removeprefix(VERSION_PREFIX)
            with of_a_request(folder, [Path(world.recipe.serve.follow) / VERSIONS]):
                check_hf(version_world(world, Path(folder)).shape, folder)
            return
        with of_a_request(path, roots):
            if (Path(path) / "config.json").is_file():
                check_hf(world.shape, path)
                return
            step = resolve_checkpoint(path, "model_path")
            check_form(step)
            check_tokenizer(step, world.tokenizer.fingerprint)

    return check


def finite(lm: LM, name: str) -> LM:
    """Return ``lm``. Raises CheckpointError when one of this rank's parameters holds NaN or infinity."""
    model = getattr(getattr(lm, "lm", lm), "model", None)
    for parameter_name, parameter in () if model is None else model.named_parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16) and not bool(parameter.isfinite().all()):
            raise CheckpointError(f"{name}: {parameter_name} holds values that are not finite; the training diverged")
    return lm


def from_tensors(shape: Backbone, cfg: ModelConfig, layout: tuple[int, int]) -> FromTensors:
    """How a model is built from a training job's tensors, with ``layout`` (TP, PP) and the precision of ``cfg``."""

    def build(rows: Iterable[Mapping[str, Tensor]]) -> LM:
        runtime.use_device()
        model = build_rollout_model(shape, cfg, *layout)
        fill_from_rows(model, shape, rows)
        return MeteredLM(MegatronLM(model, shape, keep_quantised=True))  # new weights are a new model

    return FromTensors(rows_of(shape), parameter_dtype(cfg), build)


def model_in(recipe: Recipe) -> ModelConfig:
    """The recipe's model in the precision of evaluation, which the server uses."""
    return in_precision(recipe.model, recipe.eval.precision)
