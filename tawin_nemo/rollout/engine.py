"""Rollout engine: searches over many prompts within a token budget, and rollouts made of their candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.backbones import FlopCount
from tawin_nemo.config.schema import RolloutConfig
from tawin_nemo.rollout.assist import Assistant
from tawin_nemo.rollout.beam import BeamSearch, FinishedPrompts, collect_candidates
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.rollout.fixed_search import FixedShapeSearches
from tawin_nemo.rollout.groups import draws_for, keep_distinct
from tawin_nemo.rollout.lm import LM, MeteredLM
from tawin_nemo.rollout.sampling import constrained_sample, draw_seed
from tawin_nemo.rollout.scoring import SCORE_SPACES, check_prompts
from tawin_nemo.types import Candidates, DataParallel, PromptBatch, Rollout, TokenRows
from tawin_nemo.util.errors import ConfigError, DataError

#: Called with the number of prompts that have just finished.
Progress = Callable[[int], None]

#: New prompts join a running search when this share of the token budget is free: fewer would be run inefficiently.
JOIN_SHARE = 0.25


class Engine(Protocol):
    """The interface of rollouts for training and evaluation: this process's ``RolloutEngine``, or remote ranks.

    ``weight_version``: version of the weights that are searched with. Whoever changes the weights sets it, and every
    rollout carries it.
    """

    weight_version: int

    @property
    def dp(self) -> DataParallel | None:
        """This process's rank among the replicas of the rollout model; None where they are those of training."""
        ...

    @property
    def num_replicas(self) -> int:
        """Number of replicas among which one call divides its prompts."""
        ...

    def receive_weights(self) -> None:
        """Copy the newest weights of the actor into the rollout model."""

    def search(self, prompts: TokenRows, width: int, *, token_budget: int | None = None) -> Candidates:
        """Beam search for N prompts; returns ``width`` candidates each, in the order of the prompts.

        ``token_budget`` (tokens of prompts and beams at once) defaults to ``rollout.token_budget``. Raises ConfigError,
        DataError, CatalogError and TawinError as ``constrained_beam_search``.
        """

    def generate(
        self, prompts: PromptBatch, group_size: int, *, negatives: str, policy_space: str, step: int,
        oversample: float = 1.5,
    ) -> Rollout:  # fmt: skip
        """G candidates for each of B prompts; arguments and errors are those of ``Generator.generate``."""

    def pop_flops(self) -> FlopCount:
        """FLOPs of the model since the last call, summed over ``num_replicas`` replicas; resets the count to zero."""


