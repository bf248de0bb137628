"""What a reply's scores have to be under the versions that it names: transformers, one path at a time, no trie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tawin_nemo.types import TokenRows
from tests.benchmarks.baselines import PrefixTable

#: Sums of a few float32 log-probs, computed in another order.
SCORE_TOLERANCE = 2e-4


class Oracle:
    """Scores under the weights of several folders; ``weights`` below is a place in them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._models: list[Any] = [
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval() for folder in folders
        ]

    @torch.inference_mode()
    def scores(
        self, weights: int, table: PrefixTable, prompt: Sequence[int], paths: Iterable[tuple[int, ...]]
    ) -> list[float]:
        """Summed log-probs of paths over what ``table`` (with ``prompt_tokens`` 0) admits behind each beginning."""
        found = []
        for path in paths:
            logits_TV = self._models[weights](torch.tensor([[*prompt, *path]])).logits[0].double()
            score = 0.0
            for depth, token in enumerate(path):
                choices = table(0, torch.tensor(path[:depth], dtype=torch.long))
                logp_C = logits_TV[len(prompt) + depth - 1, choices].log_softmax(0)
                score += float(logp_C[choices.index(token)])
            found.append(score)
        return found


def admissible(paths: Iterable[Sequence[int]], eos: int) -> PrefixTable:
    """The constraint over these paths, for ``Oracle.scores``."""
    return PrefixTable(TokenRows.from_lists([list(path) for path in paths]), eos)
