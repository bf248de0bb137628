"""Reinforcement learning with TAWin: the loop that the rest of the package exists for.

One step: roll out G catalog items per prompt, reward them, turn rewards into group advantages, weight the negatives
so that training aims at the chosen Top-K (TAWin), score them under the reference, update the actor, hand the new
weights to the rollout engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.schema import RlConfig
from tawin_nemo.data.batches import BatchStream, balanced_shard
from tawin_nemo.eval.evaluate import evaluate
from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.maths.tawin import tawin_weights
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.placement.ahead import RolloutAhead
from tawin_nemo.placement.dispatch import dispatched, generating
from tawin_nemo.placement.weight_sync import check_version, sync_weights
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.rollout.negatives import ensure_target
from tawin_nemo.run.bad_steps import Guard, step_guard, unguarded
from tawin_nemo.run.mfu import total_peak_flops
from tawin_nemo.run.schedule import scheduled
from tawin_nemo.run.stage import Progress, Stage, monitored
from tawin_nemo.run.timers import Timers
from tawin_nemo.run.world import World
from tawin_nemo.train.actor import Actor, weighted_groups
from tawin_nemo.train.reference import Reference, Refresh
from tawin_nemo.train.refill import refilled
from tawin_nemo.train.rewards import Reward, build_reward
from tawin_nemo.train.rl_metrics import count_work, prefixed, rollout_facts
from tawin_nemo.types import DataParallel, PromptBatch, Rollout
from tawin_nemo.util import failpoints

NextPrompts = Callable[[], PromptBatch]


def train_rl(
    world: World, stage: Stage, actor: Actor, build_reference: Callable[[], Reference], engine: Engine
) -> None:
    """Run ``rl.max_steps`` steps (or ``rl.epochs`` passes) over the RL rows, resuming where a killed run stopped."""
    rl, trainer, rows = world.recipe.rl, world.recipe.trainer, world.train_rows_for_rl
    total = total_steps(rl, len(rows))
    done = stage.resume(actor.trainable)
    refresh = Refresh(world.recipe.reference.refresh, world.recipe.reference.refresh_steps,
                      world.recipe.reference.refresh_decay)  # fmt: skip
    reference = resumed_reference(build_reference(), refresh, stage, done)
    ahead = RolloutAhead(engine, rl, world.dp, total) if world.recipe.rollout.ahead else RolloutAhead()
    ahead.restore(done.facts, prompts_of(world, max(0, done.batches - 1)))
    guard = step_guard(stage, done)
    components = RlComponents(rl, world.catalog, engine, actor, reference, build_reward(rl, world), guard, ahead)
    timers = Timers(total_peak_flops(world.recipe), world.dp)
    sync_weights(engine, version=done.step)
    for step in stage.steps(done.step, total):
        if rl.max_refill_batches and rl.max_steps == 0 and done.batches >= total:  # refills have used up the prompts
            break
        runtime.seed_step(world.recipe.seed, step)
        lr = scheduled(rl, step, total)
        facts = rl_step(components, lambda: next_prompts(world, done), timers, step=step, lr=lr)
        done.step = step + 1
        reference.follow(actor.trainable.model, refresh.keeps(done.step))
        stage.write(done.step, {**facts, "lr": lr}, timers.report())
        validated = False
        if due(done.step, trainer.val_check_interval):
            with actor.trainable.optimizer_offloaded():
                validated = validate(world, stage, engine, done)
        if validated or due(done.step, trainer.save_interval) or done.step == total:
            save(stage, components, refresh, done)
        stage.stop_if_asked(lambda: save(stage, components, refresh, done), done)
    best = done.best_step if trainer.keep_best and done.best_step >= 0 else done.step
    stage.finish(done, chosen_step=best)


@dataclass(frozen=True)
class RlComponents:
    """Who takes part in a step."""

    rl: RlConfig
    catalog: Catalog
    engine: Engine
    actor: Actor
    reference: Reference
    reward: Reward
    guard: Guard = unguarded
    ahead: RolloutAhead = field(default_factory=RolloutAhead)


def rl_step(
    components: RlComponents, prompts: NextPrompts, timers: Timers, *, step: int, lr: float
) -> dict[str, float]:
    """One step with weights of version ``step``, which leaves version ``step + 1``; returns what is logged."""
    rl, engine, actor = components.rl, components.engine, components.actor
    engine.pop_flops()  # a validation may have searched since the last step
    with actor.trainable.optimizer_offloaded():
        rollout, rewards_BG, facts, path_tokens = rewarded_groups(components, prompts, timers, step=step)
    with timers("reward"):
        adv_BG = group_advantages(rewards_BG, std=rl.std, valid_BG=rollout.valid_BG)
        adv_BG = weighted_groups(adv_BG, rollout.inserted_BG, rl.inserted_weight)
        omega_BG = candidate_weights(rl, rollout)
    with timers("data"):
        packed = actor.pack(rollout, adv_BG, omega_BG)
        batches = [part.batch for part in packed]
    with components.ahead.searching(prompts, timers, step=step + 1):  # rollout.ahead=1: the next rollout, meanwhile
        with timers("reference"):
            ref = components.reference.logprobs(batches)
        with timers("update"):
            stats = components.guard(partial(actor.update, rollout, packed, adv_BG, omega_BG, ref, lr=lr), batches)
    with timers("sync"):
        sync_weights(engine, version=step + 1)
    count_work(timers, engine, actor.dp, actor.trainable.shape, batches,
               path_tokens=path_tokens, scored=ref is not None, passes=rl.inner_updates)  # fmt: skip
    return {**facts, **prefixed(stats)}


def rewarded_groups(
    components: RlComponents, prompts: NextPrompts, timers: Timers, *, step: int
) -> tuple[Rollout, Tensor, dict[str, float], int]:
    """Rollout, rewards_BG, what is logged of them, and the path tokens of the first rollout (before any refill)."""
    rl, dp = components.rl, components.actor.dp

    def rolled_out() -> tuple[Rollout, Tensor]:
        with timers("generate"):
            rollout = components.ahead.take(step)  # with rollout.ahead it was searched during the last update
        if rollout is None:
            with timers("data"):
                batch = prompts()
            with timers("generate"):
                rollout = roll_out(rl, components.engine, batch, step, components.catalog, dp)
        with timers("reward"):
            return rollout, components.reward(rollout)

    rollout, rewards_BG = rolled_out()
    failpoints.reach("rl.after_rollout")
    facts = rollout_facts(rollout, rewards_BG, dp) | components.ahead.facts(rollout, step=step)
    path_tokens = int(rollout.lengths_BG.sum())
    if rl.max_refill_batches:
        rollout, rewards_BG, added = refilled(
            rollout, rewards_BG, rolled_out, wanted=rl.prompts_per_step, most=rl.max_refill_batches, dp=dp
        )
        facts |= {"rl/refill_batches": float(added)}
    return rollout, rewards_BG, facts, path_tokens


def roll_out(
    rl: RlConfig, engine: Engine, prompts: PromptBatch, step: int, catalog: Catalog, dp: DataParallel
) -> Rollout:
    """G candidates per prompt from the weights of exactly this step; ``dp`` are the replicas of training."""

    def generate(prompts: PromptBatch) -> Rollout:
        return engine.generate(prompts, **generating(rl, step))

    rollout = generate(prompts) if engine.dp is None else dispatched(generate, prompts, dp, engine.dp)
    rollout = rollout.to("cpu")  # rewards, advantages and packing are a few numbers per candidate
    check_version(rollout, expected=step)
    return ensure_target(rollout, catalog) if rl.ensure_target == "replace_last" else rollout


def next_prompts(world: World, done: Progress) -> PromptBatch:
    """This replica's share of the next batch; ``done.batches`` remembers how far the stream was read."""
    done.batches += 1
    return prompts_of(world, done.batches - 1)


