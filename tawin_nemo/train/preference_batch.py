"""Rows of preference optimisation as token trees, and the loss of one packed batch.

Each prompt stands once, followed by the tree of its target and its rejected items. A sharing group (NAPO) always lies
in one packed batch, so that sharing needs no traffic between ranks.

Axes beyond ``types``: R rows, N rejected items of a row, K rows that a row reads (itself first), M paths of a batch
(in comments; in losses M counts shared answers of a row), flat N log-probs of a batch (suffix ``_N`` alone).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.schema import PreferenceConfig
from tawin_nemo.data.batches import micro_batches
from tawin_nemo.data.samples import Samples
from tawin_nemo.data.trees import tree_batch, tree_sizes
from tawin_nemo.maths.negative_sharing import NO_ROW, shared_mask, shared_values
from tawin_nemo.maths.policy_loss import candidate_sums
from tawin_nemo.maths.preference_loss import (
    alpha_dpo_loss,
    dpo_loss,
    napo_loss,
    normalised_margins,
    rosepo_loss,
    sdpo_loss,
    simpo_loss,
)
from tawin_nemo.types import NO_ITEM, Record, TokenBatch, TokenRows


@dataclass(frozen=True)
class PreferenceRows:
    """This replica's rows of one step."""

    row_R: np.ndarray  # rows of train
    group_R: np.ndarray  # sharing group of each row, ascending
    items_RN: np.ndarray  # rejected items, NO_ITEM where there are fewer
    source_RK: np.ndarray  # rows (places in R) whose rejected items a row is compared with, itself first, or NO_ROW
    epsilon_RN: np.ndarray  # RosePO's label noise; zeros elsewhere


@dataclass(frozen=True)
class PackedRows(Record):
    """Whole groups of rows as one token batch, and what its log-probs belong to."""

    batch: TokenBatch
    path_N: Tensor  # the path, index into M, of each log-prob
    length_M: Tensor  # what the log-prob of a path is divided by
    chosen_R: Tensor  # index into M of the target's path
    rejected_RN: Tensor  # index into M; arbitrary where there is no item
    mask_RN: Tensor  # bool: there is a rejected item
    source_RK: Tensor  # places in R of this batch, NO_ROW
    shared_RM: Tensor  # bool: ``shared_mask`` of these rows
    epsilon_RN: Tensor


@dataclass(frozen=True)
class StepTerms:
    """What all packed batches of a step share."""

    rows: int  # of the global batch
    gamma: float
    margin_mean: float = 0.0  # alpha-DPO: moments of the margins of the global batch
    margin_std: float = 0.0


def pack_rows(rows: PreferenceRows, samples: Samples, catalog: Catalog, cfg: PreferenceConfig) -> list[PackedRows]:
    """Pack whole sharing groups under ``preference.micro_batch_tokens``; a larger group is a batch of its own."""
    if len(rows.row_R) == 0:
        return []
    trie = catalog.trie if cfg.policy_space == "trie" else None
    prompts = samples.prompts.take(rows.row_R)
    items_RA = np.concatenate([samples.target_N[rows.row_R][:, None], rows.items_RN], axis=1)
    sizes_R = tree_sizes(prompts, *_answers(items_RA, catalog), trie)
    groups, first_G = np.unique(rows.group_R, return_index=True)
    packed = []
    for chosen in micro_batches(np.add.reduceat(sizes_R, first_G), cfg.micro_batch_tokens):
        places = np.flatnonzero(np.isin(rows.group_R, groups[chosen]))
        answers, prompt_M = _answers(items_RA[places], catalog)
        batch, index = tree_batch(prompts.take(places), answers, prompt_M, trie)
        lengths = torch.from_numpy(answers.lengths.copy())
        if cfg.normalised_by == "branching":
            lengths = torch.bincount(index.answer_N, minlength=len(answers)).clamp(min=1)
        elif cfg.normalised_by == "off":
            lengths = torch.ones_like(lengths)
        packed.append(_packed(rows, places, samples, catalog, batch, index.answer_N, lengths))
    return packed


