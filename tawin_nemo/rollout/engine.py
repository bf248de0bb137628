"""Runs searches over many prompts within the memory, and turns them into rollouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.backbones import FlopCount
from tawin_nemo.config.schema import RolloutConfig
from tawin_nemo.rollout.beam import Answers, BeamSearch, collected
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.rollout.lm import LM, MeteredLM
from tawin_nemo.rollout.negatives import distinct_first, draws_for
from tawin_nemo.rollout.sampling import constrained_sample
from tawin_nemo.rollout.scoring import SCORE_SPACES, best, check_prompts, joined
from tawin_nemo.types import Candidates, DataParallel, PromptBatch, Rollout, TokenRows
from tawin_nemo.util.errors import ConfigError, DataError

#: Called with the number of prompts that just got done.
Progress = Callable[[int], None]

#: New prompts join a running search when this share of the token budget is free: fewer would be run inefficiently.
JOIN_SHARE = 0.25


class Engine(Protocol):
    """Who searches for training and evaluation: this process's own ``RolloutEngine``, or ranks elsewhere.

    ``weight_version`` says which weights are searched with; whoever changes them sets it, and every rollout carries it.
    ``dp``: this process's place among the model's replicas, None where they are those of training. ``spread``: among
    how many replicas one call divides its prompts.
    """

    weight_version: int

    @property
    def dp(self) -> DataParallel | None: ...

    @property
    def spread(self) -> int: ...

    def receive_weights(self) -> None:
        """Bring the weights that are searched with up to date."""

    def search(self, prompts: TokenRows, width: int, *, token_budget: int | None = None) -> Candidates:
        """As ``RolloutEngine.search``."""

    def generate(
        self, prompts: PromptBatch, group_size: int, *, negatives: str, policy_space: str, step: int,
        oversample: float = 1.5,
    ) -> Rollout:  # fmt: skip
        """As ``RolloutEngine.generate``."""

    def pop_flops(self) -> FlopCount:
        """What the model ran since the last time: this replica's, or all that one call is spread among."""


class Generator(ABC):
    """Rollouts out of searches and draws over one catalog, wherever these are made.

    ``weight_version`` says which weights are searched with; whoever changes them sets it, and every rollout carries it.
    """

    def __init__(self, catalog: Catalog, cfg: RolloutConfig, *, seed: int) -> None:
        self.catalog, self.cfg, self.seed = catalog, cfg, seed
        self.weight_version = 0

    @abstractmethod
    def search(self, prompts: TokenRows, width: int, *, token_budget: int | None = None) -> Candidates:
        """Beam search for N prompts, results in their order."""

    @abstractmethod
    def sample(self, prompts: TokenRows, draws: int, seeds: Sequence[int]) -> Candidates:
        """Independent draws for N prompts, results in their order; one seed per prompt."""

    def generate(
        self,
        prompts: PromptBatch,
        group_size: int,
        *,
        negatives: str,
        policy_space: str,
        step: int,
        oversample: float = 1.5,
    ) -> Rollout:
        """G = ``group_size`` candidates for each of B prompts, best score first.

        ``negatives``: ``beam`` searches with ``cfg.width`` beams (0 = G) and keeps the best G; ``sample`` draws G items
        with replacement; ``dynamic`` draws ``ceil(oversample * G)`` and keeps distinct ones (``distinct_first``; the
        kept group is then no sample of the policy). Draws come from a seed that depends on nothing but (seed, step,
        ``row_B``). A candidate is a hit if it ends at the target's leaf, that is, also if it is another item written
        alike. ``logprobs_BGT`` is None if the searched space is not ``policy_space``: the actor has to score the
        candidates itself.
        Raises ConfigError (names, ``cfg.width`` below G, more beams than paths, ``oversample`` below 1) and DataError
        (a target that is no item, prompts as in ``constrained_beam_search``).
        """
        if policy_space not in SCORE_SPACES:
            raise ConfigError(f"rl.policy_space={policy_space!r} is not known; use one of {', '.join(SCORE_SPACES)}")
        target_B = prompts.target_B.cpu().numpy()
        if len(target_B) and not (target_B.min() >= 0 and target_B.max() < len(self.catalog)):
            raise DataError(
                f"targets must be items 0 .. {len(self.catalog) - 1}; got {target_B.min()} .. {target_B.max()}"
            )
        target_leaf_B = torch.from_numpy(self.catalog.leaf_I[target_B])
        space = "trie"  # what draws are made in
        if negatives == "beam":
            found, space = self._best_beams(prompts.prompts, group_size), self.cfg.score_space
        elif negatives == "sample":
            found = self._draw(prompts, group_size, step)
        elif negatives == "dynamic":
            found = self._draw(prompts, draws_for(group_size, oversample), step)
            found = distinct_first(found, target_leaf_B.to(found.leaf_BW.device), group_size)
        else:
            raise ConfigError(f"rl.negatives={negatives!r} is not known; use one of beam, sample, dynamic")
        return Rollout(
            prompts=prompts,
            items_BG=found.items_BW,
            tokens_BGT=found.tokens_BWT,
            lengths_BG=found.lengths_BW,
            scores_BG=found.scores_BW,
            logprobs_BGT=found.logprobs_BWT if space == policy_space else None,
            is_target_BG=found.leaf_BW == target_leaf_B.to(found.leaf_BW.device)[:, None],
            weight_version=self.weight_version,
        )

    def _best_beams(self, prompts: TokenRows, count: int) -> Candidates:
        width = self.cfg.width or count
        if width < count:
            raise ConfigError(f"rollout.width={width} is below rl.group_size={count}; use 0 or at least that")
        self._check_width(width, "rollout.width" if self.cfg.width else "rl.group_size")
        return best(self.search(prompts, width), count)

    def _draw(self, prompts: PromptBatch, draws: int, step: int) -> Candidates:
        return self.sample(prompts.prompts, draws, [draw_seed(self.seed, step, int(row)) for row in prompts.row_B])

    def _check_width(self, width: int, key: str = "the width (rollout.width, rl.group_size or eval.beams)") -> None:
        paths = self.catalog.trie.num_leaves
        if width > paths:
            raise ConfigError(
                f"{key}={width} asks for more beams than the catalog has distinct token paths ({paths}); "
                f"use at most {paths}"
            )


