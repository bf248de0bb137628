"""The ranks that share a served model: rank 0 broadcasts each message and executes it as well; the others follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.models.megatron.parallel.channel import Channel, Link
from tawin_nemo.serve.engine.messages import MESSAGES, LoadWeights, Message, Probe, PutCatalog, ReceiveWeights
from tawin_nemo.serve.engine.replica import Replica
from tawin_nemo.util.errors import TawinError


class Ranks(Link, Protocol):
    """The processes that share one model, and the collectives that they need besides messages."""

    size: int

    def barrier(self) -> None:
        """Block until all ranks have called it; raises when one of them is gone."""
        ...

    def broadcast_tensor(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rank 0's tensor of this shape and dtype, in CPU memory on every rank; the others pass None."""
        ...


class SingleProcess:
    """One process without followers."""

    size = 1

    def send(self, data: bytes) -> None:
        pass

    def receive(self) -> bytes:
        raise RuntimeError("a server of one process has no rank 0 to follow")

    def barrier(self) -> None:
        pass

    def broadcast_tensor(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert tensor is not None
        return tensor


class Leader:
    """Rank 0's access to the model: every message goes to all ranks."""

    def __init__(self, replica: Replica, ranks: Ranks) -> None:
        self.replica, self.ranks = replica, ranks
        self._channel = Channel(ranks)

    def apply(self, message: Message) -> Any:
        """Execute a message on all ranks; returns what ``Replica.apply`` returns on rank 0."""
        self._broadcast(message)
        if isinstance(message, Probe):
            self.ranks.barrier()
        return self.replica.apply(message)

    def put_catalog(self, message: PutCatalog, trie: TokenTrie) -> None:
        """Install a catalog on all ranks; rank 0 passes its ``trie``, the others build theirs."""
        self._broadcast(message)
        self.replica.tries[message.version] = trie

    def broadcast_weights(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Send all tensors of a model from rank 0's memory to all ranks as weights ``version``.

        Raises RuntimeError when rank 0 fails on the way: the other ranks then wait for the rest.
        """
        self._broadcast(ReceiveWeights(version))
        try:
            self.replica.models[version] = self.replica.build_from_tensors(
                lambda name, shape, dtype: self.ranks.broadcast_tensor(tensors[name], shape, dtype)
            )
        except TawinError as error:
            raise RuntimeError("the ranks stopped in the middle of new weights") from error

    def _broadcast(self, message: Message) -> None:
        if self.ranks.size > 1:
            self._channel.broadcast(message)


def follow(replica: Replica, ranks: Ranks) -> None:
    """Execute rank 0's messages until ``Stop``; called by all other ranks.

    An error ends this rank, and with it the server. The exception is weights that cannot be loaded: every rank fails
    in the same way and keeps its weights.
    """

    def handle(message: Message) -> None:
        if isinstance(message, Probe):
            ranks.barrier()
        if isinstance(message, ReceiveWeights):
            model = replica.build_from_tensors(lambda name, shape, dtype: ranks.broadcast_tensor(None, shape, dtype))
            replica.models[message.version] = model
        try:
            replica.apply(message)
        except TawinError:
            if not isinstance(message, LoadWeights):
                raise

    Channel(ranks).follow(MESSAGES, handle)
