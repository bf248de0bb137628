"""``tawin-nemo retrain``: new interactions -> train from the published model -> export -> gate -> publish.

All ranks call it. Everything is written once and found again, so that the same command and date continue a run that
was killed, and do nothing when it is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tawin_nemo.commands.convert import export as write_export
from tawin_nemo.commands.session import codes_path, finish_saving, started, writing
from tawin_nemo.config.schema import Recipe, RetrainConfig
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.models.megatron.parallel import disaggregated, runtime
from tawin_nemo.placement.rollout_ranks import serve
from tawin_nemo.run import signals
from tawin_nemo.run.datasets import prepared_root
from tawin_nemo.run.failures import attempt_logs
from tawin_nemo.run.world import build_world, open_run_dir
from tawin_nemo.tools.retrain.gate import Decision, decide
from tawin_nemo.tools.retrain.publish_root import EXPORT, GATE_FILE, NightlyRun, PublishRoot
from tawin_nemo.tools.retrain.registry import check_registry, registered
from tawin_nemo.train.item_tokens import check_no_item_tokens
from tawin_nemo.train.pipeline import evaluate_stage, run_pipeline
from tawin_nemo.train.start import engine_of
from tawin_nemo.util import times
from tawin_nemo.util.errors import REFUSED, ConfigError
from tawin_nemo.util.files import write_json
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

SPLIT = "valid"


def run_retrain(recipe: Recipe) -> tuple[dict[str, Any], int]:
    """(result for the last line on stdout, exit code of this rank): 0 published, ``REFUSED`` on rank 0 if refused.

    Raises ConfigError for a recipe that cannot be used, Preempted after a signal or trainer.max_time.
    """
    day, root = check_recipe(recipe), PublishRoot(Path(recipe.retrain.root))
    with started(recipe), contextlib.ExitStack() as stack:
        if disaggregated.is_rollout_rank():
            serve()
            return {}, 0
        stack.enter_context(writing(root.folder, "retrain"))
        stack.callback(finish_saving)
        result = runtime.on_rank_0(lambda: finished(root, day))
        if result is None:
            run = runtime.on_rank_0(lambda: root.nightly_run(day, data_of(recipe, day), warm=recipe.retrain.warm_start))
            stack.enter_context(attempt_logs(root.run_dir(day)))
            stack.enter_context(signals.listening())
            train_and_export(recipe, run, root)
            decision = gate(recipe, run, root)
            result = runtime.on_rank_0(lambda: conclude(root, decision))
        if result["published"]:
            result |= runtime.on_rank_0(lambda: registered(recipe, root.folder, root.version(day)))
        runtime.barrier()
        return result, REFUSED if not result["published"] and runtime.world_rank() == 0 else 0


def check_recipe(recipe: Recipe) -> str:
    """The date. Raises ConfigError for keys that retraining cannot work with, before anything long starts."""
    wanted, known = recipe.retrain.metrics, [f"{kind}@{k}" for kind in ("recall", "ndcg") for k in recipe.eval.ks]
    unknown = [metric for metric in wanted if metric not in known]
    if not recipe.retrain.root:
        raise ConfigError("retrain.root is empty; name the folder of runs, versions and the link `latest`")
    if unknown or not wanted:
        raise ConfigError(f"retrain.metrics={list(wanted)} must be some of {', '.join(known)} (eval.ks)")
    if SPLIT not in recipe.eval.splits:
        raise ConfigError(f"eval.splits={list(recipe.eval.splits)} lacks {SPLIT}, which the gate looks at; add it")
    if recipe.baseline.model != "off" or recipe.start or recipe.checkpoint or recipe.run_dir:
        raise ConfigError("retrain sets start, checkpoint and run_dir itself and needs baseline.model=off; remove them")
    check_no_item_tokens(recipe, "a nightly run publishes an export")
    check_registry(recipe)
    return times.day(recipe.retrain.date)


def finished(root: PublishRoot, day: str) -> dict[str, Any] | None:
    """The result if there is nothing left to do: this date is published, or a later one is."""
    published = root.published()
    if published is None or published.name < day:
        return None
    if published.name > day:
        raise ConfigError(
            f"retrain.date={day} is older than the published version {published.name}; a nightly run never "
            f"replaces a later one (to go back: ln -sfn versions/DATE {root.latest})"
        )
    return {"date": day, "published": True, "latest": str(published), "gate": str(published / GATE_FILE)}


def data_of(recipe: Recipe, day: str) -> Callable[[Path], Path]:
    """Prepares the interactions up to ``day`` in a run directory."""
    window = replace(recipe.prepare, end=recipe.prepare.end or day)
    return lambda run_dir: prepared_root(recipe, run_dir=run_dir, prepare=window)


def run_recipe(recipe: Recipe, run: NightlyRun, root: PublishRoot) -> Recipe:
    """The recipe as the nightly run reads it."""
    model, data = recipe.model, replace(recipe.data, root=run.data, dataset="prepared")
    if run.start:  # the tokenizer lies beside the weights
        model, data = replace(model, init=run.start), replace(data, tokenizer="auto")
    return replace(
        recipe, run_dir=str(root.run_dir(run.date)), model=model, data=data, retrain=RetrainConfig()
    )  # fmt: skip


def train_and_export(recipe: Recipe, run: NightlyRun, root: PublishRoot) -> None:
    """Train what the recipe asks for; export the RL stage, or SFT where there is no RL."""
    run_dir = root.run_dir(run.date)
    export = run_dir / EXPORT
    if export.is_dir() or root.version(run.date).is_dir():
        return
    own_recipe = run_recipe(recipe, run, root)
    open_run_dir(own_recipe, same_recipe=True)
    world = build_world(own_recipe, run_dir, Path(run.data), codes_path=codes_path(recipe))
    run_pipeline(world)
    trained = "preference" if recipe.preference.enabled else "sft"
    stage = run_dir / ("rl" if recipe.rl.enabled else trained)
    write_export(world, str(stage), export)
    runtime.barrier()


def gate(recipe: Recipe, run: NightlyRun, root: PublishRoot) -> Decision:
    """Judge the export against what is published now; the decision is written to ``RUN_DIR/gate.json``."""
    published = runtime.on_rank_0(root.published)
    version = root.version(run.date)
    export = version if version.is_dir() else root.run_dir(run.date) / EXPORT
    candidate = evaluate_export(recipe, run, root, export, "candidate")
    rival = evaluate_export(recipe, run, root, published, f"published_{published.name}") if published else None
    decision = decide(
        candidate, rival, recipe.retrain.metrics,
        date=run.date, against=published.name if published else "", margin=recipe.retrain.margin, seed=recipe.seed,
    )  # fmt: skip
    if runtime.world_rank() == 0:
        result = {**asdict(decision), "passed": decision.passed, "reasons": decision.reasons}
        write_json(root.run_dir(run.date) / GATE_FILE, result)
        write_json(export / GATE_FILE, result)
    runtime.barrier()
    return decision


def evaluate_export(recipe: Recipe, run: NightlyRun, root: PublishRoot, export: Path, name: str) -> EvalResult:
    """Evaluate an exported model, as it will be served, on the run's valid rows (once)."""
    directory = root.run_dir(run.date) / "gate" / name
    if not runtime.on_rank_0(lambda: (directory / "eval" / f"{SPLIT}.json").is_file()):
        own_recipe = run_recipe(recipe, replace(run, start=str(export)), root)
        gate_recipe = replace(own_recipe, run_dir=str(directory), eval=replace(recipe.eval, splits=[SPLIT]))
        open_run_dir(gate_recipe, same_recipe=False)
        world = build_world(gate_recipe, directory, Path(run.data), codes_path=codes_path(recipe))
        return evaluate_stage(world, directory, engine_of(world))
    return EvalResult.read(directory / "eval", SPLIT)


def conclude(root: PublishRoot, decision: Decision) -> dict[str, Any]:
    """Publish, or say why not."""
    gate_file = root.run_dir(decision.date) / GATE_FILE
    result = {"date": decision.date, "published": decision.passed, "gate": str(gate_file)}
    if decision.passed:
        root.publish(decision.date)
        log.info("published %s: %s", decision.date, root.latest)
        return {**result, "latest": str(root.version(decision.date))}
    log.warning("not published, %s stays: %s", root.latest, "; ".join(decision.reasons))
    return {**result, "latest": str(root.published() or ""), "reasons": decision.reasons}
