"""Where new weights come from: files, or a process group's tensors. Either way beside those in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tawin_nemo.rollout.lm import LM
from tawin_nemo.serve.engine.messages import LoadWeights
from tawin_nemo.serve.engine.ranks import Leader
from tawin_nemo.serve.engine.replica import Replica


class Source(Protocol):
    """New weights, for a process alone or for ranks that share a model."""

    def load_here(self, replica: Replica) -> LM:
        """A model with them; called beside the engine's thread, changes nothing in use."""
        ...

    def load_on_all_ranks(self, leader: Leader, version: int) -> None:
        """Give them to all ranks as ``version``; called on the engine's thread."""
        ...


@dataclass(frozen=True)
class FromDisk:
    """A stage, a step or a Hugging Face folder."""

    path: str

    def load_here(self, replica: Replica) -> LM:
        return replica.load(self.path)

    def load_on_all_ranks(self, leader: Leader, version: int) -> None:
        leader.apply(LoadWeights(version, self.path))


@dataclass(frozen=True)
class FromMemory:
    """Whole tensors, by name, that were checked against what the model consists of."""

    tensors: Mapping[str, Tensor]

    def load_here(self, replica: Replica) -> LM:
        return replica.build_from_tensors(lambda name, shape, dtype: self.tensors[name])

    def load_on_all_ranks(self, leader: Leader, version: int) -> None:
        leader.broadcast_weights(version, self.tensors)
