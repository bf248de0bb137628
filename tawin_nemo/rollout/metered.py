"""A language model that counts what a search makes it compute."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from tawin_nemo.backbones import Work
from tawin_nemo.rollout.lm import LM
from tawin_nemo.types import TokenRows


class MeteredLM:
    """Passes every call of the LM protocol on to ``lm``; ``take`` says what was run since the last time.

    Counting looks at sizes only, so it waits for no device. The keys that a token behind the prompts sees are taken to
    be a mean prompt: exact for the prompts, a few tokens short for what comes behind them.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self._prompts = Work()
        self._num_prompts = 0
        self._behind = Work()

    @property
    def vocab_size(self) -> int:
        return self.lm.vocab_size

    @property
    def max_positions(self) -> int:
        return self.lm.max_positions

    def prefill(self, prompts: TokenRows) -> Any:
        lengths_B = prompts.lengths.astype(np.float64)
        self._prompts += Work(tokens=len(prompts.flat), pairs=float((lengths_B * (lengths_B + 1) / 2).sum()))
        self._num_prompts += len(prompts)
        return self.lm.prefill(prompts)

    def extend(self, cache: Any, parent_R: Tensor, chains: TokenRows) -> Any:
        self._behind += Work(tokens=len(chains.flat))
        return self.lm.extend(cache, parent_R, chains)

    def rows(self, cache: Any) -> int:
        return self.lm.rows(cache)

    def keep(self, cache: Any, prompt_M: Tensor) -> tuple[Any, Tensor]:
        return self.lm.keep(cache, prompt_M)

    def join(self, first: Any, second: Any) -> tuple[Any, Tensor, Tensor]:
        return self.lm.join(first, second)

    def logprobs(self, cache: Any, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        logits = len(token_E) if space == "trie" else len(row_N) * self.vocab_size
        self._behind += Work(logits=logits)
        return self.lm.logprobs(cache, row_N, position_E, token_E, space)

    def take(self) -> Work:
        """Everything since the last call, and start from zero."""
        mean_prompt = self._prompts.tokens / max(1, self._num_prompts)
        total = self._prompts + self._behind + Work(pairs=self._behind.tokens * mean_prompt)
        self._prompts, self._num_prompts, self._behind = Work(), 0, Work()
        return total
