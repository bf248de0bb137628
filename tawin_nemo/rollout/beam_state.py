"""The state of a beam search: W beams and the W best finished paths of each of B prompts, as dense tensors.

Prompts may have fewer beams than W; their slots from ``width_B`` on stay empty. M prompts, or M beams or rows, are
selected out of all; R chains of tokens are run in one call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.rollout.lm import LM
from tawin_nemo.rollout.scoring import check_no_nan, token_rows
from tawin_nemo.types import PromptRecord
from tawin_nemo.util.torch_modes import numbers


@dataclass(frozen=True)
class Beams(PromptRecord):
    """Beams of B prompts, best first. All beams of a prompt have ``depth_B`` tokens; an empty one has node -1.

    Every field has one entry per prompt along its first axis.
    """

    ticket_B: Tensor  # the caller's number of the prompt
    prompt_B: Tensor  # the prompt's number in the model's cache, ascending
    width_B: Tensor  # beams of the prompt, at most W
    filter_B: Tensor  # row of the search's filters, -1 = every item is allowed
    pruned_score_B: Tensor  # best score of a path, finished or not, that was pruned for lack of beams
    depth_B: Tensor  # tokens of the path that every beam has
    node_BW: Tensor  # trie node that the beam is heading to, or stands at
    score_BW: Tensor  # sum of log-probs, -inf where empty
    row_BW: Tensor  # row of the model's cache: the last token of the beam's path that was run
    run_BW: Tensor  # tokens of the path that were run, up to and with that row
    logp_BWT: Tensor  # log-probs of the path's tokens as far as known, 0 beyond; forced tokens in trie space: 0
    done_score_BW: Tensor  # finished paths, length-normalised; -inf where empty
    done_leaf_BW: Tensor  # -1 where empty
    done_logp_BWT: Tensor

    def __len__(self) -> int:
        return len(self.ticket_B)

    @property
    def live_BW(self) -> Tensor:
        """bool [B, W]: the slot holds an unfinished beam."""
        return self.node_BW >= 0

    @property
    def own_BW(self) -> Tensor:
        """bool [B, W]: the slot is one of the prompt's ``width_B`` own."""
        return numbers(self.node_BW.shape[1], self.width_B.device) < self.width_B[:, None]

    def resized(self, width: int) -> Beams:
        """A copy with W = ``width``, which must be at least the largest ``width_B``; new slots are empty."""
        extra = width - self.node_BW.shape[1]
        empty = {"node_BW": -1, "done_leaf_BW": -1, "score_BW": -torch.inf, "done_score_BW": -torch.inf}

        def resize(name: str, tensor: Tensor) -> Tensor:
            if "_BW" not in name:
                return tensor
            behind = (0, 0, 0, extra) if name.endswith("_BWT") else (0, extra)
            return pad(tensor, behind, value=empty.get(name, 0))

        return replace(self, **{name: resize(name, tensor) for name, tensor in self.tensors().items()})

    def put(self, rows_M: Tensor, other: Beams) -> Beams:
        """A copy with M prompts, at indices ``rows_M``, replaced by those of ``other``."""
        new = other.tensors()
        return replace(self, **{name: old.index_copy(0, rows_M, new[name]) for name, old in self.tensors().items()})


def first_beams(
    ticket_B: Tensor,
    prompt_B: Tensor,
    *,
    width: int,
    run: int,
    logprobs: int,
    like: Tensor,
    width_B: Tensor | None = None,
    filter_B: Tensor | None = None,
) -> Beams:
    """One beam per prompt, heading to the trie's root (node 0), ``run`` tokens of the way being run with the prompt.

    Log-probs for up to ``logprobs`` tokens; device and floating type are those of ``like``. All prompts have ``width``
    beams unless ``width_B`` says less, and no filter without ``filter_B``.
    """
    device = like.device
    shape = (len(ticket_B), width)
    node_BW = torch.full(shape, -1, device=device)
    node_BW[:, 0] = 0
    score_BW = torch.full(shape, -torch.inf, dtype=like.dtype, device=device)
    done_score_BW = score_BW.clone()
    score_BW[:, 0] = 0
    prompt_B = prompt_B.to(device)
    logp_BWT = torch.zeros((*shape, logprobs), dtype=like.dtype, device=device)
    return Beams(
        ticket_B=ticket_B.to(device),
        prompt_B=prompt_B,
        width_B=torch.full_like(prompt_B, width) if width_B is None else width_B.to(device),
        filter_B=torch.full_like(prompt_B, -1) if filter_B is None else filter_B.to(device),
        pruned_score_B=torch.full((len(ticket_B),), -torch.inf, dtype=like.dtype, device=device),
        depth_B=torch.full_like(prompt_B, run),
        node_BW=node_BW,
        score_BW=score_BW,
        row_BW=prompt_B[:, None].expand(shape).contiguous(),
        run_BW=torch.full_like(node_BW, run),
        logp_BWT=logp_BWT,
        done_score_BW=done_score_BW,
        done_leaf_BW=torch.full_like(node_BW, -1),
        done_logp_BWT=logp_BWT,
    )


# -- Which tokens of a beam search the model has to run, and running them.
#
# Beams are heading to nodes of a path-compressed trie: all tokens up to the node are known beforehand. In trie space
# they cost nothing, so the model is needed only at the node, and runs the whole way there in one chain; the way to a
# leaf is never run. In vocab space every token costs, and a chain runs a limited number of tokens ahead.


