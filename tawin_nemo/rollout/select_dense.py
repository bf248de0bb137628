"""A search step in few operations of known shapes: the form of ``select.step`` for devices that launches keep busy.

``select.step`` works on the edges that the beams of the moment have, which is least arithmetic: right on a CPU. On a
GPU every operation costs a launch, and every size that the host reads a wait. This form takes a padded row of C
continuations per prompt, in the same order (parent beam, then token), and finds each cell's beam by a binary search.
The arithmetic is that of ``select.step``: results are equal bit for bit where the model returns equal log-probs.

``step`` has the beams on the host: what they need of the device goes there in two copies, the best continuations come
back in one, the only time that the host waits. ``step_fixed`` has everything on the device, with C given, and never
waits: a CUDA graph can hold it.

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
from tawin_nemo.util.transfers import to_device

#: Whether a step on this kind of device takes this module's form.
_DENSE = {"cpu": False}

#: Log-probs [E] of ``token_E`` after rows ``row_N[position_E]``, in a space: ``LM.logprobs`` of one cache.
EdgeScores = Callable[[Tensor, Tensor, Tensor, str], Tensor]

#: Up to this many columns one sort is fewer launches than keys and a top-k.
_SORTED_COLUMNS = 4096


@dataclass(frozen=True)
class _Fronts:
    """What a step reads of the beams; columns of a prompt from ``end_BW[:, -1]`` on are padding."""

    end_BW: Tensor  # columns of the prompt up to and with the beam's
    shift_BX: Tensor  # from a column to its edge among the trie's; means little where the beam has no choice
    row_BX: Tensor  # of the model's cache
    branches_BX: Tensor  # 1: the beam stands at a choice, else 0
    filter_BX: Tensor  # of the search's filters, -1 where the beam has no choice
    prompt_B1: Tensor  # in the model's cache
    going_BX: Tensor  # the score of its continuations, less their token's log-prob; -inf for padding

    def to(self, device: torch.device) -> _Fronts:
        """On another device; the host does not wait."""
        numbers_there = to_device(
            [self.end_BW, self.shift_BX, self.row_BX, self.branches_BX, self.filter_BX, self.prompt_B1], device
        )  # fmt: skip
        return _Fronts(*numbers_there, *to_device([self.going_BX], device))


def step_on_device(lm: LM, cache: Any, trie: TokenTrie, beams: Beams, rules: Rules) -> Beams:
    """``select.step`` if log-probs are on a CPU, ``step`` elsewhere: the same beams, on the host.

    Raises TawinError if the model returns NaN.
    """
    if _DENSE.get(rules.device.type, True):
        return step(partial(lm.logprobs, cache), trie, beams, rules)
    return select.step(lm, cache, trie, beams, rules)


def step(logprobs: EdgeScores, trie: TokenTrie, beams: Beams, rules: Rules) -> Beams:
    """``select.step`` of beams on the host with one host sync. Raises TawinError if the model returns NaN."""
    width = beams.node_BW.shape[1]
    fronts = _fronts(trie, beams, rules)
    columns = max(int(fronts.end_BW[:, -1].max()), width)
    score_BC, logp_BC = _scored(logprobs, trie, fronts.to(rules.device), rules, columns)
    best = _best(score_BC, logp_BC, min(StepLimits.of(trie, width).ranked, columns))
    score_BK, column_BK, logp_BK = _on_host(*best)
    check_no_nan(score_BK)  # NaN comes first in every order
    continuations = _named(trie, beams, fronts, score_BK, column_BK, logp_BK)
    ended = bool(continuations.ends_BK[:, :width].any())
    return _next_beams(beams, continuations, fronts, rules, ended=ended)


def step_fixed(
    logprobs: EdgeScores, trie: TokenTrie, beams: Beams, rules: Rules, limits: StepLimits
) -> tuple[Beams, Tensor, Tensor]:
    """``select.step`` without a host sync; per prompt also the edges scored, and whether a log-prob is NaN.

    For a prompt that has no beam left, or one whose beams wait for the model, the result means nothing: the caller
    keeps its old state. ``depth_B`` of such a prompt may be anything up to the deepest choice.
    """
    fronts = _fronts(trie, beams, rules)
    score_BC, logp_BC = _scored(logprobs, trie, fronts, rules, limits.columns)
    continuations = _named(trie, beams, fronts, *_best(score_BC, logp_BC, limits.ranked))
    edges_B = fronts.end_BW[:, -1] - (beams.live_BW.long() - fronts.branches_BX[:, :-1]).sum(1)
    nan_B = torch.isnan(logp_BC).any(dim=1)
    return _next_beams(beams, continuations, fronts, rules, ended=True), edges_B, nan_B


def _fronts(trie: TokenTrie, beams: Beams, rules: Rules) -> _Fronts:
    """On the device of the beams."""
    tables, depth_B1 = DenseTrie.of(trie, beams.node_BW.device), beams.depth_B[:, None]
    stop_BW, degree_BW, choice_BW = tables.span_N3[beams.node_BW.clamp(max=trie.num_inner)].unbind(-1)
    live_BW = beams.live_BW
    branches_BW = live_BW & (choice_BW <= depth_B1)
    end_BW = torch.where(branches_BW, degree_BW, live_BW).cumsum(1)
    going_BW = beams.score_BW
    if rules.space == "vocab":  # where a parent has no choice its token's log-prob is known, and counted already
        known_BW = beams.logp_BWT.gather(2, depth_B1[..., None].expand(-1, going_BW.shape[1], 1))[..., 0]
        known_BW = known_BW if rules.assist is None else rules.assist.forced(beams.prompt_B, known_BW)
        going_BW = torch.where(branches_BW, going_BW, going_BW + known_BW)
    return _Fronts(
        end_BW=end_BW,
        # what is behind a beam's last edge minus what is behind its last column
        shift_BX=pad(torch.where(branches_BW, stop_BW, 1) - end_BW, (0, 1)),
        row_BX=pad(beams.row_BW, (0, 1)),
        branches_BX=pad(branches_BW.long(), (0, 1)),
        filter_BX=pad(torch.where(branches_BW, beams.filter_B[:, None], -1), (0, 1), value=-1),
        prompt_B1=beams.prompt_B[:, None],
        going_BX=pad(going_BW, (0, 1), value=-torch.inf),
    )


def _scored(
    logprobs: EdgeScores, trie: TokenTrie, fronts: _Fronts, rules: Rules, columns: int
) -> tuple[Tensor, Tensor]:
    """[B, C]: scores of all continuations, -inf for padding, and log-probs of the tokens that they add."""
    device, (prompts, places) = fronts.shift_BX.device, fronts.shift_BX.shape
    tables, column_C = DenseTrie.of(trie, device), numbers(columns, device)
    place_BC = torch.searchsorted(fronts.end_BW, column_C.expand(prompts, columns).contiguous(), right=True)
    edge_BC = _edges(fronts, place_BC, column_C, tables)
    position_BC = place_BC + numbers(prompts * places, device)[::places][:, None]
    token_E = tables.child_tokens.index_select(0, edge_BC.flatten())
    logp_E = logprobs(fronts.row_BX.flatten(), position_BC.flatten(), token_E, rules.space)
    logp_BC = logp_E.view(prompts, columns)
    if rules.space == "vocab":  # in trie space a single continuation has log-prob 0
        logp_BC = torch.where(fronts.branches_BX.gather(1, place_BC) > 0, logp_BC, 0.0)
    if rules.filters is not None:
        filter_E, child_E = fronts.filter_BX.gather(1, place_BC).flatten(), tables.child_nodes[edge_BC].flatten()
        blocked_E = rules.filters.blocked(filter_E, child_E)
        logp_BC = logp_BC + torch.where(blocked_E, -torch.inf, 0.0).view_as(logp_BC)  # NaN stays NaN
    gain_BC = logp_BC
    if rules.assist_there is not None:
        prompt_BC = fronts.prompt_B1.expand_as(logp_BC).contiguous()
        mixed_BC = rules.assist_there.mixed(prompt_BC, tables.child_nodes[edge_BC], logp_BC)
        gain_BC = torch.where(fronts.branches_BX.gather(1, place_BC) > 0, mixed_BC, logp_BC)
    return gain_BC + fronts.going_BX.gather(1, place_BC), logp_BC


def _edges(fronts: _Fronts, place_BM: Tensor, column_BM: Tensor, tables: DenseTrie) -> Tensor:
    """The edges at columns of places among the beams; any edge for padding and where the beam has no choice."""
    return (fronts.shift_BX.gather(1, place_BM) + column_BM).clamp_(max=len(tables.child_nodes) - 1)


def _best(score_BC: Tensor, logp_BC: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, columns and log-probs of the K = ``count`` best continuations, best first; NaN before all others."""
    if score_BC.shape[1] <= _SORTED_COLUMNS:
        score_BC, column_BC = score_BC.sort(dim=1, descending=True, stable=True)
        score_BK, column_BK = score_BC[:, :count], column_BC[:, :count]
    else:
        column_BK = best_columns(score_BC.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), count)
        score_BK = score_BC.gather(1, column_BK)
    return score_BK, column_BK, logp_BC.gather(1, column_BK)


