"""The policy that learns: packs rollouts into scored token batches and takes optimizer steps on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config import RlConfig
from tawin_nemo.data.trees import tree_batches
from tawin_nemo.maths.policy_loss import PolicyTerms, grpo_loss, mean_stats
from tawin_nemo.models.megatron.trainable import MicroBatch, Trainable
from tawin_nemo.types import DataParallel, Rollout, TokenBatch, TokenRows


@dataclass(frozen=True)
class PackedCandidates:
    """Some candidates of a rollout as one token batch, and the candidate and token of each of its N log-probs."""

    batch: TokenBatch
    flat_M: Tensor  # the candidates' places in the flattened [B * G] rollout
    candidate_N: Tensor  # 0..M-1
    token_N: Tensor  # place in the candidate's path


class Actor:
    """Wraps the trainable model with the group-relative policy objective (ALGORITHMS: Section 3.3, Eq. 22)."""

    def __init__(self, trainable: Trainable, trie: TokenTrie, rl: RlConfig, dp: DataParallel) -> None:
        self.trainable, self._trie, self._rl, self._dp = trainable, trie, rl, dp

    def pack(self, rollout: Rollout, adv_BG: Tensor, omega_BG: Tensor) -> list[PackedCandidates]:
        """Every prompt once, followed by the tree of its candidates, under the token budget.

        Without a KL term a candidate of weight or advantage 0 has gradient 0: it is left out, which changes nothing
        but the time (groups without a hit are most of a rollout), and so are prompts of which none is left. One
        candidate stays so that no rank has an empty update.
        """
        learns_BG = rollout.valid_BG if self._rl.beta > 0 else rollout.valid_BG & (adv_BG * omega_BG != 0)
        learns_C = learns_BG.flatten() if learns_BG.any() else rollout.valid_BG.flatten()
        flat_C = learns_C.nonzero().squeeze(1)[: None if learns_BG.any() else 1].cpu()
        row_C = (flat_C // rollout.items_BG.shape[1]).numpy()
        learning, prompt_C = np.unique(row_C, return_inverse=True)
        parts = tree_batches(
            rollout.prompts.prompts.take(learning),
            _paths(rollout, flat_C),
            prompt_C,
            self._trie if self._rl.policy_space == "trie" else None,
            self._rl.micro_batch_tokens,
        )
        return [
            PackedCandidates(batch, flat_C[torch.from_numpy(answer_M)], index.answer_N, index.token_N)
            for batch, index, answer_M in parts
        ]

    def behaviour_logprobs(self, rollout: Rollout, packed: Sequence[PackedCandidates]) -> list[Tensor]:
        """Log-probs under the weights that made the rollout: stored by the search, or scored before the update."""
        if rollout.logprobs_BGT is None:
            return self.trainable.score([part.batch for part in packed])
        stored_CT = rollout.logprobs_BGT.flatten(0, 1)
        return [stored_CT[part.flat_M[part.candidate_N], part.token_N] for part in packed]

    def update(
        self,
        rollout: Rollout,
        packed: Sequence[PackedCandidates],
        advantages_BG: Tensor,
        omega_BG: Tensor,
        reference: Sequence[Tensor] | None,
        *,
        lr: float,
    ) -> dict[str, float]:
        """``rl.inner_updates`` optimizer steps on one rollout; returns the statistics of the last one."""
        old = self.behaviour_logprobs(rollout, packed)
        total = sum(self._dp.gather(int(rollout.valid_BG.sum())))
        lengths_C = self._path_lengths(rollout, packed)
        work = []
        for i, part in enumerate(packed):
            terms = PolicyTerms(
                candidate_N=part.candidate_N,
                old_logp_N=old[i],
                ref_logp_N=None if reference is None else reference[i],
                advantage_M=advantages_BG.flatten()[part.flat_M],
                omega_M=omega_BG.flatten()[part.flat_M],
                length_M=lengths_C[part.flat_M],
            )
            work.append(MicroBatch(part.batch, partial(self._loss, terms=terms, num_candidates=total)))
        stats: dict[str, float] = {}
        for _ in range(self._rl.inner_updates):
            stats = self.trainable.update(work, lr=lr)
        return mean_stats(stats)

    def _loss(self, logp_N: Tensor, *, terms: PolicyTerms, num_candidates: int) -> tuple[Tensor, dict[str, Tensor]]:
        rl = self._rl
        return grpo_loss(
            logp_N, terms, num_candidates=num_candidates,
            clip_low=rl.clip_low, clip_high=rl.clip_high, beta=rl.beta, kl=rl.kl,
        )  # fmt: skip

    def _path_lengths(self, rollout: Rollout, packed: Sequence[PackedCandidates]) -> Tensor:
        """|Y| of every candidate: all tokens of its path, or only the branching ones (at least 1)."""
        if self._rl.length_norm == "full":
            return rollout.lengths_BG.flatten().clamp(min=1)
        counts_C = torch.zeros(rollout.items_BG.numel(), dtype=torch.long)
        for part in packed:
            counts_C.index_add_(0, part.flat_M[part.candidate_N], torch.ones_like(part.candidate_N))
        return counts_C.clamp(min=1)


def _paths(rollout: Rollout, flat_C: Tensor) -> TokenRows:
    """Token paths of candidates, given by their places in the flattened rollout."""
    lengths_C = rollout.lengths_BG.flatten().cpu()[flat_C].numpy()
    tokens_CT = rollout.tokens_BGT.flatten(0, 1).cpu()[flat_C].numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths_C)]).astype(np.int64)
    return TokenRows(tokens_CT[np.arange(tokens_CT.shape[1]) < lengths_C[:, None]], offsets)
