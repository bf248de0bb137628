"""Reinforcement learning with TAWin (arXiv 2604.22504): one step (``rl_step``) and the loop over steps (``train_rl``).

A step generates G catalog items for each of B prompts, computes their rewards, group advantages and TAWin weights,
scores them under the reference, updates the actor, and sends the new weights to the rollout engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tawin_nemo.config.schema import ReferenceConfig, RlConfig
from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.maths.tawin import tawin_weights
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.placement.weight_sync import comparing_engine, sync_weights
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.bad_steps import Guard, step_guard, unguarded
from tawin_nemo.run.schedule import scheduled
from tawin_nemo.run.stage import Progress, Stage, monitored
from tawin_nemo.run.timers import Timers
from tawin_nemo.run.world import World
from tawin_nemo.train.actor import Actor, weighted_groups
from tawin_nemo.train.evaluation import evaluate_split
from tawin_nemo.train.own_code import OwnGroupValues, own_group_values
from tawin_nemo.train.plan import total_steps
from tawin_nemo.train.precision_overlap import PrecisionOverlap
from tawin_nemo.train.reference import Reference, Refresh
from tawin_nemo.train.rewards import Reward, build_reward, with_finite_rewards
from tawin_nemo.train.rl_metrics import count_flops, prefixed, rollout_metrics
from tawin_nemo.train.rollouts import PromptStream, Rollouts
from tawin_nemo.types import Rollout
from tawin_nemo.util.imports import is_import_path

#: Advantages [B, G] of a rollout from its rewards [B, G]; weights omega [B, G] of its candidates.
Advantages = Callable[[Tensor, Rollout], Tensor]
CandidateWeights = Callable[[Rollout], Tensor]


@dataclass(frozen=True)
class RlComponents:
    """The parts of an RL step, and section ``rl`` of the recipe."""

    rl: RlConfig
    rollouts: Rollouts
    actor: Actor
    reference: Reference
    reward: Reward
    timers: Timers
    guard: Guard = unguarded
    own_advantages: Advantages | None = None  # None: those of the group, by ``rl.std``
    own_weights: CandidateWeights | None = None  # None: those of TAWin, by ``rl.tawin``
    overlap: PrecisionOverlap | None = None  # None: one precision is in use

    def advantages(self, rewards_BG: Tensor, rollout: Rollout) -> Tensor:
        """Group advantages, or what ``rl.advantage`` names. [B, G]."""
        if self.own_advantages is not None:
            return self.own_advantages(rewards_BG, rollout)
        return group_advantages(rewards_BG, std=self.rl.std, valid_BG=rollout.valid_BG)

    def weights(self, rollout: Rollout) -> Tensor:
        """TAWin's weights, or what ``rl.candidate_weights`` names. [B, G]."""
        return candidate_weights(self.rl, rollout) if self.own_weights is None else self.own_weights(rollout)


def rl_step(components: RlComponents, *, step: int, lr: float) -> dict[str, float]:
    """Take one RL step from weights of version ``step`` to version ``step + 1``; returns the metrics to log.

    Rewards, advantages, weights and packing are a few numbers per candidate and are computed on the CPU. Raises
    TawinError when the rollout comes from weights of another version.
    """
    rl, rollouts, actor, timers = components.rl, components.rollouts, components.actor, components.timers
    rollouts.engine.pop_flops()  # drop the count of a validation after the last step
    with actor.trainable.optimizer_offloaded():
        prompts = rollouts.next_prompts()
        rollout = rollouts.generate(prompts, step).to("cpu")
        overlap: dict[str, float] = {}
        if components.overlap is not None:
            with timers("overlap"):
                overlap = components.overlap(rollout, step)
        with timers("reward"):
            rollout, rewards_BG, masked = with_finite_rewards(rollout, components.reward(rollout))
        metrics = rollout_metrics(rollout, rewards_BG, actor.dp, masked) | rollouts.staleness(rollout, step) | overlap
        path_tokens = int(rollout.lengths_BG.sum())
        if rl.max_refill_batches:
            rollout, rewards_BG, added = rollouts.refill(rollout, rewards_BG, components.reward, step)
            metrics["rl/refill_batches"] = float(added)
    with timers("reward"):
        adv_BG = components.advantages(rewards_BG, rollout)
        adv_BG = weighted_groups(adv_BG, rollout.inserted_BG, rl.inserted_weight)
        omega_BG = components.weights(rollout)
    with timers("data"):
        packed = actor.pack(rollout, adv_BG, omega_BG)
        batches = [part.batch for part in packed]
    with rollouts.searching_ahead(step + 1):
        with timers("reference"):
            ref = components.reference.logprobs(batches)
        with timers("update"):
            stats = components.guard(partial(actor.update, rollout, packed, adv_BG, omega_BG, ref, lr=lr), batches)
    with timers("sync"):
        sync_weights(rollouts.engine, version=step + 1)
    count_flops(timers, rollouts.engine, actor.dp, actor.trainable.shape, batches,
                path_tokens=path_tokens, scored=ref is not None, passes=rl.inner_updates)  # fmt: skip
    return {**metrics, **prefixed(stats)}