class Generator(ABC):
    """Turns search results and samples over one catalog into rollouts; subclasses say where these are computed.

    ``weight_version``: version of the weights that are searched with. Whoever changes the weights sets it, and every
    rollout carries it.
    """

    def __init__(self, catalog: Catalog, cfg: RolloutConfig, *, seed: int) -> None:
        self.catalog, self.cfg, self.seed = catalog, cfg, seed
        self.weight_version = 0

    @abstractmethod
    def search(self, prompts: TokenRows, width: int, *, token_budget: int | None = None) -> Candidates:
        """Beam search for N prompts; returns ``width`` candidates each, in the order of the prompts."""

    @abstractmethod
    def sample(self, prompts: TokenRows, draws: int, seeds: Sequence[int]) -> Candidates:
        """``draws`` independent samples for each of N prompts, in their order; ``seeds`` holds one seed per prompt."""

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
        with replacement; ``dynamic`` draws ``ceil(oversample * G)`` and keeps distinct ones (``keep_distinct``; the
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
        space = "trie"  # samples are always drawn in trie space
        if negatives == "beam":
            candidates, space = self._best_beams(prompts.prompts, group_size), self.cfg.score_space
        elif negatives == "sample":
            candidates = self._draw(prompts, group_size, step)
        elif negatives == "dynamic":
            candidates = self._draw(prompts, draws_for(group_size, oversample), step)
            candidates = keep_distinct(candidates, target_leaf_B.to(candidates.leaf_BW.device), group_size)
        else:
            raise ConfigError(f"rl.negatives={negatives!r} is not known; use one of beam, sample, dynamic")
        return Rollout(
            prompts=prompts,
            items_BG=candidates.items_BW,
            tokens_BGT=candidates.tokens_BWT,
            lengths_BG=candidates.lengths_BW,
            scores_BG=candidates.scores_BW,
            logprobs_BGT=candidates.logprobs_BWT if space == policy_space else None,
            is_target_BG=candidates.leaf_BW == target_leaf_B.to(candidates.leaf_BW.device)[:, None],
            weight_version=self.weight_version,
        )

    def _best_beams(self, prompts: TokenRows, count: int) -> Candidates:
        return self.search(prompts, beams_of(count, self.cfg.width, self.catalog.trie.num_leaves)).top(count)

    def _draw(self, prompts: PromptBatch, draws: int, step: int) -> Candidates:
        return self.sample(prompts.prompts, draws, [draw_seed(self.seed, step, int(row)) for row in prompts.row_B])

    def _check_width(self, width: int) -> None:
        check_width(width, self.catalog.trie.num_leaves, "the width (rollout.width, rl.group_size or eval.beams)")


def beams_of(group_size: int, width: int, paths: int) -> int:
    """Beams of a search for ``group_size`` candidates: ``width`` (``rollout.width``), or as many where that is 0.

    Raises ConfigError for a width below the group, or above ``paths``, the distinct token paths of the catalog.
    """
    beams = width or group_size
    if beams < group_size:
        raise ConfigError(f"rollout.width={beams} is below rl.group_size={group_size}; use 0 or at least that")
    check_width(beams, paths, "rollout.width" if width else "rl.group_size")
    return beams


def check_width(width: int, paths: int, key: str) -> None:
    """Raises ConfigError, naming ``key``, for more beams than a catalog has distinct token paths."""
    if width > paths:
        raise ConfigError(
            f"{key}={width} asks for more beams than the catalog has distinct token paths ({paths}); "
            f"use at most {paths}"
        )


class RolloutEngine(Generator):
    """Beam search and sampling of one model over one catalog.

    ``receive_weights`` updates a model that does not share the weights of the actor. ``dp``: this process's rank among
    the replicas of the rollout model, None where they are those of training. ``assistant``: joins the searches that are
    given histories (``rollout.assist``); rollouts are the model's own.
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
        self.num_replicas = 1
        self.assistant: Assistant | None = None
        self._fixed_shapes: FixedShapeSearches | None = None
        if cfg.cuda_graphs == "on":
            self._fixed_shapes = FixedShapeSearches(lm, catalog.trie, length_penalty=cfg.length_penalty)

    def pop_flops(self) -> FlopCount:
        """FLOPs of the model since the last call, then reset to zero; always zero for a model without a meter."""
        return self.lm.pop_flops() if isinstance(self.lm, MeteredLM) else FlopCount()

    def search(
        self,
        prompts: TokenRows,
        width: int,
        *,
        score_space: str | None = None,
        token_budget: int | None = None,
        progress: Progress | None = None,
        filters: Sequence[ItemFilter] | None = None,
        histories: TokenRows | None = None,
    ) -> Candidates:
        """Beam search for N prompts, in their order; semantics and errors are those of ``constrained_beam_search``.

        ``score_space`` and ``token_budget`` default to the configuration (section ``rollout``). ``progress`` is called
        with the number of prompts that have just finished. ``filters``: which items each prompt may be answered with;
        ``histories``: item indices of each prompt's user, for the assistant. Raises ConfigError for more beams than the
        catalog has paths.
        """
        finished, space = [], score_space
        for part in self.stream(
            prompts, width, score_space=space, token_budget=token_budget, filters=filters, histories=histories
        ):
            finished.append(part)
            if progress is not None:
                progress(len(part))
        return collect_candidates(finished, width, self.catalog.trie)

    def stream(
        self,
        prompts: TokenRows,
        width: int,
        *,
        score_space: str | None = None,
        token_budget: int | None = None,
        filters: Sequence[ItemFilter] | None = None,
        histories: TokenRows | None = None,
    ) -> Iterator[FinishedPrompts]:
        """Beam search that yields prompts as soon as they finish; a ticket is the prompt's row in ``prompts``.

        Longest prompts run first, as many at once as fit into ``token_budget`` tokens, a prompt counting once and its
        beams with all tokens that they may need; finished prompts are replaced by waiting ones. A single prompt that is
        larger than the budget runs alone. Arguments and errors are those of ``search``.
        """
        self._check_width(width)
        check_prompts(self.lm, prompts, self.catalog.trie)
        budget, space = token_budget or self.cfg.token_budget, score_space or self.cfg.score_space
        assistant = None if histories is None else self.assistant
        if self._fixed_shapes is not None and filters is None and assistant is None and space == "trie":
            yield from self._fixed_shapes.stream(prompts, width, budget)
            return
        penalty = self.cfg.length_penalty
        search = BeamSearch(self.lm, self.catalog.trie, width, score_space=space, length_penalty=penalty)
        order_N = np.argsort(-prompts.lengths, kind="stable")
        ends_N = search.max_cache_tokens(prompts.lengths[order_N]).cumsum()
        started = 0
        while started < len(prompts) or search.running:
            room = budget - search.cache_tokens
            if started < len(prompts) and (not search.cache_tokens or room >= JOIN_SHARE * budget):
                upto = _fitting(ends_N, started, room, at_least=not search.cache_tokens)
                rows = order_N[started:upto]
                allowed = None if filters is None else [filters[int(row)] for row in rows]
                assist = None if assistant is None or histories is None else assistant(histories.take(rows))
                search.admit(prompts.take(rows), rows, filters=allowed, assist=assist)
                started = upto
            finished = search.advance()
            if len(finished):
                yield finished

    def sample(self, prompts: TokenRows, draws: int, seeds: Sequence[int]) -> Candidates:
        """``draws`` samples for each of N prompts, in their order, by ``constrained_sample``; one seed per prompt."""
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
        return Candidates.cat(parts).take(torch.from_numpy(order_N.argsort()))


def _fitting(ends_N: np.ndarray, start: int, room: int, *, at_least: bool) -> int:
    """End of the longest run of entries from ``start`` on whose sizes sum to at most ``room``.

    ``ends_N`` are the running sums of all sizes; ``at_least``: one entry, if there is one, even if it is larger.
    """
    before = int(ends_N[start - 1]) if start else 0
    upto = int(np.searchsorted(ends_N, before + room, side="right"))
    return min(len(ends_N), max(upto, start + at_least))
