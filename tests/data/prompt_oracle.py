"""Prompts of a split by their definition: every text is rendered and tokenised, and all rows are kept in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tawin_nemo.config.schema import DataConfig
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.samples import Samples
from tawin_nemo.data.special_tokens import encode_prompts
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.types import TokenRows


def samples_in_memory(
    split: Split, texts: Sequence[str], tokenizer: Tokenizer, template: Template, data: DataConfig
) -> Samples:
    """``encode_split`` for prompts without item tokens and candidates, row by row; no prompt may be unfit."""
    prompts, histories = [], []
    for row in range(len(split)):
        items = split.history[row].tolist()[-data.max_history :]
        while True:
            text = template.prompt_of(items, [texts[item] for item in items])
            tokens = encode_prompts(tokenizer, [text])[0]
            if len(tokens) <= data.max_prompt_tokens:
                break
            items = items[1:]
        prompts.append(tokens)
        histories.append(np.array(items, dtype=np.int64))
    both = TokenRows.from_lists(prompts), TokenRows.from_lists(histories)
    return Samples(both[0], np.array(split.target_N), np.array(split.user_N), both[1], candidates=split.candidates)
