"""Independent constrained draws from the catalog (TAWin, arXiv 2604.22504, Appendix A.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.maths.segments import segment_log_softmax
from tawin_nemo.rollout.lm import LM
from tawin_nemo.rollout.scoring import (
    append_root_path,
    candidates_from,
    check_no_nan,
    check_prompts,
    check_search,
    empty_candidates,
    probe_logprob,
    token_rows,
)
from tawin_nemo.types import Candidates, TokenRows
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.torch_modes import plain_calls


@plain_calls
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
    and, as long as they agree, their rows of the model; tokens without a choice are run in one chain, those behind the
    last choice never.
    Raises ConfigError (draws, temperature, number of generators); DataError, CatalogError and TawinError as in
    ``constrained_beam_search``.
    """
    check_search(lm, trie, draws)
    check_prompts(lm, prompts, trie)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature={temperature} must be positive and finite; beam search is the limit towards 0")
    if len(generators) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts need as many generators; got {len(generators)}")
    if len(prompts) == 0:
        return empty_candidates(draws, trie.max_depth)
    cache = lm.prefill(append_root_path(prompts, trie)[0])
    like = probe_logprob(lm, cache, trie, "trie")
    uniform_NT = _uniform(generators, draws, trie.decision_depth + 1).to(like.device)
    logp_NT = like.new_zeros(uniform_NT.shape)  # by the depth of the choice
    node_N = torch.zeros(len(uniform_NT), dtype=torch.long, device=like.device)
    # R rows of the model, each at a node with a choice; a live draw points to its row, draws that agree share one.
    lm_row_R = torch.arange(len(prompts), device=like.device)
    node_R = torch.zeros_like(lm_row_R)
    live_L = (~trie.is_leaf(node_N)).nonzero()[:, 0]
    row_L = live_L // draws
    while len(live_L):
        position_E, token_E, child_E = trie.edges_of(node_R)
        logp_E = check_no_nan(lm.logprobs(cache, lm_row_R, position_E, token_E, "trie"))
        depth_L = trie.depth_of(node_N[live_L])
        edge_L = _pick(logp_E / temperature, position_E, row_L, uniform_NT[live_L, depth_L])
        logp_NT[live_L, depth_L] = logp_E[edge_L]
        node_N[live_L] = child_E[edge_L]

        goes_on_L = ~trie.is_leaf(child_E[edge_L])
        live_L = live_L[goes_on_L]
        edge_R, row_L = torch.unique(edge_L[goes_on_L], return_inverse=True)
        if len(edge_R):
            start_R, node_R = trie.depth_of(node_R)[position_E[edge_R]], child_E[edge_R]
            length_R = trie.depth_of(node_R) - start_R
            chains = token_rows(trie.labels(node_R, start_R, start_R + length_R), length_R)
            parent_R = lm_row_R[position_E[edge_R]]
            lm_row_R = lm.rows(cache) - 1 + length_R.cumsum(0)
            cache = lm.extend(cache, parent_R, chains)
    return _ranked(trie, node_N.view(len(prompts), -1), logp_NT)


def _uniform(generators: Sequence[torch.Generator], draws: int, decisions: int) -> Tensor:
    """One number in [0, 1) per draw and depth; kept off 1 so that rounding cannot pass the end. Rows by prompt."""
    numbers = [torch.rand(draws, decisions, generator=generator, dtype=torch.float64) for generator in generators]
    return torch.cat(numbers).clamp(max=1 - 1e-9)


def _pick(logit_E: Tensor, row_E: Tensor, row_L: Tensor, uniform_L: Tensor) -> Tensor:
    """Index of the edge that each draw takes out of its row, by inversion of the row's cumulative distribution."""
    rows = int(row_E[-1]) + 1
    edges_R = torch.bincount(row_E, minlength=rows)
    cumulative_E = _running_sum(segment_log_softmax(logit_E.double(), row_E, rows).exp())
    last_R = edges_R.cumsum(0) - 1
    end_R = cumulative_E[last_R]
    start_R = torch.cat([end_R.new_zeros(1), end_R[:-1]])
    threshold_L = start_R[row_L] + uniform_L * (end_R - start_R)[row_L]
    return torch.searchsorted(cumulative_E, threshold_L, right=True).minimum(last_R[row_L])


def _running_sum(values_E: Tensor) -> Tensor:
    """Cumulative sum; on the CPU under ``trainer.deterministic``, because CUDA's order of addition varies."""
    if torch.are_deterministic_algorithms_enabled():
        return values_E.cpu().cumsum(0).to(values_E.device)
    return values_E.cumsum(0)


def _ranked(trie: TokenTrie, leaf_BW: Tensor, logp_NT: Tensor) -> Candidates:
    logp_BWT = logp_NT.view(*leaf_BW.shape, -1)
    scores_BW, order_BW = logp_BWT.sum(-1).sort(dim=1, descending=True, stable=True)
    logp_BWT = logp_BWT.gather(1, order_BW[..., None].expand_as(logp_BWT))
    return candidates_from(trie, leaf_BW.gather(1, order_BW), scores_BW, logp_BWT)


def draw_seed(seed: int, step: int, row: int) -> int:
    """Seed of one prompt's samples, a function of its arguments alone: the same for any batch, chunk or rank."""
    return int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0] >> np.uint64(1))
