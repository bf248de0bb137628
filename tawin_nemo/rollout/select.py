"""One step of a beam search: every beam of some prompts advances by one token, the best continuations are kept.

X columns of two concatenated lists, or flattened indices of continuations.

All continuations of a prompt lie in one padded row, ordered by parent beam and then by token, so that the exact order
"better score, then better parent, then smaller token" is "better score, then smaller column".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.rollout.assist import Assist
from tawin_nemo.rollout.beam_state import Beams
from tawin_nemo.rollout.filters import Filters
from tawin_nemo.rollout.lm import LM
from tawin_nemo.rollout.scoring import check_no_nan
from tawin_nemo.util.torch_modes import numbers


@dataclass(frozen=True)
class Rules:
    """Settings of a search, where its beams are; norms are indexed by the length of a path so far."""

    space: str  # trie | vocab
    norm_T: Tensor  # length ** length_penalty
    best_norm_T: Tensor  # the largest norm that a path which ends behind this token can still be divided by
    filters: Filters | None = None  # what ``Beams.filter_B`` points into
    assist: Assist | None = None  # of the prompts in the model's cache, which ``Beams.prompt_B`` numbers
    assist_there: Assist | None = None  # the same on ``device``
    uniform: bool = False  # every prompt has W beams
    flat: bool = False  # all norms are 1
    device: torch.device = torch.device("cpu")  # where the model's log-probs are, and the filters

    @classmethod
    def of(cls, trie: TokenTrie, space: str, length_penalty: float, like: Tensor) -> Rules:
        """The rules of a search in ``space`` whose beams have the device and the floating type of ``like``."""
        norms = [max(1, length) ** length_penalty for length in range(trie.max_depth + 1)]  # no path has length 0
        norm_T = torch.tensor(norms, dtype=torch.float64)
        best_norm_T = norm_T[-1:].expand_as(norm_T) if length_penalty > 0 else torch.cat([norm_T[1:], norm_T[-1:]])
        return cls(space, norm_T.to(like), best_norm_T.to(like), flat=length_penalty == 0)

    def assisted(self, assist: Assist | None) -> Rules:
        """These rules with the assistance of the prompts that are in the model's cache now, given on the host."""
        there = None if assist is None else assist.map(lambda tensor: tensor.to(self.device))
        return replace(self, assist=assist, assist_there=there)


@dataclass(frozen=True)
class _Table:
    """All continuations of each prompt in C >= W columns, by parent beam and token; a score of -inf is padding."""

    score_BC: Tensor
    parent_BC: Tensor  # index among the prompt's beams
    edge_BC: Tensor  # into the E edges that are taken at choices; -1: the parent goes on without a choice
    child_E: Tensor
    logp_E: Tensor


@dataclass(frozen=True)
class Continuations:
    """The best K continuations of each prompt, best first."""

    score_BK: Tensor
    parent_BK: Tensor  # index among the prompt's beams
    node_BK: Tensor
    logp_BK: Tensor  # of the token that is added
    real_BK: Tensor  # bool: not padding, and not impossible
    ends_BK: Tensor  # bool: the token ends a path


def step(lm: LM, cache: Any, trie: TokenTrie, beams: Beams, rules: Rules) -> Beams:
    """All beams advance by one token. None of them may wait for the model (``beam_state.waiting``).

    Raises TawinError if the model returns NaN.
    """
    table = _continuations(lm, cache, trie, beams, rules)
    columns, width = table.score_BC.shape[1], beams.node_BW.shape[1]
    # At most one token ends a path at each beam where paths end with an own token (EOS): 2 W are enough. Elsewhere
    # more paths can end within the best ones, and the W best that go on may lie behind all of them.
    for count in (min(2 * width, columns), columns):
        continuations = _ranked(trie, beams, table, count)
        goes_on_BK = continuations.real_BK ^ continuations.ends_BK  # what ends a path is real
        if count == columns or not bool((continuations.real_BK[:, -1] & (goes_on_BK.sum(1) < width)).any()):
            break
    beams = finish(beams, continuations, rules) if bool(continuations.ends_BK[:, :width].any()) else beams
    unseen_B = continuations.score_BK[:, -1] if count < columns else None
    return advance(beams, continuations, goes_on_BK, unseen_B, rules)