def _answers(items_RA: np.ndarray, catalog: Catalog) -> tuple[TokenRows, np.ndarray]:
    """Paths of all items row by row, and the row of each."""
    known_RA = items_RA != NO_ITEM
    return catalog.paths.take(items_RA[known_RA]), np.repeat(np.arange(len(items_RA)), known_RA.sum(axis=1))


def _packed(
    rows: PreferenceRows, places: np.ndarray, samples: Samples, catalog: Catalog,
    batch: TokenBatch, path_N: Tensor, length_M: Tensor,
) -> PackedRows:  # fmt: skip
    items_RN = rows.items_RN[places]
    mask_RN = items_RN != NO_ITEM
    first_R = np.cumsum(mask_RN.sum(axis=1) + 1) - mask_RN.sum(axis=1) - 1
    rejected_RN = first_R[:, None] + np.cumsum(mask_RN, axis=1)
    new_place = np.full(len(rows.row_R) + 1, NO_ROW, dtype=np.int64)  # the last entry is where NO_ROW leads
    new_place[places] = np.arange(len(places))
    source_RK = new_place[rows.source_RK[places]]
    forbidden_RKN = _forbidden(rows.row_R[places], items_RN, source_RK, samples, catalog.leaf_I)
    source, mask = torch.from_numpy(source_RK), torch.from_numpy(mask_RN)
    return PackedRows(
        batch=batch,
        path_N=path_N,
        length_M=length_M,
        chosen_R=torch.from_numpy(first_R),
        rejected_RN=torch.from_numpy(np.where(mask_RN, rejected_RN, 0)),
        mask_RN=mask,
        source_RK=source,
        shared_RM=shared_mask(mask, source, torch.from_numpy(forbidden_RKN)),
        epsilon_RN=torch.from_numpy(rows.epsilon_RN[places]),
    )


def _forbidden(
    row_R: np.ndarray, items_RN: np.ndarray, source_RK: np.ndarray, samples: Samples, leaf_I: np.ndarray
) -> np.ndarray:
    """bool [R, K, N]: another row's rejected item is the target of this row or in its history, or written so."""
    leaf_RKN = np.where(items_RN == NO_ITEM, -1, leaf_I[np.maximum(items_RN, 0)])[np.maximum(source_RK, 0)]
    forbidden_RKN = np.zeros(leaf_RKN.shape, dtype=bool)
    for place, row in enumerate(row_R):
        own = np.append(samples.history[int(row)], samples.target_N[row])
        forbidden_RKN[place, 1:] = np.isin(leaf_RKN[place, 1:], leaf_I[own])
    return forbidden_RKN


