"""The main job: SFT -> preference optimisation -> {RL, SFT continued beside it} -> evaluation of each -> summary.

Every stage lives in its own directory of the run and is skipped when it is already done, so the same command starts,
resumes and completes a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tawin_nemo.baselines.train import run_baseline
from tawin_nemo.config.schema import EvalConfig, Recipe, SftConfig
from tawin_nemo.data.tasks import active_tasks
from tawin_nemo.eval.report import write_report
from tawin_nemo.eval.result import EvalResult, results_table
from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.hf.new_tokens import freeze_others
from tawin_nemo.models.megatron.model.adapters import fold
from tawin_nemo.models.megatron.model.build import model_summary
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.placement.remote_engine import RemoteEngine
from tawin_nemo.placement.weight_sync import build_engine
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.callbacks import Callbacks, build_callbacks
from tawin_nemo.run.logging import open_sinks
from tawin_nemo.run.mfu import peak_flops
from tawin_nemo.run.stage import MetricSink, Progress, Stage, logged_seconds
from tawin_nemo.run.world import World, read_json
from tawin_nemo.train.actor import Actor
from tawin_nemo.train.assist import add_assistant
from tawin_nemo.train.auc_eval import auc_metrics
from tawin_nemo.train.candidate_eval import candidate_metrics
from tawin_nemo.train.evaluation import evaluate_split, evaluate_tasks, task_file
from tawin_nemo.train.extension import extend_finished
from tawin_nemo.train.grounding_eval import grounding_metrics
from tawin_nemo.train.item_tokens import keep_item_vectors
from tawin_nemo.train.plan import Plan, plans
from tawin_nemo.train.preference import train_preference
from tawin_nemo.train.reference import Reference, build_reference
from tawin_nemo.train.rl import train_rl
from tawin_nemo.train.sft import train_sft
from tawin_nemo.train.start import adapt, merged, only_new_tokens, starting_model
from tawin_nemo.util.files import write_json
from tawin_nemo.util.log import get_logger

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

log = get_logger(__name__)


def run_pipeline(world: World) -> dict[str, Any]:
    """Run every planned stage that is not done yet; returns the summary that is also written to summary.json."""
    start, earlier = time.monotonic(), earlier_seconds(world.run_dir)
    with open_sinks(world) as sink:
        results = run_stages(world, sink, build_callbacks(world))
    summary: dict[str, Any] = {name: dict(result.means) for name, result in results.items()}
    invalid = max(result.invalid_rate for result in results.values())
    wall = earlier + time.monotonic() - start
    summary |= {"invalid_rate": invalid, "wall_s": round(wall, 1), "run_dir": str(world.run_dir)}
    for kind, asked in {"candidates": world.recipe.eval.candidates, "grounding": world.recipe.eval.grounding}.items():
        if asked and (kind == "candidates" or world.recipe.baseline.model == "off"):
            last = f"eval/{world.recipe.eval.splits[-1]}.{kind}.json"
            summary[kind] = {name: read_json(world.run_dir / name / last)["means"] for name in results}
    summary["final_stage"] = list(results)[-1]
    if runtime.world_rank() == 0:
        write_json(world.run_dir / "summary.json", summary)
        split = world.recipe.eval.splits[-1]
        log.info("results on %s, 95 %% intervals\n%s", split, results_table(results, world.recipe.eval.ks, split))
        log.info("report: %s", write_report(world.run_dir))
    runtime.barrier()
    return summary


def run_stages(world: World, sink: MetricSink | None, callbacks: Callbacks) -> dict[str, EvalResult]:
    """Run the baseline, or every planned stage; results on the last of ``eval.splits`` by stage."""
    keep_item_vectors(world)
    if world.recipe.baseline.model != "off":
        return {world.recipe.baseline.model: run_baseline(world, sink, callbacks)}
    extend_finished(world)
    planned = list(plans(world))  # all of them first: it checks what later stages need
    return {plan.name: run_stage(world, plan, sink, callbacks) for plan in planned}


def write_layout(run_dir: Path, model: GPTModel, engine: Engine, peak: float) -> None:
    """Write layout.json: layers, parameters, device and ``peak`` FLOP/s of every process."""
    mine = {**runtime.rank_layout(), **model_summary(model), "peak_tflops": round(peak / 1e12, 4)}
    ranks = runtime.gather_objects(mine) + (engine.rank_layouts if isinstance(engine, RemoteEngine) else [])
    if runtime.world_rank() == 0:
        write_json(run_dir / "layout.json", ranks)


def earlier_seconds(run_dir: Path) -> float:
    """Wall time of this run's earlier attempts in seconds: of a complete one from summary.json, else from the logs."""
    path = run_dir / "summary.json"
    if path.is_file():
        return float(str(read_json(path).get("wall_s", 0.0)))
    return sum(logged_seconds(log_file) for log_file in run_dir.glob("*/timings.jsonl"))


