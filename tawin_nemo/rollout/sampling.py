"""Independent constrained draws from the catalogue (TAWin, arXiv 2604.22504, Appendix A.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.errors import ConfigError
from tawin_nemo.rollout.lm import LM
from tawin_nemo.rollout.scoring import (
    candidates_from,
    check_search,
    edge_logprobs,
    no_candidates,
    segment_log_softmax,
)
from tawin_nemo.types import Candidates, TokenRows


@torch.no_grad()
def constrained_sample(
    lm: LM,
    prompts: TokenRows,
    trie: TokenTrie,
    draws: int,
    *,
    generators: Sequence[torch.Generator],
    temperature: float = 1.0,
) -> Candidates:
    """``draws`` items for each of B prompts, with replacement, sorted by log-prob (W = draws; items may repeat).

    Each draw walks the trie from the root and takes child c with probability softmax(log pi / temperature)_c, pi being
    the trie-space distribution; at temperature 1 an item is drawn with exactly its probability. ``scores_BW`` and
    ``logprobs_BWT`` are those of pi, at temperature 1, whatever the temperature of the draws: they are the old policy
    of the ratio; the behaviour distribution differs from it if the temperature does. ``generators`` (CPU, one per
    prompt) make a prompt's draws independent of the other prompts in the call. Draws of one prompt share its prefill
    and, as long as they agree, their rows of the model.
    Raises ConfigError (draws, temperature, number of generators); DataError, CatalogError and TawinError as in
    ``constrained_beam_search``.
    """
    check_search(lm, prompts, trie, draws)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature={temperature} must be positive and finite; beam search is the limit towards 0")
    if len(generators) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts need as many generators; got {len(generators)}")
    if len(prompts) == 0:
        return no_candidates(draws, trie.max_depth)
    logits, cache = lm.prefill(*prompts.padded(), reserve=trie.decision_depth)
    tables = trie.tensors(logits.device)
    uniform_NT = _uniform(generators, draws, trie.decision_depth + 1).to(logits.device)
    node_N = torch.full((len(uniform_NT),), trie.root, device=logits.device)
    # A live draw has something left to decide and points to its row of the model; draws that agree share a row.
    row_N = torch.arange(len(prompts), device=logits.device).repeat_interleave(draws)
    row_N = torch.where(tables.is_settled[node_N], -1, row_N)
    node_R = torch.full((len(prompts),), trie.root, device=logits.device)
    logp_columns = []
    for uniform_N in uniform_NT.T:
        live_N = row_N >= 0
        if not bool(live_N.any()):
            break
        position_E, token_E, child_E = trie.children_of(node_R)
        logp_E = edge_logprobs(logits, torch.arange(len(node_R), device=logits.device), position_E, token_E, "trie")
        edge_N = _pick(logp_E / temperature, position_E, row_N.clamp(min=0), uniform_N)
        node_N = torch.where(live_N, child_E[edge_N], node_N)
        logp_columns.append(torch.where(live_N, logp_E[edge_N], 0))

        live_N &= ~tables.is_settled[node_N]
        kept_R, row_of_live = torch.unique(edge_N[live_N], return_inverse=True)
        row_N = torch.full_like(row_N, -1).masked_scatter(live_N, row_of_live)
        node_R = child_E[kept_R]
        if len(kept_R):
            logits, cache = lm.extend(cache, position_E[kept_R], token_E[kept_R])
    return _ranked(trie, _leaf_below(node_N, trie), logp_columns, len(prompts))


def _uniform(generators: Sequence[torch.Generator], draws: int, decisions: int) -> Tensor:
    """One number in [0, 1) per draw and decision, rows by prompt; kept off 1 so that rounding cannot pass the end."""
    numbers = [torch.rand(draws, decisions, generator=generator, dtype=torch.float64) for generator in generators]
    return torch.cat(numbers).clamp(max=1 - 1e-9)


def _pick(logit_E: Tensor, row_E: Tensor, row_N: Tensor, uniform_N: Tensor) -> Tensor:
    """Index of the edge that each draw takes out of its row, by inversion of the row's cumulative distribution."""
    rows = int(row_E[-1]) + 1
    edges_R = torch.bincount(row_E, minlength=rows)
    cumulative_E = segment_log_softmax(logit_E.double(), row_E, rows).exp().cumsum(0)
    last_R = edges_R.cumsum(0) - 1
    end_R = cumulative_E[last_R]
    start_R = torch.cat([end_R.new_zeros(1), end_R[:-1]])
    threshold_N = start_R[row_N] + uniform_N * (end_R - start_R)[row_N]
    return torch.searchsorted(cumulative_E, threshold_N, right=True).minimum(last_R[row_N])


def _leaf_below(node_N: Tensor, trie: TokenTrie) -> Tensor:
    """The leaf that a settled node leads to."""
    tables = trie.tensors(node_N.device)
    while not bool(tables.is_leaf[node_N].all()):
        node_N = torch.where(tables.is_leaf[node_N], node_N, tables.child_offsets[node_N] + 1)
    return node_N


def _ranked(trie: TokenTrie, leaf_N: Tensor, logp_columns: list[Tensor], num_prompts: int) -> Candidates:
    leaf_BW = leaf_N.view(num_prompts, -1)
    logprobs_BWT = torch.zeros((*leaf_BW.shape, trie.max_depth), device=leaf_N.device)
    if logp_columns:
        logp_BWT = torch.stack(logp_columns, dim=1).view(*leaf_BW.shape, -1)
        logprobs_BWT = logprobs_BWT.to(logp_BWT.dtype)
        logprobs_BWT[..., : logp_BWT.shape[-1]] = logp_BWT
    scores_BW, order_BW = logprobs_BWT.sum(-1).sort(dim=1, descending=True, stable=True)
    logprobs_BWT = logprobs_BWT.gather(1, order_BW[..., None].expand_as(logprobs_BWT))
    return candidates_from(trie, leaf_BW.gather(1, order_BW), scores_BW, logprobs_BWT)
