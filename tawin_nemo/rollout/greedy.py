"""Unconstrained greedy decoding: the most likely token of the whole vocabulary, again and again.

Nothing keeps the output inside the catalog. It is how the candidate protocol of LLaRA, S-DPO and NAPO generates, whose
ValidRatio says how often the output names an item at all.
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
    room = lm.max_positions - int(prompts.lengths.max())
    if room < 1 or not prompts.lengths.min():
        raise DataError(
            f"prompts need 1 to {lm.max_positions - 1} tokens to be continued, not {prompts.lengths.min()} to "
            f"{prompts.lengths.max()}; lower data.max_prompt_tokens"
        )
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
