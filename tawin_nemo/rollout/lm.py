"""The language-model interface of searches: prefill prompts, extend chains of tokens, read log-probs of trie edges."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from tawin_nemo.config.backbones import FlopCount
from tawin_nemo.types import TokenRows


class LM(Protocol):
    """A causal language model over a growing tree of tokens, with an opaque key-value cache.

    Every token that was run is a *row* of the cache; rows are numbered in the order in which they came, the last
    token of prompt b being row b. A row can be continued at any time, any number of times. All ranks that share one
    model make the same calls and get the same numbers. Index tensors may come from any device; results lie on the
    model's.
    """

    @property
    def vocab_size(self) -> int:
        """Number of tokens V that the model gives probabilities to; token ids are below it."""
        ...

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
        """The cache of M of its prompts only (ascending), and ``new_R``: the new number of each old row, -1 if removed.

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

    def top_tokens(self, cache: Any, row_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` most likely tokens of the whole vocabulary after each row (fewer where it is smaller), best
        first, and their log-probs. [N, count] each."""
        ...

    def hidden_states(self, cache: Any, row_N: Tensor) -> Tensor:
        """The states behind the final norm, from which the next token is predicted, at N rows. [N, D]."""
        ...


# -- Decoding of fixed shapes, for searches that are captured in CUDA graphs.


class FixedShape(Protocol):
    """Static buffers of B prompts and of the tokens below them; rows as in ``LM``, except for their numbers.

    Only ``fill``, ``addresses`` and ``tokens_run`` may make the host wait for the device; ``prefill``, ``extend`` and
    ``logprobs`` do the same operations on the same memory whatever the values in it are.
    """

    def fill(self, prompts: TokenRows) -> None:
        """Take B prompts; what was run before is forgotten."""
        ...

    def prefill(self) -> None:
        """Run the prompts; row b is the last token of prompt b."""
        ...

    def extend(self, parent_BW: Tensor, token_BWL: Tensor, length_BW: Tensor) -> Tensor:
        """Run the first ``length_BW`` tokens of each chain below a row of the prompt: the rows [B, W] of their ends."""
        ...

    def logprobs(self, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        """As ``LM.logprobs``."""
        ...

    def state(self) -> list[Tensor]:
        """The buffers that ``extend`` changes and that a repetition of it would change again."""
        ...

    def addresses(self) -> tuple[int, ...]:
        """Where everything lies in memory that ``extend`` and ``logprobs`` read and write, weights included."""
        ...

    def tokens_run(self) -> int:
        """Tokens that were run since ``fill``, without the prompts."""
        ...


@runtime_checkable
class FixedShapeLM(Protocol):
    """A language model that can decode in static buffers."""

    def fixed_shape(self, prompts: int, prompt_slots: int, slots: int) -> FixedShape | None:
        """Buffers for B prompts of at most ``prompt_slots`` tokens with at most ``slots`` tokens below each.

        None if the model's layout cannot decode so.
        """
        ...


# -- FLOP counting.


def num_item_tokens(lm: LM) -> int:
    """Items whose tokens (``FIRST_ITEM_TOKEN`` and further) the model reads in prompts; 0 for models without any."""
    return int(getattr(lm, "num_item_tokens", 0))


class MeteredLM:
    """Forwards every call of the LM protocol to ``lm`` and counts FLOPs, which ``pop_flops`` returns and resets.

    Counting looks at sizes only, so it does not synchronise the device. A token behind the prompts is assumed to attend
    to a prompt of mean length: exact for the prompts, a few keys short for the tokens behind them.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self._prompts = FlopCount()
        self._num_prompts = 0
        self._extended = FlopCount()

    @property
    def vocab_size(self) -> int:
        """Token ids of ``lm`` are below this."""
        return self.lm.vocab_size

    @property
    def max_positions(self) -> int:
        """Tokens of the longest prompt and path together that ``lm`` takes."""
        return self.lm.max_positions

    @property
    def num_item_tokens(self) -> int:
        """That of the model below."""
        return num_item_tokens(self.lm)

    def prefill(self, prompts: TokenRows) -> Any:
        """Run B prompts and count their tokens and attention pairs."""
        self._count_prompts(prompts)
        return self.lm.prefill(prompts)

    def _count_prompts(self, prompts: TokenRows) -> None:
        lengths_B = prompts.lengths.astype(np.float64)
        self._prompts += FlopCount(tokens=len(prompts.flat), pairs=float((lengths_B * (lengths_B + 1) / 2).sum()))
        self._num_prompts += len(prompts)

    def extend(self, cache: Any, parent_R: Tensor, chains: TokenRows) -> Any:
        """Append chains of tokens to rows of the cache and count their tokens."""
        self._extended += FlopCount(tokens=len(chains.flat))
        return self.lm.extend(cache, parent_R, chains)

    def rows(self, cache: Any) -> int:
        """Number of rows of the cache; counts nothing."""
        return self.lm.rows(cache)

    def keep(self, cache: Any, prompt_M: Tensor) -> tuple[Any, Tensor]:
        """Reduce the cache to some prompts; counts nothing."""
        return self.lm.keep(cache, prompt_M)

    def join(self, first: Any, second: Any) -> tuple[Any, Tensor, Tensor]:
        """Merge two caches; counts nothing."""
        return self.lm.join(first, second)

    def logprobs(self, cache: Any, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        """Log-probs [E] of edges; counts the output logits: E in trie space, N times V in vocab space."""
        logits = len(token_E) if space == "trie" else len(row_N) * self.vocab_size
        self._extended += FlopCount(logits=logits)
        return self.lm.logprobs(cache, row_N, position_E, token_E, space)

    def fixed_shape(self, prompts: int, prompt_slots: int, slots: int) -> FixedShape | None:
        """Buffers of ``lm``, if it has any; what is run in them is counted by ``count``."""
        return self.lm.fixed_shape(prompts, prompt_slots, slots) if isinstance(self.lm, FixedShapeLM) else None

    def count(self, prompts: TokenRows, tokens: int, logits: int) -> None:
        """Count a search whose passes this meter did not see: its prompts, and the tokens and output logits below."""
        self._count_prompts(prompts)
        self._extended += FlopCount(tokens=tokens, logits=logits)

    def best_tokens(self, cache: Any, row_N: Tensor) -> Tensor:
        """The most likely token of each row; counts N times V output logits."""
        self._extended += FlopCount(logits=len(row_N) * self.vocab_size)
        return self.lm.best_tokens(cache, row_N)

    def top_tokens(self, cache: Any, row_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The most likely tokens of each row; counts N times V output logits."""
        self._extended += FlopCount(logits=len(row_N) * self.vocab_size)
        return self.lm.top_tokens(cache, row_N, count)

    def hidden_states(self, cache: Any, row_N: Tensor) -> Tensor:
        """The final states of some rows; counts nothing."""
        return self.lm.hidden_states(cache, row_N)

    def pop_flops(self) -> FlopCount:
        """FLOP counts since the last call; resets them to zero."""
        mean_prompt = self._prompts.tokens / max(1, self._num_prompts)
        total = self._prompts + self._extended + FlopCount(pairs=self._extended.tokens * mean_prompt)
        self._prompts, self._num_prompts, self._extended = FlopCount(), 0, FlopCount()
        return total
