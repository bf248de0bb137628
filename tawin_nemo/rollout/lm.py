"""What a search needs of a language model, and no more: prompts in once, then one token at a time."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class LM(Protocol):
    """A causal language model with a cache that the caller does not look into.

    Logits are float32 (float64 if the model computes in it), without padded vocabulary columns, and the same on all
    ranks that share one model. Token and index tensors may come from any device; logits lie on the model's.
    """

    @property
    def vocab_size(self) -> int: ...

    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor, *, reserve: int) -> tuple[Tensor, Any]:
        """Run B right-padded prompts (lengths >= 1). ``reserve``: at most so many tokens will follow per row.

        Returns the next-token ``logits_BV`` after each row's last token, and the cache with B rows.
        """
        ...

    def extend(self, cache: Any, parents_R: Tensor, tokens_R: Tensor) -> tuple[Tensor, Any]:
        """Continue row ``parents_R[r]`` of the cache with ``tokens_R[r]``; a row may go on many times, or not at all.

        Returns ``logits_RV`` and a cache with R rows. The old cache must not be used again.
        """
        ...