#: Tokens that a beam runs in one go in vocab space; the beam may be dropped before it gets to the last one.
VOCAB_CHAIN = 8


def waiting(trie: TokenTrie, beams: Beams, space: str) -> Tensor:
    """bool [B, W]: the beam cannot advance before the model has run its next chain."""
    behind_BW = beams.live_BW & (beams.run_BW < beams.depth_B[:, None])
    return behind_BW if space == "vocab" else behind_BW & (_choice_depth(trie, beams) == beams.depth_B[:, None])


def run_chains(lm: LM, cache: Any, trie: TokenTrie, beams: Beams, space: str, run_ahead: int) -> tuple[Any, Beams]:
    """Run the chains of all waiting beams in one call of the model.

    As long as these are fewer than ``run_ahead`` tokens, the chains of other beams that will need theirs later fill the
    call up in trie space: a few tokens more cost next to nothing, and the result does not depend on them.
    """
    width = beams.node_BW.shape[1]
    waits_BW = waiting(trie, beams, space)
    stop_BW = _chain_ends(trie, beams, space)
    beam_R = waits_BW.flatten().nonzero()[:, 0]
    tokens = int((stop_BW - beams.run_BW).flatten()[beam_R].sum())
    if space == "trie" and tokens < run_ahead:
        later_BW = beams.live_BW & ~waits_BW & (stop_BW > beams.run_BW)
        rank_M, prompt_M = later_BW.T.nonzero().unbind(1)  # better beams first
        later_M = prompt_M * width + rank_M
        fits_M = (stop_BW - beams.run_BW).flatten()[later_M].cumsum(0) <= run_ahead - tokens
        beam_R = torch.cat([beam_R, later_M[fits_M]])
    start_R, stop_R = beams.run_BW.flatten()[beam_R], stop_BW.flatten()[beam_R]
    node_R, length_R = beams.node_BW.flatten()[beam_R], stop_R - start_R
    first_row = lm.rows(cache)
    tokens_S = trie.labels(node_R, start_R, stop_R)
    cache = lm.extend(cache, beams.row_BW.flatten()[beam_R], token_rows(tokens_S, length_R))
    row_BW, run_BW = beams.row_BW.clone(), beams.run_BW.clone()
    row_BW.view(-1)[beam_R] = first_row - 1 + length_R.cumsum(0)
    run_BW.view(-1)[beam_R] = stop_R
    beams = replace(beams, row_BW=row_BW, run_BW=run_BW)
    if space == "vocab":
        beams = _with_known_tokens(lm, cache, trie, beams, beam_R, start_R, first_row)
    return cache, beams


def with_first_token(lm: LM, cache: Any, trie: TokenTrie, beams: Beams) -> Beams:
    """Vocab space: the log-prob of the first token after the prompts, if all paths begin with the same."""
    if int(trie.depth_of(beams.node_BW[:1, 0])) == 0:
        return beams
    beam_B = torch.arange(len(beams), device=beams.node_BW.device) * beams.node_BW.shape[1]
    start_B = torch.full_like(beam_B, -1)  # the last token of the prompt is the one before the path's first
    return _with_known_tokens(lm, cache, trie, beams, beam_B, start_B, 0)


def _with_known_tokens(
    lm: LM, cache: Any, trie: TokenTrie, beams: Beams, beam_R: Tensor, start_R: Tensor, first_row: int
) -> Beams:
    """Enter the log-probs of the tokens behind R chains just run; ``start_R``: depth of a chain's first token."""
    node_R, length_R = beams.node_BW.flatten()[beam_R], beams.run_BW.flatten()[beam_R] - start_R
    stop_R = torch.minimum(start_R + 1 + length_R, trie.depth_of(node_R))  # behind a node several tokens are possible
    known_R = stop_R - start_R - 1
    chain_M = torch.repeat_interleave(known_R)
    offset_M = torch.arange(len(chain_M), device=chain_M.device) - (known_R.cumsum(0) - known_R)[chain_M]
    row_M = first_row + (length_R.cumsum(0) - length_R)[chain_M] + offset_M
    if not len(row_M):
        return beams
    token_M = trie.labels(node_R, start_R + 1, stop_R)
    place_M = torch.arange(len(row_M), device=row_M.device)
    logp_M = check_no_nan(lm.logprobs(cache, row_M, place_M, token_M, "vocab").to(row_M.device))
    logp_NT = beams.logp_BWT.flatten(0, 1).clone()
    logp_NT[beam_R[chain_M], start_R[chain_M] + 1 + offset_M] = logp_M
    return replace(beams, logp_BWT=logp_NT.view_as(beams.logp_BWT))


def _chain_ends(trie: TokenTrie, beams: Beams, space: str) -> Tensor:
    """[B, W] tokens of its path that a beam will have run after its next chain."""
    if space == "trie":
        return _choice_depth(trie, beams)
    stop_BW = trie.depth_of(beams.node_BW) - trie.is_leaf(beams.node_BW).long()  # what ends a path is never run
    return torch.minimum(stop_BW, beams.run_BW + VOCAB_CHAIN)


def _choice_depth(trie: TokenTrie, beams: Beams) -> Tensor:
    """[B, W] tokens before the next choice on the beam's path, -1 if there is none."""
    none_BW = trie.is_leaf(beams.node_BW) | ~beams.live_BW
    return trie.depth_of(beams.node_BW).masked_fill(none_BW, -1)
