"""Reinforcement learning with TAWin: the loop that the rest of the package exists for.

One step: roll out G catalogue items per prompt, reward them, turn rewards into group advantages, weight the negatives
so that training aims at the chosen Top-K (TAWin), score them under the reference, update the actor, hand the new
weights to the rollout engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.backbones import Work
from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config import RlConfig
from tawin_nemo.data.batches import BatchStream, balanced_shard
from tawin_nemo.eval.evaluate import evaluate
from tawin_nemo.maths.advantages import group_advantages, zero_std_groups
from tawin_nemo.maths.rewards import ranking_reward
from tawin_nemo.maths.tawin import tawin_weights
from tawin_nemo.models.megatron import parallel
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.ensure_target import ensure_target
from tawin_nemo.rollout.metered import MeteredLM
from tawin_nemo.train.actor import Actor
from tawin_nemo.train.mfu import batch_work, total_peak_flops
from tawin_nemo.train.reference import Reference
from tawin_nemo.train.schedule import scheduled
from tawin_nemo.train.stage import Progress, Stage
from tawin_nemo.train.timers import Timers, count_update
from tawin_nemo.train.weight_sync import check_version, sync_weights
from tawin_nemo.train.world import World
from tawin_nemo.types import DataParallel, PromptBatch, Rollout, TokenBatch


def train_rl(
    world: World, stage: Stage, actor: Actor, build_reference: Callable[[], Reference], engine: RolloutEngine
) -> None:
    """Run ``rl.max_steps`` rollouts (or ``rl.epochs`` passes) over the RL rows, resuming where a killed run stopped."""
    rl, seed, samples, rows = world.recipe.rl, world.recipe.seed, world.samples["train"], world.train_rows_for_rl
    stream = BatchStream(len(rows), min(rl.prompts_per_step, len(rows)), seed=seed)
    total = total_steps(rl, len(rows))
    lengths_N = samples.prompts.lengths
    done = stage.resume(actor.trainable)
    reference = build_reference()
    roles = Roles(rl, world.catalog, engine, actor, reference)
    timers = Timers(total_peak_flops(world.recipe), world.dp)
    sync_weights(engine, version=done.step)
    for step in stage.steps(done.step, total):
        parallel.seed_step(seed, step)
        with timers("data"):
            picked = rows[stream.batch(step)]
            prompts = samples.prompt_batch(balanced_shard(picked, lengths_N[picked], world.dp))
        lr = scheduled(rl, step, total)
        rollout, rewards_BG, stats = rl_step(roles, prompts, timers, step=step, lr=lr)
        done.step = step + 1
        facts = rollout_facts(rollout, rewards_BG, world.dp)
        stage.write(done.step, {**facts, **prefixed(stats), "lr": lr}, timers.report())
        validated = due(done.step, world.recipe.trainer.val_check_interval) and validate(world, stage, engine, done)
        if validated or due(done.step, world.recipe.trainer.save_interval) or done.step == total:
            stage.save(actor.trainable, done)
        stage.stop_if_out_of_time(actor.trainable, done)
    best = done.best_step if world.recipe.trainer.keep_best and done.best_step >= 0 else done.step
    stage.finish(done, chosen_step=best)


@dataclass(frozen=True)
class Roles:
    """Who takes part in a step."""

    rl: RlConfig
    catalog: Catalog
    engine: RolloutEngine
    actor: Actor
    reference: Reference


def rl_step(
    roles: Roles, prompts: PromptBatch, timers: Timers, *, step: int, lr: float
) -> tuple[Rollout, Tensor, dict[str, float]]:
    """One step with weights of version ``step``, which leaves version ``step + 1``: rollout, rewards_BG, statistics."""
    rl, engine, actor = roles.rl, roles.engine, roles.actor
    take_search_work(engine)  # a validation may have searched since the last step
    with timers("generate"):
        rollout = roll_out(rl, engine, prompts, step, roles.catalog)
    with timers("reward"):
        rewards_BG = reward(rl, rollout)
        adv_BG = group_advantages(rewards_BG, std=rl.std, valid_BG=rollout.valid_BG)
        omega_BG = candidate_weights(rl, rollout)
    with timers("data"):
        packed = actor.pack(rollout, adv_BG, omega_BG)
        batches = [part.batch for part in packed]
    with timers("reference"):
        ref = roles.reference.logprobs(batches)
    with timers("update"):
        stats = actor.update(rollout, packed, adv_BG, omega_BG, ref, lr=lr)
    with timers("sync"):
        sync_weights(engine, version=step + 1)
    count_work(timers, roles, rollout, batches, scored=ref is not None)
    return rollout, rewards_BG, stats


def roll_out(rl: RlConfig, engine: RolloutEngine, prompts: PromptBatch, step: int, catalog: Catalog) -> Rollout:
    """G candidates per prompt from the weights of exactly this step."""
    rollout = engine.generate(prompts, rl.group_size, negatives=rl.negatives, policy_space=rl.policy_space, step=step)
    check_version(rollout, expected=step)
    return ensure_target(rollout, catalog) if rl.ensure_target == "replace_last" else rollout


def count_work(timers: Timers, roles: Roles, rollout: Rollout, batches: Sequence[TokenBatch], *, scored: bool) -> None:
    """What the phases of this step had to compute; ``scored``: the reference ran."""
    shape = roles.actor.trainable.shape
    ran, path_tokens = take_search_work(roles.engine), int(rollout.lengths_BG.sum())
    timers.count("generate", tokens=path_tokens, rows=ran.tokens, flops=ran.forward_flops(shape))
    if scored:
        once, tokens = batch_work(batches, shape.vocab), sum(len(batch.target_N) for batch in batches)
        timers.count("reference", tokens=tokens, rows=once.tokens, flops=once.forward_flops(shape))
    count_update(timers, batches, shape, passes=roles.rl.inner_updates)


def take_search_work(engine: RolloutEngine) -> Work:
    """What the engine's model ran since the last call; nothing if nobody counts."""
    return engine.lm.take() if isinstance(engine.lm, MeteredLM) else Work()


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def total_steps(rl: RlConfig, rows: int) -> int:
    """Rollouts of a run: ``rl.max_steps``, or what ``rl.epochs`` passes over ``rows`` need."""
    return rl.max_steps or max(1, round(rl.epochs * rows / min(rl.prompts_per_step, rows)))