def _on_host(score_BK: Tensor, column_BK: Tensor, logp_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three on the host, by one copy; columns are below 2^31."""
    if score_BK.device.type == "cpu":
        return score_BK, column_BK, logp_BK
    dtype = score_BK.dtype
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    score, column, logp = torch.stack([score_BK.view(bits), column_BK.to(bits), logp_BK.view(bits)]).cpu()
    return score.view(dtype), column.long(), logp.view(dtype)


def _named(
    trie: TokenTrie, beams: Beams, fronts: _Fronts, score_BK: Tensor, column_BK: Tensor, logp_BK: Tensor
) -> Continuations:
    """The continuations at K columns of every prompt: their beams, and the nodes that they lead to."""
    tables = DenseTrie.of(trie, beams.node_BW.device)
    place_BK = torch.searchsorted(fronts.end_BW, column_BK.contiguous(), right=True)
    parent_BK = place_BK.clamp(max=beams.node_BW.shape[1] - 1)
    child_BK = tables.child_nodes[_edges(fronts, place_BK, column_BK, tables)]
    branches_BK = fronts.branches_BX.gather(1, place_BK) > 0
    node_BK = torch.where(branches_BK, child_BK, beams.node_BW.gather(1, parent_BK))
    real_BK = score_BK > -torch.inf
    ends_BK = real_BK & (tables.end_depth_V[node_BK] == beams.depth_B[:, None] + 1)
    return Continuations(score_BK, parent_BK, node_BK, logp_BK, real_BK, ends_BK)


def _next_beams(beams: Beams, continuations: Continuations, fronts: _Fronts, rules: Rules, *, ended: bool) -> Beams:
    width = beams.node_BW.shape[1]
    goes_on_BK = continuations.real_BK ^ continuations.ends_BK
    unseen_B = _unseen(continuations, goes_on_BK, fronts, width)
    if ended:
        beams = finish(beams, continuations, rules)
    return advance(beams, continuations, goes_on_BK, unseen_B, rules)


def _unseen(continuations: Continuations, goes_on_BK: Tensor, fronts: _Fronts, width: int) -> Tensor | None:
    """[B] bound of the scores behind the best 2 W continuations, as ``select.step`` gives it to a prompt alone."""
    score_BK = continuations.score_BK
    if score_BK.shape[1] < 2 * width:
        return None
    bounded_B = fronts.end_BW[:, -1] > 2 * width
    if score_BK.shape[1] > 2 * width:  # paths can end without a token of their own: the W best may lie behind 2 W
        bounded_B = bounded_B & (goes_on_BK[:, : 2 * width].sum(1) >= width)
    return torch.where(bounded_B, score_BK[:, 2 * width - 1], -torch.inf)
