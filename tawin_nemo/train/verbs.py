"""What the command-line verbs do once recipe and processes are there: train, evaluate, generate, convert."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from tawin_nemo.catalog.semantic_ids import find_codes
from tawin_nemo.config import Recipe
from tawin_nemo.errors import ConfigError, Preempted, UserError
from tawin_nemo.eval.bias import item_counts
from tawin_nemo.eval.evaluate import evaluate as run_evaluation
from tawin_nemo.log import get_logger
from tawin_nemo.models.megatron import async_save, checkpoint, parallel, precision, sides
from tawin_nemo.models.megatron.build import build_model
from tawin_nemo.models.megatron.hf_io import save_hf
from tawin_nemo.models.megatron.precision import AS_MODEL, in_precision
from tawin_nemo.models.megatron.sides import Apart
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.train import signals
from tawin_nemo.train.failures import attempt_logs, recorded
from tawin_nemo.train.pipeline import named_checkpoint, plans, run_pipeline, starting_model
from tawin_nemo.train.profile import check_profile
from tawin_nemo.train.remote_engine import Stop
from tawin_nemo.train.rl import total_steps
from tawin_nemo.train.rollout_ranks import serve
from tawin_nemo.train.weight_sync import build_engine
from tawin_nemo.train.world import World, build_world, open_run_dir, set_threads
from tawin_nemo.types import NO_ITEM, TokenRows

Verb = Callable[..., dict[str, Any]]
log = get_logger(__name__)


def run(recipe: Recipe, verb: Verb, find_data: Callable[[Recipe], Path], **options: Any) -> dict[str, Any]:
    """Start the process group, open the run, prepare the data on rank 0, build the world, call ``verb``."""
    with started(recipe, computes=not options.get("dry_run")), contextlib.ExitStack() as stack:
        if sides.searches_only():
            serve()
            return {}
        check_profile(recipe.profile)
        run_dir = open_run_dir(recipe, same_recipe=verb is train)
        if verb is train:
            stack.enter_context(attempt_logs(run_dir))
        data_root = parallel.broadcast_object(find_data(recipe) if parallel.world_rank() == 0 else None)
        if verb is train:
            stack.enter_context(signals.listening())
        world = build_world(recipe, run_dir, data_root, codes_path=codes_path(recipe))
        return verb(world, **options)


@contextlib.contextmanager
def started(recipe: Recipe, *, computes: bool = True) -> Iterator[None]:
    """The process group the recipe speaks of; at the end what is still being written is waited for and all part.

    Raises ConfigError when the launcher started another number of processes, or when the machine lacks what a
    precision needs and something is to be computed.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(parallel.shutdown)
        stack.callback(async_save.drain)
        stack.enter_context(recorded())
        limit = timedelta(minutes=recipe.trainer.collective_timeout)
        apart = Apart(recipe.rollout.devices, *recipe.rollout_layout) if recipe.rollout.devices else None
        check_processes(recipe)
        parallel.initialize(recipe.model, seed=recipe.seed, limit=limit, apart=apart)
        check_precision(recipe, runs=computes)
        set_threads(recipe)
        if sides.divided():
            stack.push(dismiss)
        yield