def prompts_of(world: World, batch: int) -> PromptBatch:
    """This replica's share of a batch, counted from 0."""
    samples, rows = world.samples["train"], world.train_rows_for_rl
    stream = BatchStream(len(rows), min(world.recipe.rl.prompts_per_step, len(rows)), seed=world.recipe.seed)
    picked = rows[stream.batch(batch)]
    return samples.prompt_batch(balanced_shard(picked, samples.prompts.lengths[picked], world.dp))


def resumed_reference(reference: Reference, refresh: Refresh, stage: Stage, done: Progress) -> Reference:
    """A reference that follows the actor goes on from where the checkpoint's step left it."""
    if refresh.kind != "off" and done.step > 0:
        reference.load(stage.directory / "reference" / f"step_{done.step}")
    return reference


def save(stage: Stage, components: RlComponents, refresh: Refresh, done: Progress) -> None:
    """The reference first: a checkpoint of the actor must find the reference of its step."""
    if refresh.kind != "off":
        stage.save_beside("reference", components.reference.save, done)
    done.facts = components.ahead.state()
    stage.save(components.actor.trainable, done)


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def total_steps(rl: RlConfig, rows: int) -> int:
    """Steps of a run: ``rl.max_steps``, or what ``rl.epochs`` passes over ``rows`` need at most."""
    return rl.max_steps or max(1, round(rl.epochs * rows / min(rl.prompts_per_step, rows)))


def candidate_weights(rl: RlConfig, rollout: Rollout) -> Tensor:
    """omega_BG of Eq. 21, or ones when TAWin is off."""
    tawin = rl.tawin
    if not tawin.enabled:
        return rollout.valid_BG.to(torch.float32)
    anchor = float(tawin.target_k - 1) if tawin.target_k else tawin.anchor
    return tawin_weights(
        rollout.scores_BG, rollout.is_target_BG,
        k=tawin.k, tau=tawin.tau, anchor=anchor, window=tawin.window, valid_BG=rollout.valid_BG,
    )  # fmt: skip


def validate(world: World, stage: Stage, engine: Engine, done: Progress) -> bool:
    """What ``trainer.monitor`` says on valid decides which checkpoint the stage hands on."""
    cfg, dp, label = world.recipe.eval, engine.dp or world.dp, f"{stage.name} valid"
    result = evaluate(engine, world.samples["valid"], world.catalog, cfg, dp=dp, label=label)
    metric = monitored(world.recipe.trainer, cfg.ks)
    stage.write(done.step, {f"valid/{name}": value for name, value in result.means.items()})
    value = -result.means[metric]
    if done.best_value is None or value < done.best_value:
        done.best_value, done.best_step = value, done.step
    return True