def candidate_weights(rl: RlConfig, rollout: Rollout) -> Tensor:
    """The weights omega_BG of TAWin (arXiv 2604.22504, Eq. 21), [B, G] float32; ones at candidates when it is off."""
    tawin = rl.tawin
    if not tawin.enabled:
        return rollout.valid_BG.to(torch.float32)
    anchor = float(tawin.target_k - 1) if tawin.target_k else tawin.anchor
    return tawin_weights(
        rollout.scores_BG, rollout.is_target_BG,
        k=tawin.k, tau=tawin.tau, anchor=anchor, window=tawin.window, mass=tawin.mass, valid_BG=rollout.valid_BG,
    )  # fmt: skip


def train_rl(
    world: World, stage: Stage, actor: Actor, build_reference: Callable[[], Reference], engine: Engine
) -> None:
    """Run ``rl.max_steps`` steps, or ``rl.epochs`` passes over the RL rows, from the newest checkpoint of the stage on.

    Validates, saves and logs into ``stage``. Raises Preempted after a signal, when the last step has been saved.
    """
    rl, trainer = world.recipe.rl, world.recipe.trainer
    total = total_steps(rl, len(world.train_rows_for_rl))
    done = stage.resume(actor.trainable)
    refresh = refresh_of(world.recipe.reference)
    reference = resumed_reference(build_reference(), refresh, stage, done)
    timers = Timers.of(world.recipe, world.dp)
    rollouts = build_rollouts(world, engine, timers, total)
    rollouts.restore(done)
    components = RlComponents(
        rl, rollouts, actor, reference, build_reward(rl, world), timers, step_guard(stage, done),
        build_own("rl.advantage", rl.advantage, world), build_own("rl.candidate_weights", rl.candidate_weights, world),
        build_overlap(world, actor),
    )  # fmt: skip
    save = partial(save_checkpoint, stage, components, refresh, done)
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
            save()
        stage.save_or_stop(save, done)
    best = done.best_step if trainer.keep_best and done.best_step >= 0 else done.step
    stage.finish(done, chosen_step=best)


def build_own(key: str, name: str, world: World) -> OwnGroupValues | None:
    """The function at an import path, None for a name of the product. Raises ConfigError as ``seams.made``."""
    return own_group_values(key, name, world) if is_import_path(name) else None


def build_rollouts(world: World, engine: Engine, timers: Timers, total: int) -> Rollouts:
    """Rollouts of the RL rows of train: ``rl.prompts_per_step`` prompts a step, over all replicas together."""
    recipe = world.recipe
    prompts = PromptStream.of(
        world.samples["train"], world.train_rows_for_rl,
        batch_size=recipe.rl.prompts_per_step, seed=recipe.seed, dp=world.dp,
    )  # fmt: skip
    ahead_until = total if recipe.rollout.ahead else 0
    return Rollouts(recipe.rl, engine, world.catalog, world.dp, prompts, timers, ahead_until=ahead_until)


def build_overlap(world: World, actor: Actor) -> PrecisionOverlap | None:
    """The comparison of rollouts in two precisions, every ``rollout.overlap_interval`` steps; None with one alone."""
    recipe, interval = world.recipe, world.recipe.rollout.overlap_interval
    if interval == 0:
        return None
    engine = comparing_engine(recipe, actor.trainable.model, world.shape, world.catalog)
    return None if engine is None else PrecisionOverlap(engine, recipe.rl, world.dp, interval)


def refresh_of(cfg: ReferenceConfig) -> Refresh:
    """How the reference follows the actor, from section ``reference``."""
    return Refresh(cfg.refresh, cfg.refresh_steps, cfg.refresh_decay)


def resumed_reference(reference: Reference, refresh: Refresh, stage: Stage, done: Progress) -> Reference:
    """``reference`` with the weights of its last checkpoint when it follows the actor and the stage is resumed."""
    if refresh.kind != "off" and done.step > 0:
        reference.load(stage.directory / "reference" / f"step_{done.step}")
    return reference


def save_checkpoint(stage: Stage, components: RlComponents, refresh: Refresh, done: Progress) -> None:
    """Write the checkpoint of a step: the reference first, so that every checkpoint of the actor has its reference."""
    if refresh.kind != "off":
        stage.save_beside("reference", components.reference.save, done)
    components.rollouts.save_state(done)
    stage.save(components.actor.trainable, done)


def due(step: int, interval: int) -> bool:
    """Whether ``step`` (from 1) is a multiple of ``interval``; never for interval 0."""
    return interval > 0 and step % interval == 0


def validate(world: World, stage: Stage, engine: Engine, done: Progress) -> None:
    """Evaluate on valid, log the metrics, and record in ``done`` whether the step is the best by ``trainer.monitor``.

    With ``trainer.keep_best`` the stage ends with the checkpoint of the best step.
    """
    means = evaluate_split(world, engine, "valid", label=f"{stage.name} valid").means
    stage.write(done.step, {f"valid/{name}": value for name, value in means.items()})
    value = -means[monitored(world.recipe.trainer, world.recipe.eval.ks)]  # Progress keeps the smallest
    if done.best_value is None or value < done.best_value:
        done.best_value, done.best_step = value, done.step