def dismiss(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
    """Tell the rollout ranks that this run is over; after an error that other ranks may not know of, all just end."""
    line = sides.line()
    if not sides.searches_only() and not line.owed and isinstance(error, None | Preempted | UserError):
        line.ask(Stop())


def check_processes(recipe: Recipe) -> None:
    """Raises ConfigError when the launcher started another number of processes than the recipe speaks of."""
    nodes, devices, started = recipe.trainer.num_nodes, recipe.trainer.devices, parallel.read_launch().world_size
    if nodes * devices != started:
        raise ConfigError(
            f"trainer.num_nodes={nodes} x trainer.devices={devices} = {nodes * devices} processes, but the launcher "
            f"started {started}; set trainer.devices to the processes per machine"
        )


def check_precision(recipe: Recipe, *, runs: bool) -> None:
    """Raises ConfigError when ``runs`` and this machine lacks what a precision needs; says which were never tried."""
    if recipe.baseline.model != "off":
        return
    if runs:
        precision.refuse(recipe)
    if parallel.world_rank() == 0:
        for line in precision.unverified(recipe):
            log.warning(line)


def codes_path(recipe: Recipe) -> Path | None:
    """The semantic-ID file that the recipe means. Raises ConfigError when it is not there."""
    if recipe.catalog.kind != "sid":
        return None
    return find_codes(Path(recipe.data.root), recipe.catalog.index)


def train(world: World, *, dry_run: bool = False) -> dict[str, Any]:
    """Run the whole pipeline, or only say what it would do."""
    if not dry_run:
        return run_pipeline(world)
    rl, body = world.recipe.rl, world.shape.body_parameters
    return {
        "dry_run": True,
        "run_dir": str(world.run_dir),
        "items": len(world.catalog.titles),
        "stages": {plan.name: len(plan.rows) for plan in plans(world)},
        "rl_steps": total_steps(rl, len(world.train_rows_for_rl)) if rl.enabled else 0,
        "body_parameters": body,
        "embedding_parameters": world.shape.vocab * world.shape.hidden * (1 if world.shape.tied else 2),
        "prompt_tokens_max": int(world.samples["train"].prompts.lengths.max()),
    }


def evaluate(world: World) -> dict[str, Any]:
    """Recall@K and NDCG@K of ``checkpoint`` on ``eval.splits``, with 95 % intervals."""
    engine = engine_of(world)
    result: dict[str, Any] = {"checkpoint": world.recipe.checkpoint}
    for split in world.recipe.eval.splits:
        found = run_evaluation(
            engine, world.samples[split], world.catalog, world.recipe.eval,
            dp=engine.dp or world.dp, label=f"evaluate {split}",
            popularity_I=item_counts(world.samples["train"], len(world.catalog)),
        )  # fmt: skip
        result[split] = {
            **found.means,
            "intervals": {name: list(pair) for name, pair in found.intervals.items()},
            "rows": found.rows,
            "invalid_rate": found.invalid_rate,
            "beyond": found.beyond,
        }
    return result


def generate(world: World) -> dict[str, Any]:
    """Ranked recommendations for ``generate.history``, or for the first rows of ``generate.split``."""
    options = world.recipe.generate
    if options.history:
        unknown = [item for item in options.history if not 0 <= item < len(world.catalog.titles)]
        if unknown:
            raise ConfigError(f"generate.history names items {unknown}; items are 0..{len(world.catalog.titles) - 1}")
        histories = [list(options.history)[-world.recipe.data.max_history :]]
        texts = [world.template.prompt([world.item_texts[item] for item in history]) for history in histories]
        prompts = world.tokenizer.encode_batch(texts)
    else:
        samples = world.samples[options.split].take(np.arange(min(options.rows, len(world.samples[options.split]))))
        histories, prompts = [samples.history[i].tolist() for i in range(len(samples))], samples.prompts
    return {"recommendations": recommend(world, histories, prompts, options.n)}


def recommend(world: World, histories: list[list[int]], prompts: TokenRows, n: int) -> list[dict[str, Any]]:
    """One entry per prompt: its history and the best ``n`` items with scores."""
    width = min(max(n, world.recipe.eval.beams), world.catalog.trie.num_leaves)
    found = engine_of(world).search(prompts, width)
    titles = world.catalog.titles
    return [
        {
            "history": [titles[item] for item in history],
            "items": [
                {"item": item, "external_id": world.catalog.external_ids[item], "title": titles[item], "score": score}
                for item, score in zip(found.items_BW[row].tolist()[:n], found.scores_BW[row].tolist()[:n], strict=True)
                if item != NO_ITEM
            ],
        }
        for row, history in enumerate(histories)
    ]


def convert(world: World) -> dict[str, Any]:
    """Write ``checkpoint`` as a Hugging Face directory with its tokenizer."""
    options = world.recipe.convert
    if not options.output:
        raise ConfigError("convert.output is empty; name the folder for the Hugging Face export")
    model = checkpoint_model(world)
    save_hf(
        model, world.shape, Path(options.output),
        max_shard_bytes=options.shard_mb * 1_000_000, tokenizer_dir=world.run_dir / "tokenizer",
    )  # fmt: skip
    return {"exported": options.output, "checkpoint": world.recipe.checkpoint}


def engine_of(world: World) -> Engine:
    cfg = in_precision(world.recipe.model, world.recipe.eval.precision)
    model = checkpoint_model(world, world.recipe.eval.precision)
    recipe, known = replace(world.recipe, model=cfg), world.tokenizer.fingerprint
    engine = build_engine(recipe, model, world.shape, world.catalog, tokenizer=known)
    engine.receive_weights()
    return engine


def checkpoint_model(world: World, in_format: str = AS_MODEL) -> Any:
    """The model of ``checkpoint=``: a stage directory (its chosen step) or one step_N directory."""
    if not world.recipe.checkpoint:
        return starting_model(world, None, precision=in_format)
    recipe = world.recipe
    cfg = in_precision(recipe.model, in_format)
    model = build_model(
        world.shape, cfg, seed=recipe.seed, rollout_tp=recipe.rollout_layout[0], to_be_loaded=True
    )  # fmt: skip
    checkpoint.load_checkpoint(named_checkpoint(world.recipe, "checkpoint"), model=model)
    return model
