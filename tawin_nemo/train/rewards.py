"""The rewards of ``rl.reward``: callables from a rollout to ``rewards_BG``. I: items, D: width of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.baselines.load import load_scorer
from tawin_nemo.config.schema import RlConfig
from tawin_nemo.config.seams import reward_terms
from tawin_nemo.data.lazy_rows import TokenSource
from tawin_nemo.data.text_vectors import load_item_vectors, text_vectors
from tawin_nemo.maths.rewards import collaborative_reward, ranking_reward, semantic_reward
from tawin_nemo.run.world import World
from tawin_nemo.train.own_code import own_group_values
from tawin_nemo.types import NO_ITEM, Rollout
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.imports import is_import_path
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


class Reward(Protocol):
    """``rewards_BG`` of a rollout: float, one per candidate, 0 at padding."""

    def __call__(self, rollout: Rollout, /) -> Tensor: ...


class ItemScorer(Protocol):
    """A sequential recommender, as far as a reward needs it."""

    def scores(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Scores [B, I] of all items for each history (item indices, oldest first), higher is better."""


def with_finite_rewards(rollout: Rollout, rewards_BG: Tensor) -> tuple[Rollout, Tensor, int]:
    """The rollout without the candidates whose reward is NaN or infinite, their rewards, and how many those were.

    Such a candidate becomes padding at the end of its group, so that the others of the group are compared and learned
    from as if the search had not found it. Without one both are returned as they are.
    """
    lost_BG = rollout.valid_BG & ~rewards_BG.isfinite()
    count = int(lost_BG.sum())
    if count == 0:
        return rollout, rewards_BG, 0
    log.warning("%d rewards are not finite; their candidates are left out of their groups", count)
    order_BG = lost_BG.to(torch.uint8).argsort(dim=1, stable=True)
    padding_BG = lost_BG.gather(1, order_BG)

    def moved(values_BG: Tensor, filler: float) -> Tensor:
        return values_BG.gather(1, order_BG).masked_fill(padding_BG, filler)

    def moved_tokens(values_BGT: Tensor) -> Tensor:
        order_BGT = order_BG.unsqueeze(2).expand_as(values_BGT)
        return values_BGT.gather(1, order_BGT).masked_fill(padding_BG.unsqueeze(2), 0)

    logprobs_BGT, inserted_BG = rollout.logprobs_BGT, rollout.inserted_BG
    kept = replace(
        rollout,
        items_BG=moved(rollout.items_BG, NO_ITEM),
        tokens_BGT=moved_tokens(rollout.tokens_BGT),
        lengths_BG=moved(rollout.lengths_BG, 0),
        scores_BG=moved(rollout.scores_BG, -torch.inf),
        logprobs_BGT=None if logprobs_BGT is None else moved_tokens(logprobs_BGT),
        is_target_BG=moved(rollout.is_target_BG, False),
        inserted_BG=None if inserted_BG is None else moved(inserted_BG, False),
    )
    return kept, moved(rewards_BG, 0.0), count


@dataclass(frozen=True)
class RuleReward:
    """1 for the target, or an item on its path; else 0."""

    def __call__(self, rollout: Rollout) -> Tensor:
        return (rollout.is_target_BG & rollout.valid_BG).to(torch.float32)


@dataclass(frozen=True)
class RankingReward:
    """``ranking_reward``: the rule, and a penalty for wrong candidates by rank."""

    def __call__(self, rollout: Rollout) -> Tensor:
        return ranking_reward(rollout.scores_BG, rollout.is_target_BG, valid_BG=rollout.valid_BG)


@dataclass(frozen=True, eq=False)
class SemanticReward:
    """``semantic_reward``: the rule, and the similarity to the target. A shared path counts as its first item."""

    vectors_ID: Tensor  # float32, on the CPU like the rollouts
    weight: float

    def __call__(self, rollout: Rollout) -> Tensor:
        target_B = rollout.prompts.target_B.to(rollout.items_BG.device)
        return semantic_reward(
            rollout.items_BG, target_B, self.vectors_ID, is_target_BG=rollout.is_target_BG, weight=self.weight
        )


@dataclass(frozen=True, eq=False)
class CollaborativeReward:
    """``collaborative_reward``: the rule, and what a recommender thinks of the candidate after this history."""

    scorer: ItemScorer
    history: TokenSource  # row r: items of row r of train, oldest first, as the prompt shows them
    weight: float

    def __call__(self, rollout: Rollout) -> Tensor:
        histories = [self.history[row] for row in rollout.prompts.row_B.tolist()]
        scores_BI = self.scorer.scores(histories).float().to(rollout.items_BG.device)
        return collaborative_reward(scores_BI, rollout.items_BG, rollout.is_target_BG, weight=self.weight)


@dataclass(frozen=True)
class WeightedReward:
    """The weighted sum of several rewards."""

    parts: tuple[tuple[float, Reward], ...]

    def __call__(self, rollout: Rollout) -> Tensor:
        return torch.stack([weight * reward(rollout).float() for weight, reward in self.parts]).sum(0)


def build_reward(rl: RlConfig, world: World) -> Reward:
    """The reward that ``rl.reward`` names, with its files loaded: one, or a weighted sum.

    An import path is a function of the rollout, or a class that is made with the world. ``semantic`` without
    ``rl.reward_source`` uses vectors made from the item titles (``text_vectors``), which need no other model. Raises
    ConfigError for an unknown name, code that cannot be imported, ``collaborative`` without a source or with one that
    is not a finished baseline of this catalog (or is tiger); DataError for an unusable embedding file.
    """
    terms = reward_terms(rl.reward)
    if len(terms) == 1 and terms[0].weight == 1.0:
        return named_reward(terms[0].name, rl, world)
    return WeightedReward(tuple((term.weight, named_reward(term.name, rl, world)) for term in terms))


def named_reward(name: str, rl: RlConfig, world: World) -> Reward:
    """One summand of ``rl.reward``; errors as ``build_reward``."""
    if is_import_path(name):
        return own_group_values("rl.reward", name, world)
    if name == "rule":
        return RuleReward()
    if name == "ranking":
        return RankingReward()
    if name == "semantic":
        return SemanticReward(item_vectors(rl, world), rl.reward_weight)
    if name == "collaborative":
        if not rl.reward_source:
            raise ConfigError(
                "rl.reward=collaborative needs rl.reward_source, a finished baseline stage such as RUN_DIR/sasrec "
                "(train one with baseline.model=sasrec)"
            )
        scorer = load_scorer(Path(rl.reward_source), world.catalog.external_ids)
        return CollaborativeReward(scorer, world.samples["train"].history, rl.reward_weight)
    raise ConfigError(f"rl.reward={name!r} is not known; use one of rule, ranking, semantic, collaborative")


def item_vectors(rl: RlConfig, world: World) -> Tensor:
    """Embeddings [I, D] float32 from ``rl.reward_source``, or from the titles where that is empty."""
    if rl.reward_source:
        return torch.from_numpy(load_item_vectors(Path(rl.reward_source), world.catalog.external_ids))
    vectors = text_vectors(world.dataset.items.titles, seed=world.recipe.seed)
    log.info("rl.reward_source is empty: %d-dimensional vectors of the item titles", vectors.shape[1])
    return torch.from_numpy(vectors)
