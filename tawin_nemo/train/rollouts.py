"""Rollouts of RL: the stream of prompts, and G candidates for each of them.

``Rollouts`` hides details from the RL step: on which ranks the engine searches and how prompts and candidates get
there, one-step-ahead rollouts (``rollout.ahead``), insertion of the target into groups without it
(``rl.ensure_target``), DAPO's dynamic sampling (``rl.max_refill_batches``, arXiv 2503.14476, Section 3.2), and the
check that a rollout comes from the expected weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.schema import RlConfig
from tawin_nemo.data.batches import BatchStream, balanced_shard
from tawin_nemo.data.samples import Samples
from tawin_nemo.maths.advantages import zero_std_groups
from tawin_nemo.placement.ahead import RolloutAhead
from tawin_nemo.placement.dispatch import dispatch_rollout, generate_options
from tawin_nemo.placement.weight_sync import check_version
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.rollout.groups import ensure_target
from tawin_nemo.run.stage import Progress
from tawin_nemo.run.timers import Timers
from tawin_nemo.train.rewards import with_finite_rewards
from tawin_nemo.types import DataParallel, PromptBatch, Rollout

#: From a rollout on the CPU to its rewards [B, G].
RewardFunction = Callable[[Rollout], Tensor]
#: The next rollout, on the CPU, and its rewards [B, G].
RolloutWithRewards = Callable[[], tuple[Rollout, Tensor]]


@dataclass
class PromptStream:
    """Batches of prompts one after another; ``position`` is the number of batches taken so far.

    ``batch`` gives this replica's share of batch n, counted from 0, and is a pure function: a stream is restored by
    its position alone.
    """

    batch: Callable[[int], PromptBatch]
    position: int = 0

    @classmethod
    def of(
        cls, samples: Samples, rows: np.ndarray, *, batch_size: int, seed: int, dp: DataParallel
    ) -> PromptStream:  # fmt: skip
        """Shuffled passes over ``rows`` of ``samples`` in batches of ``batch_size`` prompts (at most all rows), of
        which each replica takes a share of similar length."""
        stream = BatchStream(len(rows), min(batch_size, len(rows)), seed=seed)

        def batch(n: int) -> PromptBatch:
            picked = rows[stream.batch(n)]
            return samples.prompt_batch(balanced_shard(picked, samples.prompts.lengths_of(picked), dp))

        return cls(batch)

    def take(self) -> PromptBatch:
        """The next batch."""
        self.position += 1
        return self.batch(self.position - 1)

    def peek(self) -> PromptBatch:
        """The batch that ``take`` will return next."""
        return self.batch(self.position)


class Rollouts:
    """Rollouts of ``engine`` for this training replica's prompts, under section ``rl`` of the recipe.

    ``dp`` are the replicas of training. With ``ahead_until`` = n > 0 (``rollout.ahead``) the rollouts of steps 1 to
    n - 1 are searched during the step before. ``timers`` count the phases ``data`` and ``generate``.
    """

    def __init__(
        self,
        rl: RlConfig,
        engine: Engine,
        catalog: Catalog,
        dp: DataParallel,
        prompts: PromptStream,
        timers: Timers,
        *,
        ahead_until: int = 0,
    ) -> None:
        self.engine, self.prompts = engine, prompts
        self._rl, self._catalog, self._dp, self._timers = rl, catalog, dp, timers
        self._ahead = RolloutAhead(engine, rl, dp, ahead_until) if ahead_until else RolloutAhead()

    def next_prompts(self) -> PromptBatch:
        """This replica's share of the next batch of prompts."""
        with self._timers("data"):
            return self.prompts.take()

    def generate(self, prompts: PromptBatch, step: int) -> Rollout:
        """G candidates per prompt, on the engine's device, from the weights of version ``step``.

        A rollout that was made one step ahead is one version older. Raises TawinError when the weights have another
        version.
        """
        with self._timers("generate"):
            rollout = self._ahead.take(step)
            if rollout is not None:
                return rollout
            if self.engine.dp is None:
                rollout = self._search(prompts, step)
            else:
                rollout = dispatch_rollout(partial(self._search, step=step), prompts, self._dp, self.engine.dp)
            check_version(rollout, expected=step)
            return ensure_target(rollout, self._catalog) if self._rl.ensure_target == "replace_last" else rollout

    def _search(self, prompts: PromptBatch, step: int) -> Rollout:
        return self.engine.generate(prompts, **generate_options(self._rl, step))

    def refill(
        self, rollout: Rollout, rewards_BG: Tensor, reward: RewardFunction, step: int
    ) -> tuple[Rollout, Tensor, int]:
        """The informative groups of ``rollout`` and of up to ``rl.max_refill_batches`` further rollouts of the same
        weights, with their rewards, on the CPU; and the number of rollouts added (``refilled``)."""

        def further() -> tuple[Rollout, Tensor]:
            more = self.generate(self.next_prompts(), step).to("cpu")
            with self._timers("reward"):
                return with_finite_rewards(more, reward(more))[:2]

        wanted, most = self._rl.prompts_per_step, self._rl.max_refill_batches
        return refilled(rollout, rewards_BG, further, wanted=wanted, most=most, dp=self._dp)

    def exhausted(self, total: int) -> bool:
        """Whether refills have used up the prompts of ``total`` steps; with ``rl.max_steps`` they never do."""
        return self._rl.max_refill_batches > 0 and self._rl.max_steps == 0 and self.prompts.position >= total

    def searching_ahead(self, step: int) -> AbstractContextManager[None]:
        """With ``rollout.ahead``, make the rollout of ``step`` while the block runs, with the weights at its beginning.

        ``generate(prompts, step)`` then returns it. Without ``rollout.ahead`` the block has no effect.
        """
        return self._ahead.searching(self.prompts.peek, self._timers, step=step)

    def staleness(self, rollout: Rollout, step: int) -> dict[str, float]:
        """``rl/staleness``, in weight versions; empty without ``rollout.ahead``."""
        return self._ahead.staleness(rollout, step=step)

    def save_state(self, progress: Progress) -> None:
        """Record the position in the stream and the pending rollout in the checkpoint's ``progress``.

        The position on disk counts the batch of that rollout as drawn.
        """
        progress.facts = self._ahead.state()
        progress.batches = self.prompts.position + bool(progress.facts)

    def restore(self, progress: Progress) -> None:
        """Continue from ``progress``. Raises CheckpointError when the present data give other prompts."""
        self.prompts.position = progress.batches - bool(progress.facts)
        if progress.facts:
            self._ahead.restore(progress.facts, self.prompts.peek())


