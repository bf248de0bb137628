"""Unconstrained decoding: over the whole vocabulary, greedily or by beam search; nothing keeps it inside the catalog.

The candidate protocol of LLaRA, S-DPO and NAPO generates greedily; its ValidRatio says how often the output names an
item at all. A beam search without a trie is what serving such a model with a plain engine would do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from tawin_nemo.rollout.lm import LM
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import DataError


def greedy_decode(lm: LM, prompts: TokenRows, *, max_tokens: int, eos: int) -> TokenRows:
    """Continue B prompts by at most ``max_tokens`` tokens each, up to and without ``eos``.

    All prompts run at once. Of equally likely tokens the one with the lowest number is taken. Every rank that shares
    the model calls it and gets the same rows. Raises DataError for a prompt that leaves no room for a token.
    """
    if len(prompts) == 0:
        return prompts
    room = _room(lm, prompts)
    written: list[list[int]] = [[] for _ in range(len(prompts))]
    cache = lm.prefill(prompts)
    running_M = np.arange(len(prompts))  # prompts that go on
    row_M = torch.arange(len(prompts))  # their newest rows of the cache
    for step in range(min(max_tokens, room)):
        token_M = lm.best_tokens(cache, row_M).cpu().numpy()
        goes_on_M = token_M != eos
        running_M, row_M, token_M = running_M[goes_on_M], row_M[torch.from_numpy(goes_on_M)], token_M[goes_on_M]
        for place, token in zip(running_M.tolist(), token_M.tolist(), strict=True):
            written[place].append(token)
        if len(running_M) == 0 or step + 1 == min(max_tokens, room):
            break
        first = lm.rows(cache)
        cache = lm.extend(cache, row_M, TokenRows(token_M.astype(np.int64), np.arange(len(token_M) + 1)))
        row_M = first + torch.arange(len(running_M))
    return TokenRows.from_lists(written)


class Beam(NamedTuple):
    """A continuation: the sum of its log-probs, its tokens, and the row of the cache that it continues from."""

    score: float
    tokens: list[int]
    row: int


def free_beam_search(lm: LM, prompts: TokenRows, *, width: int, max_tokens: int, eos: int) -> list[list[list[int]]]:
    """For each of B prompts at most ``width`` continuations, best first, each with ``eos`` where it ended.

    A beam that has ended keeps its place; the others are continued by at most ``max_tokens`` tokens. The score is the
    sum of log-probs, without length normalisation. Every rank that shares the model gets the same rows. Raises
    DataError for a prompt that leaves no room for a token.
    """
    if len(prompts) == 0:
        return []
    steps = min(max_tokens, _room(lm, prompts))
    cache = lm.prefill(prompts)
    done: list[list[Beam]] = [[] for _ in range(len(prompts))]
    alive = [[Beam(0.0, [], b)] for b in range(len(prompts))]
    for step in range(steps):
        row_N = torch.tensor([beam.row for own in alive for beam in own])
        token_NK, logp_NK = lm.top_tokens(cache, row_N, width + 1)  # the end of text, and so many others
        options = iter(zip(token_NK.tolist(), logp_NK.tolist(), strict=True))
        for b, own in enumerate(alive):
            grown = [
                Beam(beam.score + logp, [*beam.tokens, token], beam.row)
                for beam in own
                for token, logp in zip(*next(options), strict=True)
            ]
            done[b], alive[b] = _best(grown, done[b], width, eos)
        chosen = [beam for own in alive for beam in own]
        if not chosen or step + 1 == steps:
            break
        first = lm.rows(cache)
        newest = TokenRows.from_lists([beam.tokens[-1:] for beam in chosen])
        cache = lm.extend(cache, torch.tensor([beam.row for beam in chosen]), newest)
        numbers = iter(range(first, first + len(chosen)))
        alive = [[beam._replace(row=next(numbers)) for beam in own] for own in alive]
    return [[beam.tokens for beam in _sorted([*done[b], *alive[b]])[:width]] for b in range(len(prompts))]


def _best(grown: list[Beam], done: list[Beam], width: int, eos: int) -> tuple[list[Beam], list[Beam]]:
    """The best ``width`` beams that have ended, and of those that go on the ones that can still be among them.

    As in transformers, a beam ends only where that is among the best ``width`` of its step.
    """
    order = _sorted(grown)
    done = _sorted([*done, *(beam for beam in order[:width] if beam.tokens[-1] == eos)])[:width]
    worst = done[-1].score if len(done) == width else -math.inf
    alive = [beam for beam in order if beam.tokens[-1] != eos][:width]
    return done, [beam for beam in alive if beam.score > worst]  # a score only falls


def _sorted(beams: list[Beam]) -> list[Beam]:
    return sorted(beams, key=lambda beam: -beam.score)


def _room(lm: LM, prompts: TokenRows) -> int:
    """Tokens by which the longest prompt can be continued. Raises DataError where there are none."""
    room = lm.max_positions - int(prompts.lengths.max())
    if room < 1 or not prompts.lengths.min():
        raise DataError(
            f"prompts need 1 to {lm.max_positions - 1} tokens to be continued, not {prompts.lengths.min()} to "
            f"{prompts.lengths.max()}; lower data.max_prompt_tokens"
        )
    return room
