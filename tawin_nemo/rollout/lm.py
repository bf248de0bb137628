"""What a search needs of a language model, and no more: prompts in once, then chains of tokens, then edge log-probs."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

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
