"""Runs a verb under a recipe: process group, run directory, data and world, and an orderly shutdown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tawin_nemo.catalog.semantic_ids import find_codes
from tawin_nemo.commands.train import train
from tawin_nemo.config.backbones import backbone
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.model import precision
from tawin_nemo.models.megatron.parallel import disaggregated, runtime
from tawin_nemo.models.megatron.parallel.channel import Stop
from tawin_nemo.models.megatron.parallel.disaggregated import RolloutRanks
from tawin_nemo.run import determinism, signals
from tawin_nemo.run.datasets import prepared_root, run_dir_of
from tawin_nemo.run.exported import exported_world, from_export
from tawin_nemo.run.failures import attempt_logs, recorded
from tawin_nemo.run.profile import check_profile
from tawin_nemo.run.published import starting_version
from tawin_nemo.run.run_lock import run_lock
from tawin_nemo.run.trained import Trained, check_catalog, check_prompt, resolve_checkpoint, trained_model
from tawin_nemo.run.world import World, build_world, open_run_dir
from tawin_nemo.util.errors import ConfigError, Preempted, UserError
from tawin_nemo.util.hub import fetch, is_hub_name, local_folder
from tawin_nemo.util.launch import available_threads, is_launched, read_launch
from tawin_nemo.util.log import get_logger

Verb = Callable[..., dict[str, Any]]
log = get_logger(__name__)


def run(recipe: Recipe, verb: Verb, **options: Any) -> dict[str, Any]:
    """Start the process group, open the run, prepare the data on rank 0, build the world, call ``verb``.

    A dry run in one process needs no process group, and so neither megatron nor the seconds that its import takes.
    """
    trains = verb is train
    recipe = recipe if trains else from_export(starting_version(recipe) if verb.__name__ == "serve" else recipe)
    computes = not options.get("dry_run")
    group = started(recipe, computes=computes) if computes or recipe.processes > 1 else checked(recipe)
    with group, contextlib.ExitStack() as stack:
        if disaggregated.is_rollout_rank():
            from tawin_nemo.placement.rollout_ranks import serve

            serve()
            return {}
        check_profile(recipe.profile)
        if not trains:
            weights_follow = verb.__name__ == "serve" and recipe.rollout.placement == "server"
            return verb(trained_world(recipe, weights_follow=weights_follow), **options)
        check_same_code(recipe)
        stack.enter_context(writing(run_dir_of(recipe), "train"))
        if computes:
            stack.callback(finish_saving)
        run_dir = open_run_dir(recipe, same_recipe=True)
        stack.enter_context(attempt_logs(run_dir))
        data_root = runtime.on_rank_0(lambda: prepared_root(recipe))
        stack.enter_context(signals.listening())
        return verb(build_world(recipe, run_dir, data_root, codes_path=codes_path(recipe)), **options)


@contextlib.contextmanager
def writing(folder: Path, command: str, *, outputs: Sequence[str] = ()) -> Iterator[None]:
    """Inside the block no other command writes into ``folder``: rank 0 holds its lock (see ``run_lock``).

    Raises Locked on all ranks.
    """
    with contextlib.ExitStack() as stack:
        runtime.on_rank_0(lambda: stack.enter_context(run_lock(folder, command, outputs=outputs)))
        yield


def finish_saving() -> None:
    """Wait for the checkpoints that are still being written; the lock of the run directory is released after that."""
    from tawin_nemo.models.megatron.checkpoint import async_save

    async_save.drain()


def trained_world(recipe: Recipe, *, weights_follow: bool) -> World:
    """The world of a verb that uses a trained model: its run's tokenizer, catalog and data, wherever it is started.

    ``weights_follow``: a training job will send them.

    Raises ConfigError when there is no model, and when the recipe or the data are not those of its training.
    """
    trained = runtime.on_rank_0(lambda: trained_model(recipe, weights_follow=weights_follow))
    recipe = replace(recipe, checkpoint=trained.checkpoint)
    if trained.export is not None:
        return world_of_export(recipe, trained)
    run_dir = open_run_dir(replace(recipe, run_dir=str(trained.run_dir)), same_recipe=False)
    data_root = runtime.on_rank_0(lambda: trained.data_root(recipe))
    world = build_world(recipe, run_dir, data_root, codes_path=codes_path(recipe))
    if trained.checkpoint:
        path = resolve_checkpoint(trained.checkpoint, "checkpoint")
        check_catalog(path, world.catalog.fingerprint)
        check_prompt(path, world.template.fingerprint)
    return world


def world_of_export(recipe: Recipe, trained: Trained) -> World:
    """The world of a verb on an exported model; it needs data only for what reads rows (``evaluate``)."""
    assert trained.export is not None
    data_root = None
    if recipe.data.root or recipe.data.dataset == "synthetic":
        data_root = runtime.on_rank_0(lambda: trained.data_root(recipe))
    return exported_world(recipe, trained.export, trained.run_dir, data_root)


@contextlib.contextmanager
def started(recipe: Recipe, *, computes: bool = True) -> Iterator[None]:
    """Open the recipe's process group inside the block; at its end pending checkpoints are finished.

    Raises ConfigError when the launcher started another number of processes, when ``computes`` and this machine does
    not support a precision of the recipe, and when Transformer Engine is installed but broken.
    """
    precision.check_engine_import()
    if recipe.trainer.deterministic:
        determinism.make_deterministic()
    # All of megatron before the shim: torch.compile, which its modules call, must see torch.cuda as it is.
    import tawin_nemo.train.pipeline  # noqa: F401
    from tawin_nemo.models.megatron.checkpoint import async_save

    with contextlib.ExitStack() as stack:
        if recipe.trainer.deterministic:
            stack.callback(determinism.reset)
        stack.callback(runtime.shutdown)
        stack.callback(async_save.drain)
        stack.enter_context(recorded())
        limit = timedelta(minutes=recipe.trainer.collective_timeout)
        rollout_ranks = RolloutRanks(recipe.rollout.devices, *recipe.rollout_layout) if recipe.rollout.devices else None
        check_processes(recipe)
        runtime.initialize(recipe.model, seed=recipe.seed, limit=limit, rollout_ranks=rollout_ranks)
        check_init(recipe)
        check_precision(recipe, runs=computes)
        torch.set_num_threads(chosen_threads(recipe))
        if disaggregated.is_disaggregated():
            stack.push(stop_rollout_ranks)
        yield


#: Hidden size below which a second CPU thread costs more than it brings: one layer's matrices are done within the time
#: that two threads need to meet, and beside another busy process they meet late. See recipes/results/speed.md.
ONE_THREAD_BELOW = 128


def chosen_threads(recipe: Recipe) -> int:
    """CPU threads of this process: ``trainer.threads``; where that is 0, one for small models, else its share of cores.

    A function of the recipe, the machine and the launcher alone, never of measured speed: the number of threads can
    change the order of floating-point sums, and a resumed run has to repeat an uninterrupted one bit for bit.
    """
    if recipe.trainer.threads:
        return recipe.trainer.threads
    cores = available_threads()
    init, revision = recipe.model.init, recipe.model.revision
    folder = local_folder(init, revision)
    hidden = (backbone(recipe.model.backbone) if init == "random" else backbone_from_hf(folder)).hidden
    small = recipe.baseline.model == "off" and hidden < ONE_THREAD_BELOW
    threads = 1 if small else cores
    if runtime.world_rank() == 0 and cores > 1:
        why = f"hidden size {hidden} is small" if small else "this process's cores"
        log.info("CPU threads per process: %d (%s; trainer.threads=N sets another number)", threads, why)
    return threads


@contextlib.contextmanager
def checked(recipe: Recipe) -> Iterator[None]:
    """The checks of ``started`` for a single process that needs no process group."""
    check_processes(recipe)
    check_init(recipe)
    check_precision(recipe, runs=False)
    with recorded():
        yield


def stop_rollout_ranks(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
    """Stop the rollout ranks when a run ends; after an error on one rank alone, the launcher stops them."""
    channel, expected = disaggregated.rollout_channel(), isinstance(error, None | Preempted | UserError)
    if expected and not disaggregated.is_rollout_rank() and not channel.awaits_response:
        channel.broadcast(Stop())


def check_same_code(recipe: Recipe) -> None:
    """Raises ConfigError when the ranks have read different sources for the import paths of the recipe. Collective."""
    if not recipe.code:
        return
    codes = runtime.gather_objects(recipe.code)
    for key in recipe.code:
        seen = sorted({code[key] for code in codes})
        if len(seen) > 1:
            raise ConfigError(
                f"{key}: the ranks have read different sources ({', '.join(seen)}); give all machines the same files"
            )


def check_processes(recipe: Recipe) -> None:
    """Raises ConfigError when the launcher started another number of processes than the recipe names."""
    nodes, devices, started = recipe.trainer.num_nodes, recipe.trainer.devices, read_launch().world_size
    if nodes * devices != started:
        wanted = f"trainer.num_nodes={nodes} x trainer.devices={devices} = {nodes * devices} processes"
        if not is_launched():
            raise ConfigError(
                f"{wanted}, but this one was started alone: start it on every machine with srun (slurm/README.md) or "
                f"`torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
                "-m tawin_nemo train ...`, or set trainer.num_nodes=1"
            )
        raise ConfigError(
            f"{wanted}, but the launcher started {started}; set trainer.devices to the processes per machine and "
            "trainer.num_nodes to the machines"
        )


def check_init(recipe: Recipe) -> None:
    """Download ``model.init`` where it is a hub name, and read its configuration: before any data are prepared.

    Rank 0 downloads and the others wait; then the first rank of every further machine looks into its own cache. Raises
    ConfigError for a model that is not there, and for a family or arithmetic that is not supported.
    """
    init, revision = recipe.model.init, recipe.model.revision
    if recipe.baseline.model != "off" or init == "random":
        return
    if is_hub_name(init):
        runtime.on_rank_0(lambda: fetch(init, revision))
        if read_launch().local_rank == 0:
            fetch(init, revision)
        runtime.barrier()
    backbone_from_hf(local_folder(init, revision))


def check_precision(recipe: Recipe, *, runs: bool) -> None:
    """Raises ConfigError when ``runs`` and this machine does not support a precision of the recipe; warns about
    precisions that were never verified on its kind of device."""
    if recipe.baseline.model != "off":
        return
    if runs:
        precision.check_supported(recipe)
    if runtime.world_rank() == 0:
        for line in precision.unverified(recipe):
            log.warning(line)


def codes_path(recipe: Recipe) -> Path | None:
    """The semantic-ID file of the recipe, None for a catalog of titles. Raises ConfigError when it is missing."""
    if recipe.catalog.kind != "sid":
        return None
    return find_codes(Path(recipe.data.root), recipe.catalog.index)
