"""Preference optimisation: the loop of the stage between SFT and RL (S-DPO arXiv 2406.09215, NAPO and their family).

One step: take the rows of the batch, their rejected items, NAPO's sharing groups and margin, pack prompts with their
answers as trees, score them under the reference where the objective has one, take one optimizer step.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tawin_nemo.config.schema import PreferenceConfig
from tawin_nemo.data.batches import BatchStream
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.placement.weight_sync import sync_weights
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.bad_steps import Guard, step_guard
from tawin_nemo.run.mfu import forward_flop_count, total_peak_flops
from tawin_nemo.run.schedule import scheduled
from tawin_nemo.run.stage import Progress, Stage
from tawin_nemo.run.timers import Timers, count_update
from tawin_nemo.run.world import World
from tawin_nemo.train.plan import preference_steps
from tawin_nemo.train.preference_batch import (
    PackedRows,
    StepTerms,
    margins,
    pack_rows,
    preference_loss,
    preference_stats,
)
from tawin_nemo.train.preference_negatives import Negatives, build_negatives
from tawin_nemo.train.preference_rows import BatchMargin, RowBuilder, build_rows
from tawin_nemo.train.reference import Reference, Refresh
from tawin_nemo.train.rl import due, resumed_reference, validate
from tawin_nemo.types import DataParallel, TokenBatch


@dataclass(frozen=True)
class PreferenceComponents:
    """Who takes part in a step."""

    cfg: PreferenceConfig
    world: World
    rows: RowBuilder
    negatives: Negatives
    margin: BatchMargin
    trainable: Trainable
    reference: Reference
    engine: Engine
    timers: Timers
    guard: Guard


def train_preference(
    world: World, stage: Stage, trainable: Trainable, build_reference: Callable[[], Reference], engine: Engine,
    rows: np.ndarray,
) -> None:  # fmt: skip
    """Take ``preference.max_steps`` steps (or ``preference.epochs`` passes) over ``rows`` of train, resuming where a
    killed run stopped; ``engine`` searches with the weights in training."""
    cfg, trainer = world.recipe.preference, world.recipe.trainer
    stream = BatchStream(len(rows), min(cfg.global_batch_size, len(rows)), seed=world.recipe.seed)
    total, done = preference_steps(cfg, len(rows)), stage.resume(trainable)
    section = world.recipe.reference
    refresh = Refresh(section.refresh, section.refresh_steps, section.refresh_decay)
    components = PreferenceComponents(
        cfg, world, build_rows(world, rows, stream),
        build_negatives(world, rows, stream, engine, total=total), BatchMargin(cfg, world.dp),
        trainable, resumed_reference(build_reference(), refresh, stage, done),
        engine, Timers(total_peak_flops(world.recipe), world.dp), step_guard(stage, done),
    )  # fmt: skip
    restore(components, done)
    write_checkpoint = partial(save, stage, components, refresh, done)
    sync_weights(engine, version=done.step)
    for step in stage.steps(done.step, total):
        runtime.seed_step(world.recipe.seed, step)
        lr = scheduled(cfg, step, total)
        metrics = preference_step(components, step=step, lr=lr)
        done.step = step + 1
        components.reference.follow(trainable.model, refresh.keeps(done.step))
        epoch = done.step * stream.batch_size / stream.n
        stage.write(done.step, {"epoch": epoch, **metrics, "lr": lr}, components.timers.report() | memory())
        validated = due(done.step, trainer.val_check_interval)
        if validated:
            sync_weights(engine, version=done.step)
            with trainable.optimizer_offloaded():
                validate(world, stage, engine, done)
        if validated or due(done.step, trainer.save_interval) or done.step == total:
            write_checkpoint()
        stage.save_or_stop(write_checkpoint, done)
    best = done.best_step if trainer.keep_best and done.best_step >= 0 else done.step
    stage.finish(done, chosen_step=best)


def preference_step(components: PreferenceComponents, *, step: int, lr: float) -> dict[str, float]:
    """One optimizer step on the batch of 0-based ``step``; returns the metrics to log."""
    c, timers, dp = components, components.timers, components.world.dp
    c.engine.pop_flops()  # a validation may have searched since the last step
    with timers("generate"), c.trainable.optimizer_offloaded():
        searched = c.negatives.prepare(step)
    with timers("data"):
        rows = c.rows.of_step(step, c.negatives)
        gamma, margin_metrics = c.margin.of_batch(c.rows.confidences(rows))
        packed = pack_rows(rows, c.world.samples["train"], c.world.catalog, c.cfg)
        batches = [part.batch for part in packed]
        size = c.rows.batch_size
    with timers("reference"):
        ref = c.reference.logprobs(batches)
    terms = StepTerms(rows=size, gamma=gamma)
    if c.cfg.algorithm == "alpha_dpo":
        with timers("score"):
            terms = StepTerms(size, gamma, *margin_moments(c, packed, ref))
    with timers("update"):
        work = micro_batches_of(packed, c.cfg, terms, ref)
        stats = c.guard(partial(c.trainable.update, work, lr=lr), batches)
    count_work(c, batches, searched=searched, scored=ref is not None, dp=dp)
    named = preference_stats(stats) | margin_metrics
    return {name if name == "grad_norm" else f"preference/{name}": value for name, value in named.items()}


def micro_batches_of(
    packed: list[PackedRows], cfg: PreferenceConfig, terms: StepTerms, ref: list[torch.Tensor] | None
) -> list[MicroBatch]:
    """What the update runs: the packed batches with their losses."""
    return [
        MicroBatch(
            part.batch,
            partial(preference_loss, part=part, cfg=cfg, terms=terms, ref_logp_N=None if ref is None else ref[i]),
        )
        for i, part in enumerate(packed)
    ]


def margin_moments(
    c: PreferenceComponents, packed: list[PackedRows], ref: list[torch.Tensor] | None
) -> tuple[float, float]:
    """Mean and standard deviation of M over the pairs of the global batch, under the weights before the step."""
    assert ref is not None
    logps = c.trainable.score([part.batch for part in packed])
    mine = [
        margins(logp.cpu(), part, c.cfg, other.cpu())[part.mask_RN].double().numpy()
        for logp, other, part in zip(logps, ref, packed, strict=True)
    ]
    values = np.concatenate([np.zeros(0), *(part for rank in c.world.dp.gather(mine) for part in rank)])
    return (float(values.mean()), float(values.std())) if len(values) else (0.0, 0.0)


def save(stage: Stage, components: PreferenceComponents, refresh: Refresh, done: Progress) -> None:
    """The reference first, as in RL; margin and rejected items travel in the checkpoint's progress."""
    if refresh.kind != "off":
        stage.save_beside("reference", components.reference.save, done)
    done.facts = components.margin.state() | components.negatives.state(done.step)
    stage.save(components.trainable, done)