class RolloutEngine(Generator):
    """Beam search and sampling of one model over one catalog.

    ``receive_weights`` brings a model that is not the one in training up to date. ``dp``: this process's place among
    the model's replicas, None where they are those of training.
    """

    def __init__(
        self,
        lm: LM,
        catalog: Catalog,
        cfg: RolloutConfig,
        *,
        seed: int,
        dp: DataParallel | None = None,
        receive_weights: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(catalog, cfg, seed=seed)
        self.lm = lm
        self.dp = dp
        self.receive_weights = receive_weights
        self.spread = 1

    def pop_flops(self) -> FlopCount:
        """What the model ran since the last call; nothing if nobody counts."""
        return self.lm.take() if isinstance(self.lm, MeteredLM) else FlopCount()

    def search(
        self,
        prompts: TokenRows,
        width: int,
        *,
        score_space: str | None = None,
        token_budget: int | None = None,
        progress: Progress | None = None,
        filters: Sequence[ItemFilter] | None = None,
    ) -> Candidates:
        """Beam search for N prompts, results in their order (``constrained_beam_search``; errors as there).

        ``score_space`` and ``token_budget`` default to the configuration, ``filters`` say what each prompt may be
        answered with; see ``stream``.
        Raises ConfigError for more beams than the catalog has paths.
        """
        answers = []
        for part in self.stream(prompts, width, score_space=score_space, token_budget=token_budget, filters=filters):
            answers.append(part)
            if progress is not None:
                progress(len(part))
        return collected(answers, width, self.catalog.trie)

    def stream(
        self,
        prompts: TokenRows,
        width: int,
        *,
        score_space: str | None = None,
        token_budget: int | None = None,
        filters: Sequence[ItemFilter] | None = None,
    ) -> Iterator[Answers]:
        """As ``search``, but results come as soon as they are there; tickets are the prompts' places.

        Prompts run longest first, as many at once as fit into ``token_budget`` tokens, a prompt counting once and
        its beams with all tokens that they may come to; when prompts are done, others take their place. A single
        prompt that is larger than the budget runs alone.
        """
        self._check_width(width)
        check_prompts(self.lm, prompts, self.catalog.trie)
        budget = token_budget or self.cfg.token_budget
        search = BeamSearch(
            self.lm, self.catalog.trie, width,
            score_space=score_space or self.cfg.score_space, length_penalty=self.cfg.length_penalty,
        )  # fmt: skip
        order_N = np.argsort(-prompts.lengths, kind="stable")
        ends_N = search.tokens_of(prompts.lengths[order_N]).cumsum()
        came = 0
        while came < len(prompts) or search.running:
            room = budget - search.held
            if came < len(prompts) and (not search.held or room >= JOIN_SHARE * budget):
                upto = _fitting(ends_N, came, room, at_least=not search.held)
                rows = order_N[came:upto]
                allowed = None if filters is None else [filters[int(row)] for row in rows]
                search.admit(prompts.take(rows), rows, filters=allowed)
                came = upto
            answers = search.advance()
            if len(answers):
                yield answers

    def sample(self, prompts: TokenRows, draws: int, seeds: Sequence[int]) -> Candidates:
        """Independent draws for N prompts, results in their order (``constrained_sample``); one seed per prompt."""
        trie = self.catalog.trie
        check_prompts(self.lm, prompts, trie)
        order_N = np.argsort(-prompts.lengths, kind="stable")
        ends_N = (prompts.lengths[order_N] + draws * trie.decision_depth).cumsum()
        parts: list[Candidates] = []
        start = 0
        while start < len(prompts) or not parts:
            upto = _fitting(ends_N, start, self.cfg.token_budget, at_least=True)
            generators = [torch.Generator().manual_seed(seeds[int(row)]) for row in order_N[start:upto]]
            parts.append(
                constrained_sample(
                    self.lm, prompts.take(order_N[start:upto]), trie, draws,
                    generators=generators, temperature=self.cfg.temperature,
                )
            )  # fmt: skip
            start = upto
        return joined(parts, order_N.argsort())


def _fitting(ends_N: np.ndarray, start: int, room: int, *, at_least: bool) -> int:
    """End of the longest run of entries from ``start`` on whose sizes sum to at most ``room``.

    ``ends_N`` are the running sums of all sizes; ``at_least``: one entry, if there is one, even if it is larger.
    """
    before = int(ends_N[start - 1]) if start else 0
    upto = int(np.searchsorted(ends_N, before + room, side="right"))
    return min(len(ends_N), max(upto, start + at_least))


def draw_seed(seed: int, step: int, row: int) -> int:
    """Seed of one prompt's draws: independent of batch, chunk and rank."""
    return int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0] >> np.uint64(1))
