"""Unconstrained decoding: over the whole vocabulary, greedily or by beam search; nothing keeps it inside the catalog.

The candidate protocol of LLaRA, S-DPO and NAPO generates greedily; its ValidRatio says how often the output names an
item at all. A beam search without a trie is what serving such a model with a plain engine would do.
"""

from __future__ import annotations

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
    done: list[list[tuple[float, list[int]]]] = [[] for _ in range(len(prompts))]
    alive: list[list[tuple[float, list[int], int]]] = [
        [(0.0, [], b)] for b in range(len(prompts))
    ]  # score, tokens, row
    for step in range(steps):
        beams = [beam for own in alive for beam in own]
        if not beams:
            break
        tokens, logp = lm.top_tokens(cache, torch.tensor([row for _, _, row in beams]), width + 1)
        grown: list[list[tuple[float, list[int], int]]] = [[] for _ in range(len(prompts))]
        place = 0
        for b, own in enumerate(alive):
            options = [
                (score + value, [*written, token], row)
                for k, (score, written, row) in enumerate(own)
                for token, value in zip(tokens[place + k].tolist(), logp[place + k].tolist(), strict=True)
            ]
            place += len(own)
            best = sorted(options, key=lambda option: -option[0])
            done[b] = sorted(
                [*done[b], *((score, written) for score, written, _ in best[: 2 * width] if written[-1] == eos)],
                key=lambda ended: -ended[0],
            )[:width]
            going_on = [option for option in best if option[1][-1] != eos][:width]
            worst = done[b][-1][0] if len(done[b]) == width else -float("inf")
            grown[b] = [option for option in going_on if option[0] > worst]  # log-probs only fall
        alive = grown
        chosen = [beam for own in alive for beam in own]
        if not chosen or step + 1 == steps:
            break
        first = lm.rows(cache)
        newest = TokenRows.from_lists([written[-1:] for _, written, _ in chosen])
        cache = lm.extend(cache, torch.tensor([row for _, _, row in chosen]), newest)
        numbers = iter(range(first, first + len(chosen)))
        alive = [[(score, written, next(numbers)) for score, written, _ in own] for own in alive]
    return [_best(done[b], alive[b], width) for b in range(len(prompts))]


def _best(
    done: list[tuple[float, list[int]]], alive: list[tuple[float, list[int], int]], width: int
) -> list[list[int]]:
    everything = [*done, *((score, written) for score, written, _ in alive)]
    return [written for _, written in sorted(everything, key=lambda beam: -beam[0])[:width]]


def _room(lm: LM, prompts: TokenRows) -> int:
    """Tokens by which the longest prompt can be continued. Raises DataError where there are none."""
    room = lm.max_positions - int(prompts.lengths.max())
    if room < 1 or not prompts.lengths.min():
        raise DataError(
            f"prompts need 1 to {lm.max_positions - 1} tokens to be continued, not {prompts.lengths.min()} to "
            f"{prompts.lengths.max()}; lower data.max_prompt_tokens"
        )
    return room