def preference_loss(
    logp_N: Tensor, part: PackedRows, cfg: PreferenceConfig, terms: StepTerms, ref_logp_N: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """This batch's share of the mean loss over the rows of the global batch, and statistics to be summed.

    ``ref_logp_N``: log-probs of the reference, where the objective has one (``PreferenceConfig.uses_reference``).
    Pass the sums over batches and ranks to ``preference_stats``.
    """
    part = part.to(logp_N.device)
    implicit_M = _rewards(logp_N, part, cfg, ref_logp_N)
    pos_R, neg_RN = implicit_M[part.chosen_R], implicit_M[part.rejected_RN]
    if cfg.algorithm == "alpha_dpo":
        margin_RN = normalised_margins(
            margins(logp_N.detach(), part, cfg, ref_logp_N), terms.margin_mean, terms.margin_std
        )
        loss_R = alpha_dpo_loss(pos_R, neg_RN, part.mask_RN, margin_RN, terms.gamma, cfg.alpha)
    elif cfg.algorithm == "napo":
        loss_R = napo_loss(pos_R, shared_values(neg_RN, part.source_RK), part.shared_RM, terms.gamma)
    else:
        loss_R = PAIRWISE[cfg.algorithm](pos_R, neg_RN, part, terms)
    loss = loss_R.sum() / terms.rows
    return loss, {"loss": loss.detach()} | _sums(logp_N, part, pos_R, neg_RN)


#: Objectives that need nothing but the rewards of a row, and the terms of the step.
PAIRWISE: dict[str, Callable[[Tensor, Tensor, PackedRows, StepTerms], Tensor]] = {
    "dpo": lambda pos_R, neg_RN, part, terms: dpo_loss(pos_R, neg_RN, part.mask_RN),
    "sdpo": lambda pos_R, neg_RN, part, terms: sdpo_loss(pos_R, neg_RN, part.mask_RN),
    "simpo": lambda pos_R, neg_RN, part, terms: simpo_loss(pos_R, neg_RN, part.mask_RN, terms.gamma),
    "rosepo": lambda pos_R, neg_RN, part, terms: rosepo_loss(
        pos_R, neg_RN, part.mask_RN, part.epsilon_RN.to(pos_R.dtype)
    ),
}


def _rewards(logp_N: Tensor, part: PackedRows, cfg: PreferenceConfig, ref_logp_N: Tensor | None) -> Tensor:
    """Hhat of each path with a reference, H without (and for alpha-DPO, whose reference is in M* only). [M]."""
    if ref_logp_N is not None and cfg.algorithm != "alpha_dpo":
        logp_N = logp_N - ref_logp_N
    return cfg.beta * candidate_sums(logp_N, part.path_N, len(part.length_M)) / part.length_M


def margins(logp_N: Tensor, part: PackedRows, cfg: PreferenceConfig, ref_logp_N: Tensor | None) -> Tensor:
    """M = Hhat+ - Hhat- of every pair, normalised by length as the rewards are (alpha-DPO). [R, N]."""
    assert ref_logp_N is not None
    ratio_M = cfg.beta * candidate_sums(logp_N - ref_logp_N, part.path_N, len(part.length_M)) / part.length_M
    return ratio_M[part.chosen_R].unsqueeze(1) - ratio_M[part.rejected_RN]


@torch.no_grad()
def _sums(logp_N: Tensor, part: PackedRows, pos_R: Tensor, neg_RN: Tensor) -> dict[str, Tensor]:
    """Sums over rows, pairs and tokens for the log; shared answers count in ``negatives_sum`` only."""
    logp_M = candidate_sums(logp_N, part.path_N, len(part.length_M))
    margin_RN = torch.where(part.mask_RN, pos_R.unsqueeze(1) - neg_RN, 0.0)
    compared = part.shared_RM.sum()
    return {
        "rows": pos_R.new_full((), len(pos_R)),
        "pairs": part.mask_RN.sum().to(pos_R.dtype),
        "scored_tokens": pos_R.new_full((), len(logp_N)),
        "negatives_sum": compared.to(pos_R.dtype),
        "margin_sum": margin_RN.sum(),
        "correct_sum": (margin_RN > 0).sum().to(pos_R.dtype),
        "logp_chosen_sum": logp_M[part.chosen_R].sum(),
        "logp_rejected_sum": torch.where(part.mask_RN, logp_M[part.rejected_RN], 0.0).sum(),
    }


def preference_stats(summed: dict[str, float]) -> dict[str, float]:
    """Summed statistics of a step as what one logs.

    ``reward_margin`` and ``pair_accuracy`` are over own pairs, ``negatives_per_row`` counts shared ones too; log-probs
    are those of whole answers.
    """
    if "rows" not in summed:  # a skipped step
        return summed
    rows, pairs = max(summed["rows"], 1.0), max(summed["pairs"], 1.0)
    means = {
        "reward_margin": summed["margin_sum"] / pairs,
        "pair_accuracy": summed["correct_sum"] / pairs,
        "negatives_per_row": summed["negatives_sum"] / rows,
        "logp_chosen": summed["logp_chosen_sum"] / rows,
        "logp_rejected": summed["logp_rejected_sum"] / pairs,
    }
    return {name: summed[name] for name in ("loss", "grad_norm", "scored_tokens")} | means
