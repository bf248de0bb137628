"""Rank 0 tells the others each order before it carries it out itself; they follow until they are told to stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.serve.engine.orders import LoadWeights, Order, Probe, PutCatalog, Stop, TakeWeights, decode, encode
from tawin_nemo.serve.engine.replica import Replica
from tawin_nemo.util.errors import TawinError


class Ranks(Protocol):
    """The processes that share one model."""

    size: int

    def send(self, data: bytes) -> None:
        """From rank 0 to all others; raises when one of them is gone."""
        ...

    def receive(self) -> bytes: ...

    def meet(self) -> None:
        """Returns when all of them are here; raises when one of them is gone."""
        ...

    def share(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rank 0's tensor, on every rank, in CPU memory; the others pass None."""
        ...


class Alone:
    """One process."""

    size = 1

    def send(self, data: bytes) -> None:
        pass

    def receive(self) -> bytes:
        raise RuntimeError("a process without others has nobody to follow")

    def meet(self) -> None:
        pass

    def share(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert tensor is not None
        return tensor


class Leader:
    """Rank 0's way to the model: every order goes to all ranks."""

    def __init__(self, replica: Replica, ranks: Ranks) -> None:
        self.replica, self.ranks = replica, ranks

    def apply(self, order: Order) -> Any:
        """What rank 0 itself gets out of the order."""
        self._send(order)
        if isinstance(order, Probe):
            self.ranks.meet()
        return self.replica.apply(order)

    def put_catalog(self, order: PutCatalog, trie: TokenTrie) -> None:
        """As ``apply``, with a trie that rank 0 has built already."""
        self._send(order)
        self.replica.tries[order.version] = trie

    def take_weights(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """All tensors of a model, from rank 0's memory to all ranks, as a new version."""
        self._send(TakeWeights(version))
        try:
            self.replica.models[version] = self.replica.build_from_tensors(
                lambda name, shape, dtype: self.ranks.share(tensors[name], shape, dtype)
            )
        except TawinError as error:  # the others wait for the rest
            raise RuntimeError("the ranks stopped in the middle of new weights") from error

    def _send(self, order: Order) -> None:
        if self.ranks.size > 1:
            self.ranks.send(encode(order))


def follow(replica: Replica, ranks: Ranks) -> None:
    """Carry out rank 0's orders until ``Stop``. Errors end this rank, and with it all.

    The exception are weights that cannot be loaded: every rank finds that alike and goes on with those it has.
    """
    while True:
        order = decode(ranks.receive())
        if isinstance(order, Stop):
            return
        if isinstance(order, Probe):
            ranks.meet()
        if isinstance(order, TakeWeights):
            model = replica.build_from_tensors(lambda name, shape, dtype: ranks.share(None, shape, dtype))
            replica.models[order.version] = model
        try:
            replica.apply(order)
        except TawinError:
            if not isinstance(order, LoadWeights):
                raise
