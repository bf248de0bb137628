"""The frozen reference policy: its own copy of the model, weights swapped in from the CPU, or none at all.

``copy`` costs a second set of weights on the device; ``swap`` keeps them in (pinned) CPU memory and exchanges them
with the actor's for the duration of one scoring pass, as NeMo-Aligner does. Both give bit-identical log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tawin_nemo.models.megatron.trainable import score
from tawin_nemo.types import TokenBatch


class Reference(Protocol):
    """Scores token batches with weights that training does not touch."""

    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor] | None:
        """Per batch ``logp_N``; None when the objective has no reference (beta = 0)."""


class NoReference:
    def logprobs(self, batches: Sequence[TokenBatch]) -> None:
        return None


class CopiedReference:
    """A second model beside the actor."""

    def __init__(self, model: GPTModel) -> None:
        self._model = model.eval().requires_grad_(False)

    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        return score(self._model, list(batches))


class SwappedReference:
    """The actor's own model with other weights for a moment."""

    def __init__(self, actor_model: GPTModel, weights: dict[str, Tensor]) -> None:
        self._model, self._weights = actor_model, weights

    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        with self._swapped():
            return score(self._model, list(batches))

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._model.named_parameters():
            kept = self._weights[name]
            current = parameter.detach().to(kept.device, copy=True)
            parameter.copy_(kept)
            kept.copy_(current)


def build_reference(mode: str, beta: float, actor_model: GPTModel, load_initial: Callable[[], GPTModel]) -> Reference:
    """``load_initial`` builds a model with the weights RL started from (also when RL itself was resumed)."""
    if mode == "off" or beta == 0.0:
        return NoReference()
    initial = load_initial()
    if mode == "copy":
        return CopiedReference(initial)
    weights = {name: value.detach().cpu().clone() for name, value in initial.named_parameters()}
    if torch.cuda.is_available():
        weights = {name: value.pin_memory() for name, value in weights.items()}
    return SwappedReference(actor_model, weights)
