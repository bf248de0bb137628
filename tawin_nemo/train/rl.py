"""Reinforcement learning with TAWin: the loop that the rest of the package exists for.

One step: roll out G catalog items per prompt, reward them, turn rewards into group advantages, weight the negatives
so that training aims at the chosen Top-K (TAWin), score them under the reference, update the actor, hand the new
weights to the rollout engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tawin_nemo.config.schema import RlConfig
from tawin_nemo.eval.evaluate import evaluate
from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.maths.tawin import tawin_weights
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.placement.weight_sync import sync_weights
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.bad_steps import Guard, step_guard, unguarded
from tawin_nemo.run.mfu import total_peak_flops
from tawin_nemo.run.schedule import scheduled
from tawin_nemo.run.stage import Progress, Stage, monitored
from tawin_nemo.run.timers import Timers
from tawin_nemo.run.world import World
from tawin_nemo.train.actor import Actor, weighted_groups
from tawin_nemo.train.plan import total_steps
from tawin_nemo.train.reference import Reference, Refresh
from tawin_nemo.train.rewards import Reward, build_reward
from tawin_nemo.train.rl_metrics import count_flops, prefixed, rollout_metrics
from tawin_nemo.train.rollouts import PromptStream, Rollouts
from tawin_nemo.types import Rollout
from tawin_nemo.util import failpoints


def train_rl(
    world: World, stage: Stage, actor: Actor, build_reference: Callable[[], Reference], engine: Engine
) -> None:
    """Run ``rl.max_steps`` steps (or ``rl.epochs`` passes) over the RL rows, resuming where a killed run stopped."""
    rl, trainer = world.recipe.rl, world.recipe.trainer
    total = total_steps(rl, len(world.train_rows_for_rl))
    done = stage.resume(actor.trainable)
    refresh = Refresh(world.recipe.reference.refresh, world.recipe.reference.refresh_steps,
                      world.recipe.reference.refresh_decay)  # fmt: skip
    reference = resumed_reference(build_reference(), refresh, stage, done)
    timers = Timers(total_peak_flops(world.recipe), world.dp)
    rollouts = build_rollouts(world, engine, timers, total)
    rollouts.restore(done)
    components = RlComponents(rl, rollouts, actor, reference, build_reward(rl, world), timers, step_guard(stage, done))
    write_checkpoint = partial(save, stage, components, refresh, done)
    sync_weights(engine, version=done.step)
    for step in stage.steps(done.step, total):
        if rollouts.exhausted(total):
            break
        runtime.seed_step(world.recipe.seed, step)
        lr = scheduled(rl, step, total)
        metrics = rl_step(components, step=step, lr=lr)
        done.step = step + 1
        reference.follow(actor.trainable.model, refresh.keeps(done.step))
        stage.write(done.step, {**metrics, "lr": lr}, timers.report())
        validated = due(done.step, trainer.val_check_interval)
        if validated:
            with actor.trainable.optimizer_offloaded():
                validate(world, stage, engine, done)
        if validated or due(done.step, trainer.save_interval) or done.step == total or rollouts.exhausted(total):
            write_checkpoint()
        stage.stop_if_requested(write_checkpoint, done)
    best = done.best_step if trainer.keep_best and done.best_step >= 0 else done.step
    stage.finish(done, chosen_step=best)


@dataclass(frozen=True)
class RlComponents:
    """Who takes part in a step."""

    rl: RlConfig
    rollouts: Rollouts
    actor: Actor
    reference: Reference
    reward: Reward
    timers: Timers
    guard: Guard = unguarded


def rl_step(components: RlComponents, *, step: int, lr: float) -> dict[str, float]:
    """One step with weights of version ``step``, which leaves version ``step + 1``; returns the metrics to log.

    Rewards, advantages, weights and packing are a few numbers per candidate and are computed on the CPU.
    """
    rl, rollouts, actor, timers = components.rl, components.rollouts, components.actor, components.timers
    rollouts.engine.pop_flops()  # a validation may have searched since the last step
    with actor.trainable.optimizer_offloaded():
        prompts = rollouts.next_prompts()
        rollout = rollouts.generate(prompts, step).to("cpu")
        with timers("reward"):
            rewards_BG = components.reward(rollout)
        failpoints.reach("rl.after_rollout")
        metrics = rollout_metrics(rollout, rewards_BG, actor.dp) | rollouts.staleness(rollout, step)
        path_tokens = int(rollout.lengths_BG.sum())
        if rl.max_refill_batches:
            rollout, rewards_BG, added = rollouts.refill(rollout, rewards_BG, components.reward, step)
            metrics["rl/refill_batches"] = float(added)
    with timers("reward"):
        adv_BG = group_advantages(rewards_BG, std=rl.std, valid_BG=rollout.valid_BG)
        adv_BG = weighted_groups(adv_BG, rollout.inserted_BG, rl.inserted_weight)
        omega_BG = candidate_weights(rl, rollout)
    with timers("data"):
        packed = actor.pack(rollout, adv_BG, omega_BG)
        batches = [part.batch for part in packed]
    with rollouts.searching_ahead(step + 1):
        with timers("reference"):
            ref = components.reference.logprobs(batches)
        with timers("update"):
            update = partial(actor.update, rollout, packed, adv_BG, omega_BG, ref, lr=lr)
            stats = components.guard(update, batches)
    with timers("sync"):
        sync_weights(rollouts.engine, version=step + 1)
    count_flops(timers, rollouts.engine, actor.dp, actor.trainable.shape, batches,
               path_tokens=path_tokens, scored=ref is not None, passes=rl.inner_updates)  # fmt: skip
    return {**metrics, **prefixed(stats)}


def build_rollouts(world: World, engine: Engine, timers: Timers, total: int) -> Rollouts:
    """Rollouts of the RL rows of train, ``rl.prompts_per_step`` prompts of all replicas together a step."""
    recipe = world.recipe
    prompts = PromptStream.of(
        world.samples["train"], world.train_rows_for_rl,
        batch_size=recipe.rl.prompts_per_step, seed=recipe.seed, dp=world.dp,
    )  # fmt: skip
    ahead_until = total if recipe.rollout.ahead else 0
    return Rollouts(recipe.rl, engine, world.catalog, world.dp, prompts, timers, ahead_until=ahead_until)


def resumed_reference(reference: Reference, refresh: Refresh, stage: Stage, done: Progress) -> Reference:
    """A reference that follows the actor goes on from where the checkpoint's step left it."""
    if refresh.kind != "off" and done.step > 0:
        reference.load(stage.directory / "reference" / f"step_{done.step}")
    return reference


def save(stage: Stage, components: RlComponents, refresh: Refresh, done: Progress) -> None:
    """The reference first: a checkpoint of the actor must find the reference of its step."""
    if refresh.kind != "off":
        stage.save_beside("reference", components.reference.save, done)
    components.rollouts.save_state(done)
    stage.save(components.actor.trainable, done)


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


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


def validate(world: World, stage: Stage, engine: Engine, done: Progress) -> None:
    """Write the metrics on valid and note the best step by ``trainer.monitor``: the checkpoint that the stage hands on
    with ``trainer.keep_best``."""
    cfg, label = world.recipe.eval, f"{stage.name} valid"
    result = evaluate(engine, world.samples["valid"], world.catalog, cfg, dp=world.dp, label=label)
    metric = monitored(world.recipe.trainer, cfg.ks)
    stage.write(done.step, {f"valid/{name}": value for name, value in result.means.items()})
    value = -result.means[metric]
    if done.best_value is None or value < done.best_value:
        done.best_value, done.best_step = value, done.step
