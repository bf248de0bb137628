"""A search step in few operations of known shapes: the form of ``select.step`` for devices that launches keep busy.

``select.step`` works on the edges that the beams of the moment have, which is least arithmetic: right on a CPU. On a
GPU every operation costs a launch, and every size that the host reads a wait. This form takes a padded row of C
continuations per prompt, in the same order (parent beam, then token), finds each cell's beam by a binary search, and
reads the node's facts in one lookup (``catalog.trie_dense``). With C given it never waits for the device
(``step_fixed``); else it reads C, whether a log-prob is NaN and whether a path ends (``step``). The arithmetic is that
of ``select.step``: results are equal bit for bit where the model returns equal log-probs.

X = W + 1: the beams of a prompt, and one for the padding of its row. K ranked continuations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.catalog.trie_dense import DenseTrie, StepLimits
from tawin_nemo.rollout import select
from tawin_nemo.rollout.beam_state import Beams
from tawin_nemo.rollout.lm import LM
from tawin_nemo.rollout.scoring import check_no_nan
from tawin_nemo.rollout.select import Continuations, Rules, advance, best_columns, finish
from tawin_nemo.util.torch_modes import numbers

#: Whether a step on this kind of device takes this module's form.
_DENSE = {"cpu": False}

#: Log-probs [E] of ``token_E`` after rows ``row_N[position_E]``, in a space: ``LM.logprobs`` of one cache.
EdgeScores = Callable[[Tensor, Tensor, Tensor, str], Tensor]

#: Up to this many columns one sort is fewer launches than keys and a top-k.
_SORTED_COLUMNS = 4096


@dataclass(frozen=True)
class _Table:
    """All continuations of each prompt in C columns; a score of -inf is padding."""

    score_BC: Tensor
    beam_BC: Tensor  # the parent, an index among the prompt's beams
    edge_BC: Tensor  # into the trie's edges; means nothing where the parent has no choice
    logp_BC: Tensor  # of the token that is added; 0 where the parent has no choice
    branches_BW: Tensor  # bool: the beam stands at a choice
    degree_BW: Tensor  # and has this many continuations there
    total_B1: Tensor  # continuations of the prompt


def step_on_device(lm: LM, cache: Any, trie: TokenTrie, beams: Beams, rules: Rules) -> Beams:
    """``select.step`` on a CPU, ``step`` elsewhere: the same beams. Raises TawinError if the model returns NaN."""
    if _DENSE.get(beams.node_BW.device.type, True):
        return step(partial(lm.logprobs, cache), trie, beams, rules)
    return select.step(lm, cache, trie, beams, rules)


def step(logprobs: EdgeScores, trie: TokenTrie, beams: Beams, rules: Rules) -> Beams:
    """``select.step`` with three host syncs. Raises TawinError if the model returns NaN."""
    limits = StepLimits.of(trie, beams.node_BW.shape[1])
    table = _continuations(logprobs, trie, beams, rules, None)
    check_no_nan(table.logp_BC)
    continuations = _ranked(trie, beams, table, min(limits.ranked, table.score_BC.shape[1]))
    ended = bool(continuations.ends_BK[:, : beams.node_BW.shape[1]].any())
    return _next_beams(beams, continuations, table, rules, ended=ended)


def step_fixed(
    logprobs: EdgeScores, trie: TokenTrie, beams: Beams, rules: Rules, limits: StepLimits
) -> tuple[Beams, Tensor, Tensor]:
    """``select.step`` without a host sync; per prompt also the edges scored, and whether a log-prob is NaN.

    For a prompt that has no beam left, or one whose beams wait for the model, the result means nothing: the caller
    keeps its old state. ``depth_B`` of such a prompt may be anything up to the deepest choice.
    """
    table = _continuations(logprobs, trie, beams, rules, limits.columns)
    continuations = _ranked(trie, beams, table, limits.ranked)
    edges_B = torch.where(table.branches_BW, table.degree_BW, 0).sum(1)
    return _next_beams(beams, continuations, table, rules, ended=True), edges_B, torch.isnan(table.logp_BC).any(dim=1)


def _continuations(logprobs: EdgeScores, trie: TokenTrie, beams: Beams, rules: Rules, columns: int | None) -> _Table:
    prompts, width = beams.node_BW.shape
    device, depth_B1 = beams.node_BW.device, beams.depth_B[:, None]
    tables = DenseTrie.of(trie, device)
    stop_BW, degree_BW, choice_BW = tables.span_N3[beams.node_BW.clamp(max=trie.num_inner)].unbind(-1)
    live_BW = beams.live_BW
    branches_BW = live_BW & (choice_BW <= depth_B1)
    end_BW = torch.where(branches_BW, degree_BW, live_BW).cumsum(1)
    total_B1 = end_BW[:, -1:]
    if columns is None:
        columns = max(int(total_B1.max()), width)
    column_C = numbers(columns, device)
    place_BC = torch.searchsorted(end_BW, column_C.expand(prompts, columns).contiguous(), right=True)
    beam_BC = place_BC.clamp(max=width - 1)
    # what is behind a beam's last edge minus what is behind its last column
    edge_BC = ((stop_BW - end_BW).gather(1, beam_BC) + column_C).clamp(max=len(tables.child_nodes) - 1)
    token_BC = tables.child_tokens[edge_BC]
    row_X = pad(beams.row_BW, (0, 1)).flatten()
    position_BC = place_BC + numbers(prompts * (width + 1), device)[:: width + 1][:, None]
    logp_BC = logprobs(row_X, position_BC.flatten(), token_BC.flatten(), rules.space).view(prompts, columns)
    going_BW = beams.score_BW
    if rules.space == "vocab":  # where a parent has no choice its token's log-prob is known, and counted already
        known_BW = beams.logp_BWT.gather(2, depth_B1[..., None].expand(-1, width, 1))[..., 0]
        if rules.assist is not None:
            known_BW = rules.assist.forced(beams.prompt_B, known_BW)
        going_BW = torch.where(branches_BW, going_BW, going_BW + known_BW)
        logp_BC = torch.where(branches_BW.gather(1, beam_BC), logp_BC, 0.0)
    if rules.filters is not None:
        filter_BC = torch.where(branches_BW.gather(1, beam_BC), beams.filter_B[:, None], -1)
        blocked_E = rules.filters.blocked(filter_BC.flatten(), tables.child_nodes[edge_BC].flatten())
        logp_BC = logp_BC.masked_fill(blocked_E.view_as(logp_BC), -torch.inf)
    gain_BC = logp_BC
    if rules.assist is not None:
        prompt_BC = beams.prompt_B[:, None].expand_as(logp_BC)
        mixed_BC = rules.assist.mixed(prompt_BC, tables.child_nodes[edge_BC], logp_BC)
        gain_BC = torch.where(branches_BW.gather(1, beam_BC), mixed_BC, logp_BC)
    score_BC = torch.where(column_C < total_B1, gain_BC + going_BW.gather(1, beam_BC), -torch.inf)
    return _Table(score_BC, beam_BC, edge_BC, logp_BC, branches_BW, degree_BW, total_B1)


def _ranked(trie: TokenTrie, beams: Beams, table: _Table, count: int) -> Continuations:
    tables = DenseTrie.of(trie, beams.node_BW.device)
    if table.score_BC.shape[1] <= _SORTED_COLUMNS:
        score_BC, column_BC = table.score_BC.sort(dim=1, descending=True, stable=True)
        score_BK, column_BK = score_BC[:, :count], column_BC[:, :count]
    else:
        column_BK = best_columns(table.score_BC, count)
        score_BK = table.score_BC.gather(1, column_BK)
    parent_BK = table.beam_BC.gather(1, column_BK)
    child_BK = tables.child_nodes[table.edge_BC.gather(1, column_BK)]
    node_BK = torch.where(table.branches_BW.gather(1, parent_BK), child_BK, beams.node_BW.gather(1, parent_BK))
    real_BK = score_BK > -torch.inf
    ends_BK = real_BK & (tables.end_depth_V[node_BK] == beams.depth_B[:, None] + 1)
    return Continuations(score_BK, parent_BK, node_BK, table.logp_BC.gather(1, column_BK), real_BK, ends_BK)


def _next_beams(beams: Beams, continuations: Continuations, table: _Table, rules: Rules, *, ended: bool) -> Beams:
    width = beams.node_BW.shape[1]
    goes_on_BK = continuations.real_BK ^ continuations.ends_BK
    unseen_B = _unseen(continuations, goes_on_BK, table, width)
    if ended:
        beams = finish(beams, continuations, rules)
    return advance(beams, continuations, goes_on_BK, unseen_B, rules)


def _unseen(continuations: Continuations, goes_on_BK: Tensor, table: _Table, width: int) -> Tensor | None:
    """[B] bound of the scores behind the best 2 W continuations, as ``select.step`` gives it to a prompt alone."""
    score_BK = continuations.score_BK
    if score_BK.shape[1] < 2 * width:
        return None
    bounded_B = table.total_B1[:, 0] > 2 * width
    if score_BK.shape[1] > 2 * width:  # paths can end without a token of their own: the W best may lie behind 2 W
        bounded_B = bounded_B & (goes_on_BK[:, : 2 * width].sum(1) >= width)
    return torch.where(bounded_B, score_BK[:, 2 * width - 1], -torch.inf)
