"""The ranks that share a served model: rank 0 broadcasts each message and executes it as well; the others follow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.models.megatron.parallel.channel import Channel, Link
from tawin_nemo.serve.engine.messages import MESSAGES, LoadWeights, Message, Probe, PutCatalog, ReceiveWeights
from tawin_nemo.serve.engine.replica import Replica
from tawin_nemo.util.errors import CatalogError, CheckpointError, TawinError
from tawin_nemo.util.log import get_logger

T = TypeVar("T")
log = get_logger(__name__)


class RanksLost(RuntimeError):
    """A rank of the server is gone or no longer follows rank 0: the state of the ranks is unknown, the server ends."""


class Ranks(Link, Protocol):
    """The processes that share one model, and the collectives that they need besides messages."""

    size: int

    def barrier(self) -> None:
        """Block until all ranks have called it; raises when one of them is gone."""
        ...

    def first_problem(self, problem: str) -> str:
        """The first text that is not empty, by rank, the same on all ranks; empty when every rank passes none."""
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

    def first_problem(self, problem: str) -> str:
        return problem

    def broadcast_tensor(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert tensor is not None
        return tensor


def agreed(ranks: Ranks, kind: type[TawinError], build: Callable[[], T]) -> T:
    """What ``build`` makes on this rank, once it has succeeded on every rank.

    Raises ``kind`` on all ranks, with the first rank's reason, when it fails on one of them: all keep what they had.
    Raises RanksLost when a rank does not answer.
    """
    problem, made = "", None
    try:
        made = build()
    except Exception as error:
        problem = str(error) if isinstance(error, TawinError) else f"{type(error).__name__}: {error}"
        log.warning("a command failed on this rank: %s", problem, exc_info=not isinstance(error, TawinError))
    first = _together(lambda: ranks.first_problem(problem))
    if first:
        raise kind(first)
    return made  # type: ignore[return-value]


def load_weights(replica: Replica, ranks: Ranks, message: LoadWeights) -> None:
    """Carry out ``message`` on this rank, as all others do: first every rank looks at the files, then all load.

    Raises CheckpointError on all ranks when one of them cannot; no rank then has the weights.
    """
    agreed(ranks, CheckpointError, partial(replica.check, message.path))
    replica.models[message.version] = agreed(ranks, CheckpointError, partial(replica.load, message.path))


def _together(call: Callable[[], T]) -> T:
    """A collective. Raises RanksLost when it fails."""
    try:
        return call()
    except RuntimeError as error:
        raise RanksLost(f"a rank of the server is lost ({error})") from error


class Leader:
    """Rank 0's access to the model: every message goes to all ranks."""

    def __init__(self, replica: Replica, ranks: Ranks) -> None:
        self.replica, self.ranks = replica, ranks
        self._channel = Channel(ranks)

    def apply(self, message: Message) -> Any:
        """Execute a message on all ranks; returns what ``Replica.apply`` returns on rank 0.

        Raises CheckpointError for weights that one of the ranks cannot load (no rank then has them), RanksLost when a
        rank is gone, and as ``Replica.apply``.
        """
        self._broadcast(message)
        if isinstance(message, Probe):
            _together(self.ranks.barrier)
        if isinstance(message, LoadWeights):
            load_weights(self.replica, self.ranks, message)
        return self.replica.apply(message)

    def put_catalog(self, message: PutCatalog, trie: TokenTrie) -> None:
        """Install a catalog on all ranks; rank 0 passes its ``trie``, the others build theirs.

        Raises CatalogError when one of them cannot; no rank then has it.
        """
        self._broadcast(message)
        self.replica.tries[message.version] = agreed(self.ranks, CatalogError, lambda: trie)

    def broadcast_weights(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Send all tensors of a model from rank 0's memory to all ranks as weights ``version``.

        The tensors must have been checked. Raises RanksLost when rank 0 fails on the way: the other ranks then wait
        for the rest.
        """
        self._broadcast(ReceiveWeights(version))
        try:
            self.replica.models[version] = self.replica.build_from_tensors(
                lambda name, shape, dtype: self.ranks.broadcast_tensor(tensors[name], shape, dtype)
            )
        except TawinError as error:
            raise RanksLost("the ranks stopped in the middle of new weights") from error

    def _broadcast(self, message: Message) -> None:
        if self.ranks.size > 1:
            _together(lambda: self._channel.broadcast(message))


def follow(replica: Replica, ranks: Ranks) -> None:
    """Execute rank 0's messages until ``Stop``; called by all other ranks.

    An error ends this rank, and with it the server. The exceptions are weights and catalogs that one of the ranks
    cannot build: every rank then keeps those it has.
    """

    def handle(message: Message) -> None:
        if isinstance(message, Probe):
            ranks.barrier()
        if isinstance(message, ReceiveWeights):
            model = replica.build_from_tensors(lambda name, shape, dtype: ranks.broadcast_tensor(None, shape, dtype))
            replica.models[message.version] = model
        if isinstance(message, LoadWeights):
            with contextlib.suppress(CheckpointError):
                load_weights(replica, ranks, message)
        elif isinstance(message, PutCatalog):
            with contextlib.suppress(CatalogError):
                build = partial(TokenTrie.from_paths, message.paths)
                replica.tries[message.version] = agreed(ranks, CatalogError, build)
        else:
            replica.apply(message)

    Channel(ranks).follow(MESSAGES, handle)
