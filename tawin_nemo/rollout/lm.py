"""What a search needs of a language model, and no more: prompts in once, then chains of tokens, then edge log-probs."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from tawin_nemo.config.backbones import FlopCount
from tawin_nemo.types import TokenRows


class LM(Protocol):
    """A causal language model over a growing tree of tokens whose cache the caller does not look into.

    Every token that was run is a *row* of the cache; rows are numbered in the order in which they came, the last
    token of prompt b being row b. A row can be continued at any time, any number of times. All ranks that share one
    model make the same calls and get the same numbers. Index tensors may come from any device; results lie on the
    model's.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int:
        """Tokens of the longest prompt and path together."""
        ...

    def prefill(self, prompts: TokenRows) -> Any:
        """Run B prompts (lengths >= 1), each once. Returns a cache with B rows."""
        ...

    def extend(self, cache: Any, parent_R: Tensor, chains: TokenRows) -> Any:
        """Append R chains (lengths >= 1); chain r continues row ``parent_R[r]``, each of its tokens the one before.

        Returns a cache in which the old rows keep their numbers and the chains' tokens, chain by chain, follow as
        rows ``rows, rows + 1, ...``. The old cache must not be used again.
        """
        ...

    def rows(self, cache: Any) -> int:
        """Rows of the cache."""
        ...

    def keep(self, cache: Any, prompt_M: Tensor) -> tuple[Any, Tensor]:
        """The cache of M of its prompts only (ascending), and ``new_R``: each old row's new number, -1 if it went.

        Kept rows stay in their order, except that the last tokens of the kept prompts are again rows 0 .. M - 1.
        The old cache must not be used again.
        """
        ...

    def join(self, first: Any, second: Any) -> tuple[Any, Tensor, Tensor]:
        """One cache of both, and the new numbers of the rows of each. Neither may be used again.

        Prompts of ``first`` come before those of ``second``; rows: all prompts' last tokens, then the others.
        """
        ...

    def logprobs(self, cache: Any, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        """Log-probs [E] of ``token_E`` after row ``row_N[position_E]`` (``position_E`` ascending), float32 or wider.

        ``space`` trie: normalised over the edges of each position (TAWin, arXiv 2604.22504, Eq. 25), so that a single
        edge has exactly 0; vocab: over the whole vocabulary. No [N, V] tensor is kept in trie space.
        """
        ...

    def best_tokens(self, cache: Any, row_N: Tensor) -> Tensor:
        """The most likely token of the whole vocabulary after each row, the lowest of equal ones. [N] int64."""
        ...


# -- A language model that counts what a search makes it compute.


class MeteredLM:
    """Passes every call of the LM protocol on to ``lm``; ``take`` says what was run since the last time.

    Counting looks at sizes only, so it waits for no device. The keys that a token behind the prompts sees are taken to
    be a mean prompt: exact for the prompts, a few tokens short for what comes behind them.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self._prompts = FlopCount()
        self._num_prompts = 0
        self._behind = FlopCount()

    @property
    def vocab_size(self) -> int:
        return self.lm.vocab_size

    @property
    def max_positions(self) -> int:
        return self.lm.max_positions

    def prefill(self, prompts: TokenRows) -> Any:
        lengths_B = prompts.lengths.astype(np.float64)
        self._prompts += FlopCount(tokens=len(prompts.flat), pairs=float((lengths_B * (lengths_B + 1) / 2).sum()))
        self._num_prompts += len(prompts)
        return self.lm.prefill(prompts)

    def extend(self, cache: Any, parent_R: Tensor, chains: TokenRows) -> Any:
        self._behind += FlopCount(tokens=len(chains.flat))
        return self.lm.extend(cache, parent_R, chains)

    def rows(self, cache: Any) -> int:
        return self.lm.rows(cache)

    def keep(self, cache: Any, prompt_M: Tensor) -> tuple[Any, Tensor]:
        return self.lm.keep(cache, prompt_M)

    def join(self, first: Any, second: Any) -> tuple[Any, Tensor, Tensor]:
        return self.lm.join(first, second)

    def logprobs(self, cache: Any, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        logits = len(token_E) if space == "trie" else len(row_N) * self.vocab_size
        self._behind += FlopCount(logits=logits)
        return self.lm.logprobs(cache, row_N, position_E, token_E, space)

    def best_tokens(self, cache: Any, row_N: Tensor) -> Tensor:
        self._behind += FlopCount(logits=len(row_N) * self.vocab_size)
        return self.lm.best_tokens(cache, row_N)

    def take(self) -> FlopCount:
        """Everything since the last call, and start from zero."""
        mean_prompt = self._prompts.tokens / max(1, self._num_prompts)
        total = self._prompts + self._behind + FlopCount(pairs=self._behind.tokens * mean_prompt)
        self._prompts, self._num_prompts, self._behind = FlopCount(), 0, FlopCount()
        return total