def run_stage(world: World, plan: Plan, sink: MetricSink | None, callbacks: Callbacks) -> EvalResult:
    """Train one stage and evaluate it, each unless it is done; returns the result on the last of ``eval.splits``."""
    stage = Stage(
        world.run_dir / plan.name, world.recipe.trainer,
        deadline=world.deadline, sink=sink, profile=world.recipe.profile, identity=world.identity,
        callbacks=callbacks,
    )  # fmt: skip
    splits = world.recipe.eval.splits
    endings = [".json", *evaluation_files(world.recipe.eval)]
    expected = [stage.directory / "eval" / f"{split}{ending}" for split in splits for ending in endings]
    if plan.kind == "sft" and active_tasks(world.recipe.align):
        expected.append(task_file(stage.directory))
    if stage.done and all(file.is_file() for file in expected):
        log.info("%s is done", plan.name)
        return EvalResult.read(stage.directory / "eval", splits[-1])
    stage.stop_before(plan.name)
    drops, trains = plan.kind == "sft", plan.kind != "zero_shot"
    model = starting_model(world, plan.start, dropout=world.recipe.model.dropout if drops else 0.0)
    if trains:
        adapt(world, model, plan.start, dropout=drops)
    recipe = world.recipe if trains else merged(world.recipe)
    known = world.tokenizer.fingerprint
    engine = build_engine(recipe, model, world.shape, world.catalog, tokenizer=known)
    write_layout(world.run_dir, model, engine, peak_flops(recipe))
    optimizer_offloaded: Callable[[], AbstractContextManager[None]] = nullcontext
    if not stage.done and trains:
        optimizer_offloaded = train_stage(world, plan, stage, model, engine)
    elif not stage.done:
        keep_untrained(world, stage, model)
    stage.stop_before(f"the evaluation of {plan.name}")
    precision = recipe.eval_precision
    if {recipe.model.precision, recipe.rollout_precision} != {precision}:
        recipe, model = merged(recipe), starting_model(world, plan.name, precision=precision)
        engine = build_engine(recipe, model, world.shape, world.catalog, tokenizer=known, precision=precision)
    else:
        checkpoint.load_checkpoint(stage.chosen_checkpoint, model=model)
        fold(model)
    add_assistant(world, engine)
    with optimizer_offloaded():
        result = evaluate_stage(world, stage.directory, engine)
        if plan.kind == "sft":
            build = partial(build_engine, recipe, model, world.shape, precision=precision)
            evaluate_tasks(world, stage.directory, plan.rows, build)
    return result


def train_stage(
    world: World, plan: Plan, stage: Stage, model: GPTModel, engine: Engine
) -> Callable[[], AbstractContextManager[None]]:
    """Train a stage to its end, or go on with it; returns its ``optimizer_offloaded``."""
    sft = sft_section(world.recipe, plan.name)
    if world.recipe.model.freeze_backbone and plan.kind == "sft":
        freeze_others(model, only_new_tokens(world))
    lr = {"rl": world.recipe.rl.lr, "preference": world.recipe.preference.lr}.get(plan.kind, sft.lr)
    trainable = Trainable(model, world.shape, world.recipe.trainer, lr=lr)
    log.info("%s: %d rows of train", plan.name, len(plan.rows))
    if plan.kind == "rl":
        actor = Actor(trainable, world.catalog, world.recipe.rl, world.dp)
        train_rl(world, stage, actor, lambda: reference_for(world, plan, model), engine)
    elif plan.kind == "preference":
        train_preference(world, stage, trainable, lambda: reference_for(world, plan, model), engine, plan.rows)
    else:
        train_sft(world, sft, stage, trainable, plan.rows, engine)
    return trainable.optimizer_offloaded


def keep_untrained(world: World, stage: Stage, model: GPTModel) -> None:
    """End the stage ``zero_shot``: its only checkpoint holds the weights that the run starts from. Collective."""
    begun = Progress()
    state = {"progress": vars(begun), "stage": stage.name, **world.identity}
    checkpoint.save_checkpoint(stage.checkpoints / "step_0", model=model, state=state)
    stage.finish(begun, chosen_step=0)


def sft_section(recipe: Recipe, name: str) -> SftConfig:
    """Section ``sft`` of the stage ``name``.

    Stage sft_continued has its own learning rate (``compare.sft_continued_lr``, 0 = that of ``sft``), constant, because
    it continues a trained model; for the same reason all of its prompts have their item tokens.
    """
    lr = recipe.compare.sft_continued_lr
    if name != "sft_continued":
        return recipe.sft
    own = replace(recipe.sft, curriculum=0.0)
    return own if lr == 0.0 else replace(own, lr=lr, schedule="constant")


def reference_for(world: World, plan: Plan, actor_model: GPTModel) -> Reference:
    """The policy that the stage started from, frozen; none where its objective has no reference."""
    recipe = world.recipe
    beta = recipe.rl.beta if plan.kind == "rl" else float(recipe.preference.uses_reference)
    return build_reference(
        recipe.reference.mode, beta, actor_model,
        lambda: starting_model(world, plan.start, precision=recipe.reference.precision),
    )  # fmt: skip


def evaluation_files(cfg: EvalConfig) -> list[str]:
    """What the files of the further evaluations that ``cfg`` asks for are called, behind the split."""
    wanted = {".candidates.json": cfg.candidates > 0, ".auc.json": cfg.auc, ".grounding.json": cfg.grounding > 0}
    return [ending for ending, asked in wanted.items() if asked]


def evaluate_stage(world: World, directory: Path, engine: Engine) -> EvalResult:
    """Evaluate on all of ``eval.splits`` and write the results to ``eval`` in the stage's ``directory``.

    Returns the result on the last split, on every rank.
    """
    results = {}
    engine.receive_weights()
    for split in world.recipe.eval.splits:
        label = f"{directory.name} {split}"
        results[split] = evaluate_split(world, engine, split, label=label, popularity=True).named(world.dataset)
        ranked = auc_metrics(world, engine, split, label)
        if ranked is not None:
            results[split] = replace(results[split], beyond=results[split].beyond | ranked.means)
        others = candidate_metrics(world, engine, split, label), grounding_metrics(world, engine, split, label)
        if runtime.world_rank() == 0:
            results[split].write(directory / "eval", split)
            for measured in (ranked, *others):
                if measured is not None:
                    measured.named(world.dataset).write(directory / "eval", split)
    runtime.barrier()
    return results[world.recipe.eval.splits[-1]]
