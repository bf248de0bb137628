"""The training side of rollouts on generation servers (``rollout.placement: server``).

The first training rank communicates with the servers; every rank makes the same calls with the same prompts and gets
all results, or the same error. Weights are gathered under their Hugging Face names and pushed to every server after
each update. Servers count weight versions for themselves, one up with every push, whatever run they served before; the
pool maps them to the versions of this run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tawin_nemo.api.arrays import RolloutReply
from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.backbones import Backbone, FlopCount
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.hf.memory import gather_hf
from tawin_nemo.models.megatron.model.build import rollout_dtype
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.placement.server_pool import ServerPool
from tawin_nemo.placement.servers import ExpectedTerms, GenerationServer
from tawin_nemo.rollout.engine import Generator
from tawin_nemo.rollout.scoring import empty_candidates
from tawin_nemo.types import NO_ITEM, Candidates, DataParallel, TokenRows

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class ServerEngine(Generator):
    """An ``Engine`` whose model runs on servers; for training there is one replica (``dp``).

    The FLOPs of servers are not counted, because their model calls are shared with other requests. The weights are
    undefined until the first ``receive_weights``. Raises ServersLost when no server is available, ConfigError when one
    does not match the run.
    """

    def __init__(
        self, recipe: Recipe, model: GPTModel, shape: Backbone, catalog: Catalog, *, tokenizer: str = ""
    ) -> None:  # fmt: skip
        super().__init__(catalog, recipe.rollout, seed=recipe.seed)
        self.dp, self.num_replicas = DataParallel(), len(recipe.rollout.servers)
        self._model, self._shape = model, shape
        penalty, self._dtype = recipe.rollout.length_penalty, rollout_dtype(recipe)
        expected = ExpectedTerms(catalog.fingerprint, tokenizer, recipe.rollout_precision, penalty)
        self._pool: ServerPool | None = None

        def connect() -> None:
            self._pool = ServerPool(recipe.rollout, expected)
            weakref.finalize(self, self._pool.close)  # with the engine, or when the process ends

        runtime.on_rank_0(connect)

    def receive_weights(self) -> None:
        """Gather the weights and push them to all servers. Collective. Raises ServersLost when none takes them."""
        tensors = gather_hf(self._model, self._shape)

        def push() -> None:
            assert self._pool is not None
            assert tensors is not None
            self._pool.push({name: value.to(self._dtype or value.dtype) for name, value in tensors.items()})

        runtime.on_rank_0(push)

    def search(self, prompts: TokenRows, width: int, *, token_budget: int | None = None) -> Candidates:
        """The ``width`` best candidates of every prompt, on the CPU of every training rank. Raises ServersLost."""
        self._check_width(width)
        trie, space = self.catalog.trie, self.cfg.score_space
        depth = trie.decision_depth if space == "trie" else trie.max_depth - 1

        def send(server: GenerationServer, version: int, rows: np.ndarray) -> RolloutReply:
            return server.rollouts(prompts.take(rows), version, beams=width, score_space=space)

        return self._request(send, prompts, width, depth, token_budget)

    def sample(self, prompts: TokenRows, draws: int, seeds: Sequence[int]) -> Candidates:
        """``draws`` independent candidates per prompt, with one seed per prompt. Raises ServersLost."""

        def send(server: GenerationServer, version: int, rows: np.ndarray) -> RolloutReply:
            own = [seeds[row] for row in rows.tolist()]
            options: dict[str, Any] = {"draws": draws, "seeds": own, "temperature": self.cfg.temperature}
            return server.rollouts(prompts.take(rows), version, **options)

        return self._request(send, prompts, draws, self.catalog.trie.decision_depth, None)

    def pop_flops(self) -> FlopCount:
        """Always zero: the FLOPs of servers are not counted."""
        return FlopCount()

    def _request(
        self, send: Callable[[GenerationServer, int, np.ndarray], RolloutReply], prompts: TokenRows, width: int,
        depth: int, token_budget: int | None,
    ) -> Candidates:  # fmt: skip
        if len(prompts) == 0:
            return empty_candidates(width, self.catalog.trie.max_depth)

        def fetch() -> bytes:
            assert self._pool is not None
            parts = self._pool.run(prompts.lengths, width, depth, token_budget or self.cfg.token_budget, send)
            order = np.concatenate([rows for rows, _ in parts]).argsort(kind="stable")
            result = Candidates.cat([self._candidates(reply) for _, reply in parts]).take(torch.from_numpy(order))
            first = parts[0][1]
            return RolloutReply(
                result.items_BW, result.tokens_BWT, result.lengths_BW, result.scores_BW, result.logprobs_BWT,
                first.instance, first.catalog, first.weight_version, first.catalog_version,
            ).encoded()  # fmt: skip

        return self._candidates(RolloutReply.decoded(runtime.on_rank_0(fetch)))

    def _candidates(self, reply: RolloutReply) -> Candidates:
        leaf_I = torch.from_numpy(np.append(self.catalog.leaf_I, NO_ITEM))  # NO_ITEM = -1 is the last entry
        return Candidates(
            items_BW=reply.items_BW, leaf_BW=leaf_I[reply.items_BW], tokens_BWT=reply.tokens_BWT,
            lengths_BW=reply.lengths_BW, scores_BW=reply.scores_BW, logprobs_BWT=reply.logprobs_BWT,
        )  # fmt: skip
