"""The reference policy: its own copy of the model, weights swapped in from the CPU, or none at all.

``copy`` keeps a second set of weights on the device. ``swap`` keeps them in (pinned) CPU memory and exchanges them
with the actor's during a scoring pass, as NeMo-Aligner does. Both give bit-identical log-probs. With ``model.lora`` the
actor's frozen weights are the reference: its adapters are switched off during a scoring pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.model.adapters import adapters_of, without_adapters
from tawin_nemo.models.megatron.model.in_flight import wait_for_weights
from tawin_nemo.models.megatron.optim.trainable import score
from tawin_nemo.types import TokenBatch

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True)
class Refresh:
    """How the reference follows the actor: never (``off``), in jumps (``every`` n steps), smoothly (``ema``)."""

    kind: str = "off"
    steps: int = 100
    decay: float = 0.99

    def keeps(self, step: int) -> float:
        """Share of its own weights that the reference keeps after optimizer step number ``step`` (1-based)."""
        if self.kind == "every":
            return 0.0 if step % self.steps == 0 else 1.0
        return self.decay if self.kind == "ema" else 1.0


class Reference(Protocol):
    """Scores token batches with weights of its own, which change only through ``follow``."""

    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor] | None:
        """Per batch ``logp_N``; None when the objective has no reference (beta = 0)."""

    def follow(self, actor_model: GPTModel, keep: float) -> None:
        """``reference = keep * reference + (1 - keep) * actor``; 1 changes nothing."""

    def save(self, path: Path) -> None:
        """Write the weights as a checkpoint (directory ``step_N``)."""

    def load(self, path: Path) -> None:
        """Load the weights that ``save`` wrote. Raises CheckpointError when they are missing or damaged."""


class NoReference:
    """The reference of an objective without KL term: there are no weights to score with, follow, save or load."""

    def logprobs(self, batches: Sequence[TokenBatch]) -> None:
        return None

    def follow(self, actor_model: GPTModel, keep: float) -> None:
        pass

    def save(self, path: Path) -> None:
        pass

    def load(self, path: Path) -> None:
        pass


class CopiedReference:
    """A second model beside the actor (``reference.mode: copy``)."""

    def __init__(self, model: GPTModel) -> None:
        self._model = model.eval().requires_grad_(False)

    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        return score(self._model, list(batches))

    def follow(self, actor_model: GPTModel, keep: float) -> None:
        _blend(dict(self._model.named_parameters()), actor_model, keep)

    def save(self, path: Path) -> None:
        checkpoint.save_checkpoint(path, model=self._model, state={})

    def load(self, path: Path) -> None:
        checkpoint.load_checkpoint(path, model=self._model)


class SwappedReference:
    """The actor's model with other weights during a pass (``reference.mode: swap``)."""

    def __init__(self, actor_model: GPTModel, weights: dict[str, Tensor]) -> None:
        self._model, self._weights = actor_model, weights

    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        with self._swapped():
            return score(self._model, list(batches))

    def follow(self, actor_model: GPTModel, keep: float) -> None:
        _blend(self._weights, actor_model, keep)

    def save(self, path: Path) -> None:
        with self._swapped():
            checkpoint.save_checkpoint(path, model=self._model, state={})

    def load(self, path: Path) -> None:
        with self._swapped():
            checkpoint.load_checkpoint(path, model=self._model)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        wait_for_weights(self._model)
        for name, parameter in self._model.named_parameters():
            kept = self._weights[name]
            current = parameter.detach().to(kept.device, copy=True)
            parameter.copy_(kept)
            kept.copy_(current)


@torch.no_grad()
def _blend(weights: Mapping[str, Tensor], actor_model: GPTModel, keep: float) -> None:
    if keep == 1.0:
        return
    wait_for_weights(actor_model)
    for name, parameter in actor_model.named_parameters():
        kept, now = weights[name], parameter.detach().to(weights[name])  # a reference may have its own precision
        if keep == 0.0:  # exactly the actor's, whatever rounding makes of 0 * w + now
            kept.copy_(now)
        else:
            kept.lerp_(now, 1.0 - keep)


class FrozenReference:
    """The actor's model without its adapters (``model.lora``): what the stage started from, without a second copy."""

    def __init__(self, actor_model: GPTModel) -> None:
        self._model = actor_model

    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        with without_adapters(self._model):
            return score(self._model, list(batches))

    def follow(self, actor_model: GPTModel, keep: float) -> None:
        """Nothing: the weights are frozen (``reference.refresh`` must be off)."""

    def save(self, path: Path) -> None:
        """Nothing: the weights are those that the actor's checkpoints name."""

    def load(self, path: Path) -> None:
        """Nothing: see ``save``."""


def build_reference(mode: str, beta: float, actor_model: GPTModel, load_initial: Callable[[], GPTModel]) -> Reference:
    """``load_initial`` builds a model with the weights RL started from (also when RL itself was resumed).

    An actor with adapters is its own reference: ``copy`` and ``swap`` are then the same.
    """
    if mode == "off" or beta == 0.0:
        return NoReference()
    if adapters_of(actor_model) is not None:
        return FrozenReference(actor_model)
    initial = load_initial()
    if mode == "copy":
        return CopiedReference(initial)
    weights = {name: value.detach().cpu().clone() for name, value in initial.named_parameters()}
    if torch.cuda.is_available():
        weights = {name: value.pin_memory() for name, value in weights.items()}
    return SwappedReference(actor_model, weights)