def reward(rl: RlConfig, rollout: Rollout) -> Tensor:
    """rewards_BG: 1 for the target (or an item on its path); ``ranking`` adds ReRe's penalty by rank."""
    if rl.reward == "ranking":
        return ranking_reward(rollout.scores_BG, rollout.is_target_BG, valid_BG=rollout.valid_BG)
    return rollout.is_target_BG.to(torch.float32)


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


def rollout_facts(rollout: Rollout, rewards_BG: Tensor, dp: DataParallel) -> dict[str, float]:
    """What a person watches during RL, over all data-parallel ranks."""
    valid = rollout.valid_BG
    sums = np.array([
        len(rollout.prompts),
        float(valid.sum()),
        float((rewards_BG * valid).sum(dtype=torch.float64)),
        float(rollout.is_target_BG.any(dim=1).sum()),
        float(zero_std_groups(rewards_BG, valid).sum()),
        float((valid.sum(dim=1) < valid.shape[1]).sum()),
    ])  # fmt: skip
    groups, candidates, rewards, hits, zero_std, short = np.sum(dp.gather(sums), axis=0).tolist()
    return {
        "rl/reward": rewards / candidates,
        "rl/hit_rate": hits / groups,
        "rl/frac_zero_std_groups": zero_std / groups,
        "rl/frac_short_groups": short / groups,
    }


def prefixed(stats: dict[str, float]) -> dict[str, float]:
    return {name if name == "grad_norm" else f"rl/{name}": value for name, value in stats.items()}


def validate(world: World, stage: Stage, engine: RolloutEngine, done: Progress) -> bool:
    """NDCG at the largest cut-off on valid decides which checkpoint the stage hands on."""
    cfg = world.recipe.eval
    result = evaluate(engine, world.samples["valid"], world.catalog, cfg, dp=world.dp, label=f"{stage.name} valid")
    metric = f"ndcg@{max(cfg.ks)}"
    stage.write(done.step, {f"valid/{name}": value for name, value in result.means.items()})
    value = -result.means[metric]
    if done.best_value is None or value < done.best_value:
        done.best_value, done.best_step = value, done.step
    return True
