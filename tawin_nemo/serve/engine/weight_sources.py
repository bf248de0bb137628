"""Sources of new weights: files, or tensors received through a process group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tawin_nemo.rollout.lm import LM
from tawin_nemo.serve.engine.messages import LoadWeights
from tawin_nemo.serve.engine.ranks import Leader
from tawin_nemo.serve.engine.replica import Replica


class Source(Protocol):
    """New weights, which are loaded beside those in use."""

    def load_here(self, replica: Replica) -> LM:
        """Load a model in a server of one process; called outside of the engine's thread."""
        ...

    def load_on_all_ranks(self, leader: Leader, version: int) -> None:
        """Load them on all ranks as ``version``; called on the engine's thread."""
        ...


@dataclass(frozen=True)
class FromDisk:
    """A stage, a step or a Hugging Face folder."""

    path: str

    def load_here(self, replica: Replica) -> LM:
        replica.check(self.path)
        return replica.load(self.path)

    def load_on_all_ranks(self, leader: Leader, version: int) -> None:
        leader.apply(LoadWeights(version, self.path))


#: In front of a path: a published version, whose model may have another vocabulary than the one that is served.
VERSION_PREFIX = "version:"


@dataclass(frozen=True)
class FromVersion(FromDisk):
    """The folder of a published version (``run.published``)."""

    @classmethod
    def at(cls, folder: Path) -> FromVersion:
        """The version in ``folder``."""
        return cls(f"{VERSION_PREFIX}{folder}")


@dataclass(frozen=True)
class FromMemory:
    """Whole tensors by Hugging Face name, whose names and shapes were checked against the model."""

    tensors: Mapping[str, Tensor]

    def load_here(self, replica: Replica) -> LM:
        return replica.build_from_tensors(lambda name, shape, dtype: self.tensors[name])

    def load_on_all_ranks(self, leader: Leader, version: int) -> None:
        leader.broadcast_weights(version, self.tensors)