def to_next_choice(trie: TokenTrie, beams: Beams, rules: Rules, *, fixed: bool = False) -> Beams:
    """Trie space: skip the steps before the next one at which a beam of the prompt stands at a choice, if any comes.

    On the way paths can end, at most W at a time: each of them is among the best W continuations. A prompt without any
    choice left finishes all its beams. ``fixed``: the same operations whatever the beams are (no host sync).
    """
    length_BW, leaf_BW = trie.depth_of(beams.node_BW), trie.is_leaf(beams.node_BW)
    never = len(rules.norm_T)
    choice_BW = length_BW.masked_fill(leaf_BW | ~beams.live_BW, never)
    choice_B1 = choice_BW.min(dim=1, keepdim=True).values
    depth_B = torch.where(choice_B1[:, 0] < never, choice_B1[:, 0], beams.depth_B)
    beams = replace(beams, depth_B=torch.maximum(beams.depth_B, depth_B))
    ends_BW = leaf_BW & (length_BW <= choice_B1)
    if not fixed and not bool(ends_BW.any()):
        return beams
    order_BW = length_BW.masked_fill(~ends_BW, never).argsort(dim=1, stable=True)
    score_BW = beams.score_BW if rules.flat else beams.score_BW / rules.norm_T[length_BW]
    score_BW = torch.where(ends_BW, score_BW, -torch.inf).gather(1, order_BW)
    beams = _merged(beams, score_BW, beams.node_BW.gather(1, order_BW), _rows(beams.logp_BWT, order_BW), rules)
    hope_BW = _has_hope(beams, beams.score_BW, rules)
    if fixed:
        hope_BW = hope_BW | ~ends_BW.any(dim=1, keepdim=True)  # a prompt's result is what it would be alone
    goes_on_BW = ~ends_BW & hope_BW
    return replace(
        beams,
        node_BW=torch.where(goes_on_BW, beams.node_BW, -1),
        score_BW=torch.where(goes_on_BW, beams.score_BW, -torch.inf),
    )


def _has_hope(beams: Beams, score_BM: Tensor, rules: Rules) -> Tensor:
    """bool: a running beam of this score could still enter the result.

    A beam dropped by this bound scores below every beam that is kept, and so do its continuations: it would not change
    the rank of any of them.
    """
    best_BM = score_BM if rules.flat else score_BM / rules.best_norm_T[beams.depth_B][:, None]
    done_BW = beams.done_score_BW  # -inf while a slot is free
    return best_BM > (done_BW[:, -1:] if rules.uniform else done_BW.gather(1, beams.width_B[:, None] - 1))