def restore(components: PreferenceComponents, done: Progress) -> None:
    """Continue where ``save`` left off. Raises CheckpointError when the checkpoint lacks a state."""
    if done.step:
        components.margin.restore(done.facts, done.step)
        components.negatives.restore(
            {key: done.facts[key] for key in ("rows", "items") if key in done.facts}, done.step
        )


def count_work(
    c: PreferenceComponents, batches: list[TokenBatch], *, searched: bool, scored: bool, dp: DataParallel
) -> None:
    """What the phases of this step had to compute, for timings.jsonl."""
    shape = c.trainable.shape
    if searched:
        ran = c.engine.pop_flops()
        rows, flops = float(ran.tokens), ran.forward_flops(shape)
        if c.engine.dp is not None:
            rows, flops = np.sum(c.engine.dp.gather((rows, flops)), axis=0) / dp.size
        c.timers.count("generate", tokens=0, rows=rows, flops=flops)
    if scored:
        once, tokens = forward_flop_count(batches, shape.vocab), sum(len(batch.target_N) for batch in batches)
        c.timers.count("reference", tokens=tokens, rows=once.tokens, flops=once.forward_flops(shape))
    count_update(c.timers, batches, shape)


def memory() -> dict[str, float]:
    """Peak memory of this process in GiB: of the device where there is one, else resident."""
    if torch.cuda.is_available():
        peak = float(torch.cuda.max_memory_allocated())
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return {"memory_gib": round(peak / 2**30, 4)}
