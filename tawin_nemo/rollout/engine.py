"""Runs searches over many prompts in chunks that fit the memory, and turns them into rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config import RolloutConfig
from tawin_nemo.errors import ConfigError, DataError
from tawin_nemo.rollout.beam import constrained_beam_search
from tawin_nemo.rollout.lm import LM
from tawin_nemo.rollout.sampling import constrained_sample
from tawin_nemo.rollout.scoring import SCORE_SPACES
from tawin_nemo.types import Candidates, PromptBatch, Rollout, TokenRows

#: Called after each chunk with the number of prompts it held.
Progress = Callable[[int], None]


class RolloutEngine:
    """Beam search and sampling of one model over one catalogue.

    ``weight_version`` says which weights the model holds; whoever changes them sets it, and every rollout carries it.
    """

    def __init__(self, lm: LM, catalog: Catalog, cfg: RolloutConfig, *, seed: int) -> None:
        self.lm = lm
        self.catalog = catalog
        self.cfg = cfg
        self.seed = seed
        self.weight_version = 0

    def search(
        self,
        prompts: TokenRows,
        width: int,
        *,
        score_space: str | None = None,
        token_budget: int | None = None,
        progress: Progress | None = None,
    ) -> Candidates:
        """Beam search for N prompts, results in their order (``constrained_beam_search``; errors as there).

        ``score_space`` and ``token_budget`` default to the configuration. Prompts of similar length run together, in
        chunks of at most ``token_budget`` tokens, counting every beam with its prompt; a single prompt that is larger
        than the budget runs alone.
        """
        space = score_space or self.cfg.score_space

        def run(chunk: TokenRows, _: np.ndarray) -> Candidates:
            return constrained_beam_search(
                self.lm, chunk, self.catalog.trie, width, score_space=space, length_penalty=self.cfg.length_penalty
            )

        return self._in_chunks(prompts, width, token_budget or self.cfg.token_budget, run, progress)

    def sample(self, prompts: TokenRows, draws: int, seeds: Sequence[int]) -> Candidates:
        """Independent draws for N prompts, results in their order (``constrained_sample``); one seed per prompt."""

        def run(chunk: TokenRows, rows: np.ndarray) -> Candidates:
            generators = [torch.Generator().manual_seed(seeds[int(row)]) for row in rows]
            return constrained_sample(
                self.lm, chunk, self.catalog.trie, draws, generators=generators, temperature=self.cfg.temperature
            )

        return self._in_chunks(prompts, draws, self.cfg.token_budget, run, None)

    def generate(
        self, prompts: PromptBatch, group_size: int, *, negatives: str, policy_space: str, step: int
    ) -> Rollout:
        """G = ``group_size`` candidates for each of B prompts, best score first.

        ``negatives``: ``beam`` searches with ``cfg.width`` beams (0 = G) and keeps the best G; ``sample`` draws G items
        with replacement, from a seed that depends on nothing but (seed, step, ``row_B``). A candidate is a hit if it
        ends at the target's leaf, that is, also if it is another item written alike. ``logprobs_BGT`` is None if the
        searched space is not ``policy_space``: the actor has to score the candidates itself.
        Raises ConfigError (names, ``cfg.width`` below G) and DataError (a target that is no item).
        """
        if policy_space not in SCORE_SPACES:
            raise ConfigError(f"rl.policy_space={policy_space!r} is not known; use one of {', '.join(SCORE_SPACES)}")
        target_B = prompts.target_B.cpu().numpy()
        if len(target_B) and not (target_B.min() >= 0 and target_B.max() < len(self.catalog)):
            raise DataError(
                f"targets must be items 0 .. {len(self.catalog) - 1}; got {target_B.min()} .. {target_B.max()}"
            )
        if negatives == "beam":
            width = self.cfg.width or group_size
            if width < group_size:
                raise ConfigError(f"rollout.width={width} is below rl.group_size={group_size}; use 0 or at least that")
            found, space = _best(self.search(prompts.prompts, width), group_size), self.cfg.score_space
        elif negatives == "sample":
            seeds = [draw_seed(self.seed, step, int(row)) for row in prompts.row_B]
            found, space = self.sample(prompts.prompts, group_size, seeds), "trie"
        else:
            raise ConfigError(f"rl.negatives={negatives!r} is not known; use beam or sample")
        target_leaf_B = torch.from_numpy(self.catalog.leaf_I[target_B]).to(found.leaf_BW.device)
        return Rollout(
            prompts=prompts,
            items_BG=found.items_BW,
            tokens_BGT=found.tokens_BWT,
            lengths_BG=found.lengths_BW,
            scores_BG=found.scores_BW,
            logprobs_BGT=found.logprobs_BWT if space == policy_space else None,
            is_target_BG=found.leaf_BW == target_leaf_B[:, None],
            weight_version=self.weight_version,
        )

    def _in_chunks(
        self,
        prompts: TokenRows,
        width: int,
        token_budget: int,
        run: Callable[[TokenRows, np.ndarray], Candidates],
        progress: Progress | None,
    ) -> Candidates:
        found = []
        chunks = length_sorted_chunks(prompts.lengths, self.catalog.trie.max_depth, width, token_budget)
        for rows in chunks:
            found.append(run(prompts.take(rows), rows))
            if progress is not None:
                progress(len(rows))
        if not found:
            return run(prompts, np.arange(0))
        return _joined(found, np.argsort(np.concatenate(chunks)))


def length_sorted_chunks(lengths_N: np.ndarray, depth: int, width: int, token_budget: int) -> list[np.ndarray]:
    """Row indices, longest prompts first, each chunk with rows * width * (longest prompt + depth) <= token_budget."""
    order_N = np.argsort(-lengths_N, kind="stable")
    chunks, start = [], 0
    while start < len(order_N):
        per_row = max(1, width) * (int(lengths_N[order_N[start]]) + depth)
        end = start + max(1, token_budget // per_row)
        chunks.append(order_N[start:end])
        start = end
    return chunks


def draw_seed(seed: int, step: int, row: int) -> int:
    """Seed of one prompt's draws: independent of batch, chunk and rank."""
    return int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _joined(parts: list[Candidates], order_N: np.ndarray) -> Candidates:
    """Concatenate along the prompts, pad to the longest path, and put row ``order_N[i]`` at place i."""
    order = torch.from_numpy(order_N).to(parts[0].items_BW.device)
    depth = max(part.tokens_BWT.shape[-1] for part in parts)

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    def pad(tensor_BWT: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor_BWT, (0, depth - tensor_BWT.shape[-1]))

    return Candidates(
        items_BW=join([part.items_BW for part in parts]),
        leaf_BW=join([part.leaf_BW for part in parts]),
        tokens_BWT=join([pad(part.tokens_BWT) for part in parts]),
        lengths_BW=join([part.lengths_BW for part in parts]),
        scores_BW=join([part.scores_BW for part in parts]),
        logprobs_BWT=join([pad(part.logprobs_BWT) for part in parts]),
    )


def _best(found: Candidates, count: int) -> Candidates:
    return Candidates(
        items_BW=found.items_BW[:, :count],
        leaf_BW=found.leaf_BW[:, :count],
        tokens_BWT=found.tokens_BWT[:, :count],
        lengths_BW=found.lengths_BW[:, :count],
        scores_BW=found.scores_BW[:, :count],
        logprobs_BWT=found.logprobs_BWT[:, :count],
    )