def informative(rollout: Rollout, rewards_BG: Tensor) -> tuple[Rollout, Tensor]:
    """The groups whose rewards differ, with their rewards: in all others every advantage is 0."""
    rows = (~zero_std_groups(rewards_BG, rollout.valid_BG)).nonzero().squeeze(1)
    return rollout.take(rows), rewards_BG[rows]


def refilled(
    rollout: Rollout, rewards_BG: Tensor, further: RolloutWithRewards, *, wanted: int, most: int, dp: DataParallel
) -> tuple[Rollout, Tensor, int]:
    """DAPO's dynamic sampling: informative groups only, from this rollout and up to ``most`` further ones.

    Returns the groups, their rewards and the number of rollouts added. All replicas continue until they have
    ``wanted`` such groups together; groups beyond ``wanted`` are kept, since they cost nothing more. Without a single
    informative group the first rollout is returned unchanged, so that the step has a batch.
    """
    kept = [informative(rollout, rewards_BG)]

    def count() -> int:
        return sum(dp.gather(sum(len(part.prompts) for part, _ in kept)))

    added = 0
    while added < most and count() < wanted:
        kept.append(informative(*further()))
        added += 1
    if count() == 0:
        return rollout, rewards_BG, added
    return Rollout.cat([part for part, _ in kept]), torch.cat([rewards for _, rewards in kept]), added
