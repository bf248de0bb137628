"""Supervised fine-tuning with early stopping on valid: the loop behind the stages sft, sft_continued and sft_all."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.config.schema import SftConfig
from tawin_nemo.data.batches import balanced_shard, shard
from tawin_nemo.data.tasks import TaskRows
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.bad_steps import step_guard
from tawin_nemo.run.schedule import scheduled
from tawin_nemo.run.stage import Progress, Stage, monitored, soonest_stop
from tawin_nemo.run.timers import Timers, count_update
from tawin_nemo.run.world import World
from tawin_nemo.train.evaluation import evaluate_split
from tawin_nemo.train.sft_data import Curriculum, TaskSet, item_batches, sft_data, task_batches
from tawin_nemo.types import TokenBatch
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


def train_sft(
    world: World, cfg: SftConfig, stage: Stage, trainable: Trainable, rows: np.ndarray, engine: Engine
) -> None:
    """Train on ``rows`` of train and the tasks of section ``align``.

    Training stops when ``sft.watch`` on valid has not improved for ``sft.patience`` checks, or after ``sft.epochs``.
    Later stages start from the checkpoint that is best by ``sft.watch``. ``cfg``: section ``sft`` of this stage (its
    epochs, checks and learning rate). ``engine`` searches with the weights in training. Order, dropout and learning
    rate are pure functions of seed and step, so a killed run continues bit for bit from its newest checkpoint.
    """
    seed = world.recipe.seed
    data = sft_data(world, rows, curriculum=cfg.curriculum)
    per_epoch = -(-data.stream.n // data.stream.batch_size)
    total = cfg.epochs * per_epoch
    check_every = max(1, per_epoch // cfg.checks_per_epoch)
    stage.keeps_best = True  # the best checkpoint is what later stages start from
    done = stage.resume(trainable)
    if done.best_value is None:
        _validate(world, stage, trainable, engine, done, data.tasks, data.curriculum)
    timers = Timers.of(world.recipe, world.dp)
    guard = step_guard(stage, done)
    for step in stage.steps(done.step, total, soonest=partial(soonest_stop, done, cfg.patience, check_every)):
        if done.bad_checks >= cfg.patience:
            break
        runtime.seed_step(seed, step)
        lr = scheduled(cfg, step, total)
        with timers("data"):
            picked = data.picked(step)
            batches = data.batches(world, balanced_shard(picked, data.lengths_of(picked), world.dp))
            micro_batches = sft_micro_batches(world, batches)
        with timers("update"):
            stats = guard(partial(trainable.update, micro_batches, lr=lr), batches)
        done.step = step + 1
        count_update(timers, batches, trainable.shape)
        metrics = {"train/loss" if name == "loss" else name: value for name, value in stats.items()}
        stage.write(done.step, {"epoch": done.step / per_epoch, **metrics, "lr": lr}, timers.report())
        if done.step % check_every == 0:
            _validate(world, stage, trainable, engine, done, data.tasks, data.curriculum)
        elif done.step % world.recipe.trainer.save_interval == 0:
            stage.save(trainable, done)
        stage.save_or_stop(lambda: stage.save(trainable, done), done)
    if done.bad_checks < cfg.patience:
        log.warning("%s used all sft.epochs=%d without early stopping; raise sft.epochs", stage.name, cfg.epochs)
    stage.finish(done, chosen_step=done.best_step)


def _validate(
    world: World,
    stage: Stage,
    trainable: Trainable,
    engine: Engine,
    done: Progress,
    tasks: tuple[TaskSet, ...] = (),
    curriculum: Curriculum | None = None,
) -> None:
    """Evaluate ``sft.watch`` on valid, record whether it is the best so far, log it and save a checkpoint.

    Valid has item tokens where the recipe has; while a curriculum still brings them into train, no check counts
    against ``sft.patience``.
    """
    metrics = {f"valid/loss/{part.task.name}": task_loss(world, trainable, part.held_out) for part in tasks}
    metrics["valid/loss"] = valid_loss(world, trainable)
    if world.recipe.sft.watch == "ndcg":
        with trainable.optimizer_offloaded():
            metrics |= valid_ranking(world, engine, f"{stage.name} step {done.step} valid")
    name, value = list(metrics.items())[-1]
    value = value if name == "valid/loss" else -value  # Progress keeps the smallest
    best = math.inf if done.best_value is None else done.best_value
    waits = curriculum is not None and done.step < curriculum.steps
    done.bad_checks = 0 if waits or value < best - world.recipe.sft.min_delta else done.bad_checks + 1
    if value < best:
        done.best_value, done.best_step = value, done.step
    stage.write(done.step, metrics)
    shown = "  ".join(f"{key.removeprefix('valid/')} {mean:.4f}" for key, mean in metrics.items())
    log.info("%s step %d valid %s%s", stage.name, done.step, shown, " (best)" if done.best_step == done.step else "")
    stage.save(trainable, done)


def valid_ranking(world: World, engine: Engine, label: str) -> dict[str, float]:
    """Recall and NDCG on valid with as many beams as the largest cut-off; the monitored metric is the last one."""
    cfg = replace(world.recipe.eval, beams=max(world.recipe.eval.ks))
    engine.receive_weights()
    means = evaluate_split(world, engine, "valid", label=label, cfg=cfg).means
    watched = monitored(world.recipe.trainer, cfg.ks)
    return {f"valid/{name}": means[name] for name in [*(name for name in means if name != watched), watched]}


def sft_micro_batches(world: World, batches: list[TokenBatch]) -> list[MicroBatch]:
    """Cross-entropy on the answer tokens: local sum / global number of scored tokens."""
    tokens = sum(world.dp.gather(sum(len(batch.target_N) for batch in batches)))
    return [MicroBatch(batch, partial(cross_entropy, total_tokens=tokens)) for batch in batches]


def cross_entropy(logp_N: Tensor, *, total_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss over scored tokens / ``total_tokens`` (a global count, so that splits never change the result)."""
    loss = -logp_N.sum() / total_tokens
    return loss, {"loss": loss.detach()}


def valid_loss(world: World, trainable: Trainable) -> float:
    """Mean loss per scored token on valid, over all data-parallel ranks; summed in float64 in row order."""
    samples = world.samples["valid"]
    mine = samples.take(shard(np.arange(len(samples)), world.dp))
    return _mean_loss(world, trainable.score(item_batches(world, mine)))


def task_loss(world: World, trainable: Trainable, rows: TaskRows) -> float:
    """Mean loss per scored token over the questions ``rows`` of a task, over all data-parallel ranks."""
    mine = rows.take(shard(np.arange(len(rows)), world.dp))
    return _mean_loss(world, trainable.score(task_batches(world, mine)))


def _mean_loss(world: World, logp: list[Tensor]) -> float:
    total = torch.cat(logp).double().sum().item() if logp else 0.0
    count = sum(len(part) for part in logp)
    sums = world.dp.gather((total, count))
    return -sum(value for value, _ in sums) / sum(number for _, number in sums)
