"""Weights that other ranks are still sending (``trainer.overlap_param_gather``): whoever reads a model waits for them.

The gather of new weights may run beside what follows an optimizer step. A training pass waits module by module, through
hooks on the model; code that reads parameters in any other way calls ``wait_for_weights`` first. What counts is the
memory, so that a model that shares the parameters of another waits for them as well.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import torch


class Gather(Protocol):
    """A gather that has been started: ``storages`` are the addresses of the memory that it fills."""

    storages: frozenset[int]

    def wait(self) -> None:
        """Return when all weights are there."""


_under_way: weakref.WeakSet[Gather] = weakref.WeakSet()


def under_way(gather: Gather) -> None:
    """Let readers wait for ``gather``, until one has done so."""
    _under_way.add(gather)


def wait_for_weights(model: torch.nn.Module | None) -> None:
    """Return when all weights of ``model`` are those of the last optimizer step.

    Does nothing for None, and for models whose memory no gather fills. Not collective: every rank has started the
    gather already.
    """
    if model is None or not _under_way:
        return
    addresses = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for gather in list(_under_way):
        if not gather.storages.isdisjoint(addresses):
            gather.wait()
            _under_way.discard(gather)
