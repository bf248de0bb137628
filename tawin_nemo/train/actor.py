"""The actor (trained policy): packs rollouts into token batches and takes optimizer steps on them.

Axes beyond ``types``: C candidates of the whole rollout (flattened B * G) that are packed, M paths of one packed batch,
N log-probs of one packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.schema import RlConfig
from tawin_nemo.data.trees import tree_batches
from tawin_nemo.maths.dapo import dapo_loss
from tawin_nemo.maths.grpo import grpo_loss
from tawin_nemo.maths.gspo import gspo_loss
from tawin_nemo.maths.policy_loss import Counts, Objective, PolicyTerms, candidate_sums, mean_stats
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.train.own_code import PolicyLoss, own_policy_loss
from tawin_nemo.types import DataParallel, Rollout, TokenBatch, TokenRows

LOSSES: dict[str, PolicyLoss] = {"grpo": grpo_loss, "dapo": dapo_loss, "gspo": gspo_loss}


def policy_loss(name: str) -> PolicyLoss:
    """The objective that ``rl.algorithm`` names, one of ``LOSSES`` or one's own by import path.

    Raises ConfigError for code that cannot be imported.
    """
    return LOSSES[name] if name in LOSSES else own_policy_loss(name)


@dataclass(frozen=True)
class PackedCandidates:
    """Some paths of a rollout as one token batch, and the path and token of each of its N log-probs.

    With ``rl.sft_weight`` the targets lie in the trees as well: path ``B * G + b`` is the target of prompt b.
    """

    batch: TokenBatch
    flat_M: Tensor  # indices of the M paths in the flattened [B * G] rollout, or B * G + b
    candidate_N: Tensor  # which of the M paths the log-prob belongs to
    token_N: Tensor  # which token of its path

    def of_target_N(self, num_candidates: int) -> Tensor:
        """bool: the log-prob is one of a target that was added, not of a candidate."""
        return (self.flat_M >= num_candidates)[self.candidate_N]


class Actor:
    """Wraps the trainable model with the group-relative policy objective (ALGORITHMS: Section 3.3, Eq. 22)."""

    def __init__(self, trainable: Trainable, catalog: Catalog, rl: RlConfig, dp: DataParallel) -> None:
        self.trainable, self._catalog, self._rl, self.dp = trainable, catalog, rl, dp
        self._policy_loss = policy_loss(rl.algorithm)
        # the targets always have a gradient; FP8's delayed scales follow the forward passes
        self._may_be_empty = rl.sft_weight == 0 and trainable.config.fp8 is None

    def pack(self, rollout: Rollout, adv_BG: Tensor, omega_BG: Tensor) -> list[PackedCandidates]:
        """Every prompt once, followed by the tree of its candidates, under the token budget.

        Groups whose advantages are all 0 are left out with ``rl.kl_groups=informative``. Without a KL term a candidate
        of weight or advantage 0 has gradient 0. Such candidates, and prompts without
        other candidates, are not packed; this saves time (most groups of a rollout have no hit) and does not change the
        update. When the gradient of the whole step is 0, nothing is packed on any rank; else at least one candidate
        is, so that no rank has an empty update. Collective over data-parallel ranks.
        """
        learns_BG = rollout.valid_BG
        if self._rl.beta == 0:
            learns_BG = learns_BG & (adv_BG * omega_BG != 0)
            if self._may_be_empty and not any(self.dp.gather(bool(learns_BG.any()))):
                return []
        elif self._rl.kl_groups == "informative":
            learns_BG = learns_BG & (adv_BG != 0).any(dim=1, keepdim=True)
        learns_C = learns_BG.flatten() if learns_BG.any() else rollout.valid_BG.flatten()
        flat_C = learns_C.nonzero().squeeze(1)[: None if learns_BG.any() else 1].cpu()
        row_C, paths = flat_C // rollout.items_BG.shape[1], _paths(rollout, flat_C)
        if self._rl.sft_weight > 0:
            flat_C, row_C, paths = self._with_targets(rollout, flat_C, row_C, paths)
        learning, prompt_C = np.unique(row_C.numpy(), return_inverse=True)
        parts = tree_batches(
            rollout.prompts.prompts.take(learning),
            paths,
            prompt_C,
            self._catalog.trie if self._rl.policy_space == "trie" else None,
            self._rl.micro_batch_tokens,
        )
        return [
            PackedCandidates(batch, flat_C[torch.from_numpy(answer_M)], index.answer_N, index.token_N)
            for batch, index, answer_M in parts
        ]

    def _with_targets(
        self, rollout: Rollout, flat_C: Tensor, row_C: Tensor, paths: TokenRows
    ) -> tuple[Tensor, Tensor, TokenRows]:
        """Add the target of every prompt after the candidates of that prompt."""
        target_B = rollout.prompts.target_B.cpu().numpy()
        row_B = torch.arange(len(target_B))
        targets = self._catalog.paths.take(target_B)
        flat_C = torch.cat([flat_C, rollout.items_BG.numel() + row_B])
        row_C = torch.cat([row_C, row_B])
        order_C = row_C.argsort(stable=True)
        offsets = np.concatenate([paths.offsets, paths.offsets[-1] + targets.offsets[1:]])
        both = TokenRows(np.concatenate([paths.flat, targets.flat]), offsets)
        return flat_C[order_C], row_C[order_C], both.take(order_C.numpy())

    def behaviour_logprobs(self, rollout: Rollout, packed: Sequence[PackedCandidates]) -> list[Tensor]:
        """Log-probs of the candidates' tokens under the weights that made the rollout, one tensor per part.

        The search stores them where it can; the others (NaN) are scored now, before the first update. Targets that
        ``rl.sft_weight`` added have none.
        """
        num = rollout.items_BG.numel()
        kept = [(~part.of_target_N(num)).nonzero().squeeze(1) for part in packed]
        if rollout.logprobs_BGT is not None:
            stored_CT = rollout.logprobs_BGT.flatten(0, 1)
            known = [
                stored_CT[part.flat_M[part.candidate_N[own]], part.token_N[own]]
                for part, own in zip(packed, kept, strict=True)
            ]
            if not any(bool(part.isnan().any()) for part in known):
                return known
        scored = [logp[own] for logp, own in zip(self._score(packed), kept, strict=True)]
        if rollout.logprobs_BGT is None:
            return scored
        return [torch.where(old.isnan(), new, old) for old, new in zip(known, scored, strict=True)]

    def _score(self, packed: Sequence[PackedCandidates]) -> list[Tensor]:
        """On the CPU, where rollouts are."""
        return [logp_N.cpu() for logp_N in self.trainable.score([part.batch for part in packed])]

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
        """``rl.inner_updates`` optimizer steps on one rollout; returns the statistics of the last one.

        ``mismatch_kl`` and ``mismatch_prob_error`` compare the training forward pass with the rollout's before
        anything is learned (``token_stats``); of a rollout searched ahead the step in between is part of it. When no
        rank has anything packed (see ``pack``) the steps are those of a gradient of 0, and what only a forward pass
        shows is absent; a rank without prompts alone takes part in the others' step. Collective.
        """
        if self._rl.beta == 0 and self._may_be_empty and not any(self.dp.gather(bool(packed))):
            zero = {"policy_loss": 0.0, "loss": 0.0, "scored_tokens": 0.0}
            norms = [self.trainable.update_without_gradient(lr=lr) for _ in range(self._rl.inner_updates)]
            return {**zero, "grad_norm": norms[-1]}
        terms = self._terms(rollout, packed, advantages_BG, omega_BG, reference)
        lengths_BG = self._path_lengths(rollout, packed).view(rollout.items_BG.shape)
        target_tokens = int(self._catalog.paths.lengths_of(rollout.prompts.target_B.cpu().numpy()).sum())
        sizes = np.array([int(rollout.valid_BG.sum()), int((lengths_BG * rollout.valid_BG).sum()), target_tokens])
        candidates, tokens, targets = np.sum(self.dp.gather(sizes), axis=0).tolist()
        counts, num = Counts(max(candidates, 1), max(tokens, 1)), rollout.items_BG.numel()
        micro_batches = [
            MicroBatch(
                part.batch,
                partial(
                    self._loss, terms=terms[i], counts=counts, of_target_N=part.of_target_N(num), target_tokens=targets
                ),
            )
            for i, part in enumerate(packed)
        ]
        first: dict[str, float] = {}
        stats: dict[str, float] = {}
        for _ in range(self._rl.inner_updates):
            stats = mean_stats(self.trainable.update(micro_batches, lr=lr))
            first = first or stats
        if rollout.logprobs_BGT is not None and self._rl.importance_cap == 0:
            stats |= {"mismatch_kl": first["shift_kl"], "mismatch_prob_error": first["prob_error"]}
        return stats

    def _terms(
        self,
        rollout: Rollout,
        packed: Sequence[PackedCandidates],
        advantages_BG: Tensor,
        omega_BG: Tensor,
        reference: Sequence[Tensor] | None,
    ) -> list[PolicyTerms]:
        """The constants of the loss for each micro-batch, without the added targets."""
        old, num = self.behaviour_logprobs(rollout, packed), rollout.items_BG.numel()
        if self._rl.inserted_correction == "ratio":
            advantages_BG = advantages_BG * insertion_ratios(rollout, packed, old).unsqueeze(1)
        importance: list[Tensor | None] = [None] * len(packed)
        if self._rl.importance_cap > 0:
            old, importance = self._corrected(packed, old, num)
        padded = torch.zeros(len(rollout.prompts))  # for the targets
        advantage_C, omega_C = (torch.cat([flat.flatten(), padded]) for flat in (advantages_BG, omega_BG))
        length_C = torch.cat([self._path_lengths(rollout, packed), padded.long() + 1])
        return [
            PolicyTerms(
                candidate_N=part.candidate_N[own_N],
                old_logp_N=old[i],
                ref_logp_N=None if reference is None else reference[i][own_N],
                advantage_M=advantage_C[part.flat_M],
                omega_M=omega_C[part.flat_M],
                length_M=length_C[part.flat_M],
                importance_N=importance[i],
            )
            for i, part in enumerate(packed)
            for own_N in (~part.of_target_N(num),)
        ]

    def _corrected(
        self, packed: Sequence[PackedCandidates], rolled_out: Sequence[Tensor], num: int
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Old log-probs by the training forward pass, and their ratio to the rollout's, truncated."""
        old = [logp[~part.of_target_N(num)] for logp, part in zip(self._score(packed), packed, strict=True)]
        cap = self._rl.importance_cap
        return old, [torch.exp(mine - theirs).clamp(max=cap) for mine, theirs in zip(old, rolled_out, strict=True)]

    def _loss(
        self, logp_N: Tensor, *, terms: PolicyTerms, counts: Counts, of_target_N: Tensor, target_tokens: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of ``rl.algorithm`` plus ``rl.sft_weight`` times SFT's cross-entropy on the targets."""
        rl, terms = self._rl, terms.to(logp_N.device)
        objective = Objective(rl.clip_low, rl.clip_high, rl.beta, rl.kl)
        if rl.sft_weight == 0:
            return self._policy_loss(logp_N, terms, counts, objective)
        loss, stats = self._policy_loss(logp_N[~of_target_N], terms, counts, objective)
        sft = -logp_N[of_target_N].sum() / target_tokens
        loss = loss + rl.sft_weight * sft
        return loss, stats | {"sft_loss": sft.detach(), "loss": loss.detach()}

    def _path_lengths(self, rollout: Rollout, packed: Sequence[PackedCandidates]) -> Tensor:
        """|Y| of every candidate: all tokens of its path, or only the branching ones (at least 1). [B * G]."""
        if self._rl.length_norm == "full":
            return rollout.lengths_BG.flatten().clamp(min=1)
        counts_C = torch.zeros(rollout.items_BG.numel() + len(rollout.prompts), dtype=torch.long)
        for part in packed:
            counts_C.index_add_(0, part.flat_M[part.candidate_N], torch.ones_like(part.candidate_N))
        return counts_C[: rollout.items_BG.numel()].clamp(min=1)


def insertion_ratios(rollout: Rollout, packed: Sequence[PackedCandidates], old: Sequence[Tensor]) -> Tensor:
    """``min(1, pi(target) / pi(last candidate))`` of groups into which the target was put, 1 for all others. [B].

    The truncated importance weight of a target that the search did not find: near 1 when it was a close miss, near 0
    when its probability under the policy is far lower. pi is the policy of the rollout, from the scores of the search;
    a group without another candidate has weight 1.
    """
    weight_B = torch.ones(len(rollout.prompts))
    if rollout.inserted_BG is None:
        return weight_B
    inserted_C, group_size = rollout.inserted_BG.flatten(), rollout.items_BG.shape[1]
    searched_BG = rollout.valid_BG & ~rollout.inserted_BG
    lowest_B = rollout.scores_BG.masked_fill(~searched_BG, torch.inf).amin(dim=1)
    for part, logp_N in zip(packed, old, strict=True):
        own_N = (~part.of_target_N(len(inserted_C))).nonzero().squeeze(1)
        score_M = candidate_sums(logp_N, part.candidate_N[own_N], len(part.flat_M))
        is_own_M = part.flat_M < len(inserted_C)
        chosen_M = is_own_M & inserted_C[torch.where(is_own_M, part.flat_M, 0)]
        row_M = part.flat_M[chosen_M] // group_size
        weight_B[row_M] = (score_M[chosen_M] - lowest_B[row_M]).clamp(max=0.0).exp().float()
    return weight_B


def weighted_groups(advantages_BG: Tensor, inserted_BG: Tensor | None, weight: float) -> Tensor:
    """Advantages of groups into which the target was put, times ``weight`` (``rl.inserted_weight``)."""
    if inserted_BG is None or weight == 1.0:
        return advantages_BG
    return torch.where(inserted_BG.any(dim=1, keepdim=True), weight * advantages_BG, advantages_BG)


def _paths(rollout: Rollout, flat_C: Tensor) -> TokenRows:
    """Token paths of candidates, given by their indices in the flattened rollout."""
    lengths_C = rollout.lengths_BG.flatten().cpu()[flat_C].numpy()
    tokens_CT = rollout.tokens_BGT.flatten(0, 1).cpu()[flat_C].numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths_C)]).astype(np.int64)
    return TokenRows(tokens_CT[np.arange(tokens_CT.shape[1]) < lengths_C[:, None]], offsets)