def _continuations(lm: LM, cache: Any, trie: TokenTrie, beams: Beams, rules: Rules) -> _Table:
    prompts, width = beams.node_BW.shape
    depth_B1 = beams.depth_B[:, None]
    stays_BW = trie.is_leaf(beams.node_BW) | (trie.depth_of(beams.node_BW) > depth_B1)
    branches_BW, forced_BW = beams.live_BW & ~stays_BW, beams.live_BW & stays_BW
    beam_N = branches_BW.flatten().nonzero()[:, 0]
    position_E, token_E, child_E = trie.edges_of(beams.node_BW.flatten()[beam_N])
    gain_E = logp_E = beams.score_BW.new_zeros(0)
    if len(beam_N):
        row_N = beams.row_BW.flatten()[beam_N]
        logp_E = check_no_nan(lm.logprobs(cache, row_N, position_E, token_E, rules.space))
        if rules.filters is not None:
            filter_E = beams.filter_B.index_select(0, beam_N // width).index_select(0, position_E)
            logp_E = logp_E.masked_fill(rules.filters.blocked(filter_E, child_E), -torch.inf)
        gain_E = logp_E
        if rules.assist is not None:
            prompt_E = beams.prompt_B.index_select(0, beam_N // width).index_select(0, position_E)
            gain_E = rules.assist.mixed(prompt_E, child_E, logp_E)

    degree_N = torch.bincount(position_E, minlength=len(beam_N))
    count_BW = forced_BW.long()
    count_BW.view(-1)[beam_N] = degree_N
    end_BW = count_BW.cumsum(1)
    columns = max(int(end_BW[:, -1].max()), width)
    cell_BW = end_BW - count_BW + columns * torch.arange(prompts, device=end_BW.device)[:, None]  # of its first column
    score_BC = torch.full((prompts, columns), -torch.inf, dtype=logp_E.dtype, device=logp_E.device)
    parent_BC = torch.zeros(prompts, columns, dtype=torch.long, device=logp_E.device)
    edge_BC = torch.full_like(parent_BC, -1)
    # The E edges by index_select and scatter: several times faster than brackets at this length.
    edge_E = torch.arange(len(child_E), device=child_E.device)
    cell_E = edge_E + (cell_BW.flatten()[beam_N] - degree_N.cumsum(0) + degree_N).index_select(0, position_E)
    edge_BC.view(-1).scatter_(0, cell_E, edge_E)
    parent_BC.view(-1).scatter_(0, cell_E, (beam_N % width).index_select(0, position_E))
    score_E = gain_E + beams.score_BW.flatten()[beam_N].index_select(0, position_E)
    score_BC.view(-1).scatter_(0, cell_E, score_E)
    going_BW = beams.score_BW
    if rules.space == "vocab":  # forced tokens cost nothing in trie space
        known_BW = beams.logp_BWT.gather(2, depth_B1[..., None].expand(-1, width, 1))[..., 0]
        going_BW = going_BW + (known_BW if rules.assist is None else rules.assist.forced(beams.prompt_B, known_BW))
    score_BC.view(-1)[cell_BW[forced_BW]] = going_BW[forced_BW]
    parent_BC.view(-1)[cell_BW[forced_BW]] = forced_BW.nonzero()[:, 1]
    return _Table(score_BC, parent_BC, edge_BC, child_E, logp_E)


def _ranked(trie: TokenTrie, beams: Beams, table: _Table, count: int) -> Continuations:
    column_BK = best_columns(table.score_BC, count)
    score_BK, parent_BK = table.score_BC.gather(1, column_BK), table.parent_BC.gather(1, column_BK)
    real_BK = score_BK > -torch.inf
    node_BK = beams.node_BW.gather(1, parent_BK)
    logp_BK = torch.zeros_like(score_BK)
    if len(table.child_E):
        edge_BK = table.edge_BC.gather(1, column_BK)
        edge_X = edge_BK.clamp(min=0).flatten()
        node_BK = torch.where(edge_BK < 0, node_BK, table.child_E.index_select(0, edge_X).view_as(edge_BK))
        logp_BK = torch.where(edge_BK < 0, logp_BK, table.logp_E.index_select(0, edge_X).view_as(edge_BK))
    ends_BK = real_BK & trie.is_leaf(node_BK) & (trie.depth_of(node_BK) == beams.depth_B[:, None] + 1)
    return Continuations(score_BK, parent_BK, node_BK, logp_BK, real_BK, ends_BK)


def best_columns(score_BC: Tensor, count: int) -> Tensor:
    """Columns of the ``count`` largest scores of each row, best first; of equal scores the smaller column first.

    >>> best_columns(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]]), 3).tolist()
    [[1, 3, 2]]
    """
    columns = score_BC.shape[1]
    if count == columns or score_BC.dtype != torch.float32:
        return score_BC.sort(dim=1, descending=True, stable=True).indices[:, :count].contiguous()
    # Adding zero turns -0.0, which equals 0.0 but has other bits, into 0.0. Negative floats order backwards as bits.
    bits_BC = (score_BC + 0.0).view(torch.int32)
    bits_BC = bits_BC ^ ((bits_BC >> 31) & 0x7FFFFFFF)
    key_BC = (bits_BC.long() << 32) + torch.arange(columns - 1, -1, -1, device=score_BC.device)
    return columns - 1 - (key_BC.topk(count, dim=1).values & 0xFFFFFFFF)


def finish(beams: Beams, continuations: Continuations, rules: Rules) -> Beams:
    """Merge the paths that end within the best W continuations into the finished ones."""
    width = beams.node_BW.shape[1]
    ends_BW, score_BW = continuations.ends_BK[:, :width], continuations.score_BK[:, :width]
    if not rules.uniform:
        ends_BW = ends_BW & beams.own_BW
    if not rules.flat:
        score_BW = score_BW / rules.norm_T[beams.depth_B + 1][:, None]
    score_BW = torch.where(ends_BW, score_BW, -torch.inf)
    logp_BWT = _longer(beams, continuations.parent_BK[:, :width], continuations.logp_BK[:, :width])
    return _merged(beams, score_BW, continuations.node_BK[:, :width], logp_BWT, rules)


def _merged(beams: Beams, score_BW: Tensor, leaf_BW: Tensor, logp_BWT: Tensor, rules: Rules) -> Beams:
    """The best W of the finished paths so far and the given ones; an equal score does not displace an earlier one."""
    width = beams.node_BW.shape[1]
    score_BX, order_BX = torch.cat([beams.done_score_BW, score_BW], dim=1).sort(dim=1, descending=True, stable=True)
    score_BW, order_BW = score_BX[:, :width], order_BX[:, :width]
    if not rules.uniform:
        score_BW = score_BW.masked_fill(~beams.own_BW, -torch.inf)
    leaf_BW = torch.cat([beams.done_leaf_BW, leaf_BW], dim=1).gather(1, order_BW)
    return replace(
        beams,
        done_score_BW=score_BW,
        done_leaf_BW=torch.where(score_BW == -torch.inf, -1, leaf_BW),
        done_logp_BWT=_rows(torch.cat([beams.done_logp_BWT, logp_BWT], dim=1), order_BW),
    )


def advance(
    beams: Beams, continuations: Continuations, goes_on_BK: Tensor, unseen_B: Tensor | None, rules: Rules
) -> Beams:
    """The best W continuations that do not end a path, without those that can no longer enter the result.

    ``unseen_B``: upper bound of the scores of all continuations outside of ``continuations``, None if there are none.
    """
    longer = replace(beams, depth_B=beams.depth_B + 1)
    goes_on_BK = goes_on_BK & _has_hope(longer, continuations.score_BK, rules)
    place_K = numbers(goes_on_BK.shape[1] + 1, goes_on_BK.device)[1:]
    rank_BK = torch.where(continuations.ends_BK, place_K, goes_on_BK.cumsum(1))  # ends compete with all, others not
    over_BK = (continuations.ends_BK | goes_on_BK) & (rank_BK > beams.width_B[:, None])
    pruned_score_B = torch.where(over_BK, continuations.score_BK, -torch.inf).amax(1)
    pruned_score_B = torch.maximum(beams.pruned_score_B, pruned_score_B)
    if unseen_B is not None:
        pruned_score_B = torch.maximum(pruned_score_B, unseen_B)
    order_BW = goes_on_BK.byte().argsort(dim=1, descending=True, stable=True)[:, : beams.node_BW.shape[1]]
    goes_on_BW = goes_on_BK.gather(1, order_BW)
    if not rules.uniform:
        goes_on_BW = goes_on_BW & beams.own_BW
    parent_BW = continuations.parent_BK.gather(1, order_BW)
    return replace(
        longer,
        pruned_score_B=pruned_score_B,
        node_BW=torch.where(goes_on_BW, continuations.node_BK.gather(1, order_BW), -1),
        score_BW=torch.where(goes_on_BW, continuations.score_BK.gather(1, order_BW), -torch.inf),
        row_BW=beams.row_BW.gather(1, parent_BW),
        run_BW=beams.run_BW.gather(1, parent_BW),
        logp_BWT=_longer(beams, parent_BW, continuations.logp_BK.gather(1, order_BW)),
    )


def _longer(beams: Beams, parent_BM: Tensor, logp_BM: Tensor) -> Tensor:
    """The parents' log-probs of their tokens, with that of the next token where it was not known before."""
    logp_BMT = _rows(beams.logp_BWT, parent_BM)
    depth_BM1 = beams.depth_B[:, None, None].expand(*parent_BM.shape, 1)
    return logp_BMT.scatter_(2, depth_BM1, logp_BMT.gather(2, depth_BM1) + logp_BM[..., None])


def _rows(values_BWT: Tensor, index_BM: Tensor) -> Tensor:
    """``values_BWT[b, index_BM[b, m]]``, by whole rows."""
    prompts, width, _ = values_BWT.shape
    flat = index_BM + numbers(width * prompts, index_BM.device)[::width][:, None]
    return values_BWT.flatten(0, 1).index_select(0, flat.flatten()).view(*index_BM.shape, -1)
