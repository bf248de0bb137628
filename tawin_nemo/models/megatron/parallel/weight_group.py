"""A process group between two independent jobs, in which rank 0 broadcasts weights to the other ranks.

It has its own store, key prefix and connections and is not part of either job's default group, so that both jobs may
start, end and crash independently (like SGLang's `init_weights_update_group`). When a process dies the others get an
error: over gloo at once, since its connections close, otherwise after the group's time limit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.util.errors import TawinError

#: Seconds between two polls of the store.
_POLL_S = 0.002


class TransferError(TawinError):
    """Weights could not be sent, or did not arrive whole."""


def host_store(limit: timedelta) -> dist.TCPStore:
    """The rendezvous store, hosted by the sending process; ``store.port`` is its port on all its addresses."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)


class WeightGroup:
    """Rank 0 sends, all others receive; one update at a time.

    ``backend``: gloo (through CPU memory) or nccl (between GPUs). Construction returns when all ``size`` ranks have
    joined. ``peer_ended``: polled by rank 0 while it waits, whether the other side has ended its part. Raises
    TransferError when the ranks do not join within ``limit``, or when one of them is lost later.
    """

    def __init__(
        self, store: dist.Store, name: str, rank: int, size: int, *, backend: str, limit: timedelta,
        peer_ended: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.name, self.rank, self.size, self.backend = name, rank, size, backend
        self._store, self._limit, self._updates = dist.PrefixStore(name, store), limit, 0
        self._meet(peer_ended)
        try:
            self._group: Any = _connected(self._store, rank, size, backend, limit)
        except RuntimeError as error:
            raise TransferError(f"the ranks of group {name} did not meet ({_first_line(error)})") from error

    @classmethod
    def join(
        cls, address: str, port: int, name: str, rank: int, size: int, *, backend: str, limit: timedelta
    ) -> WeightGroup:  # fmt: skip
        """Join the group whose store is at ``address:port``. Raises TransferError when it cannot be reached."""
        try:
            store = dist.TCPStore(address, port, is_master=False, timeout=limit)
        except RuntimeError as error:
            raise TransferError(f"{address}:{port} cannot be reached ({_first_line(error)})") from error
        return cls(store, name, rank, size, backend=backend, limit=limit)

    def send(self, tensors: Iterable[Tensor], peer_ended: Callable[[], bool]) -> None:
        """Broadcast the tensors from rank 0 as soon as all other ranks are ready.

        Raises TransferError when a rank is lost, when ``peer_ended()``, or when a rank is not ready within the limit.
        """
        self._updates += 1
        self._signal_or_wait(f"ready/{self._updates}", peer_ended)
        self._broadcast(tensor.to(self._device).contiguous() for tensor in tensors)

    def receive(self, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
        """Receive tensors of these shapes, in the order in which rank 0 sends them, into CPU memory.

        Raises TransferError when rank 0 is lost or does not send within the limit.
        """
        self._updates += 1
        tensors: dict[str, Tensor] = {}
        self._signal_or_wait(f"ready/{self._updates}", lambda: False)
        for name, size in sizes.items():
            box = torch.empty(size, dtype=dtype, device=self._device)
            self._broadcast([box])
            tensors[name] = box.cpu()
        return tensors

    def close(self) -> None:
        """Close the connections; a rank that still waits for this one gets an error."""
        self._group = None

    @property
    def _device(self) -> torch.device:
        return runtime.device() if self.backend == "nccl" else torch.device("cpu")

    def _meet(self, peer_ended: Callable[[], bool]) -> None:
        """Return once all ranks are here, so that none waits for connections that rank 0 will not make.

        A rank that comes after rank 0 has given up, as a process that was suspended does, gets TransferError at once.
        """
        if self.rank:
            self._signal_or_wait("here", peer_ended)
            self._wait_for(["met"], "word of rank 0", self._given_up)
            return
        try:
            self._signal_or_wait("here", peer_ended)
        except TransferError:
            with contextlib.suppress(RuntimeError):
                self._store.set("gone", "1")
            raise
        self._store.set("met", "1")

    def _given_up(self) -> bool:
        return bool(self._store.check(["gone"]))

    def _signal_or_wait(self, word: str, peer_ended: Callable[[], bool]) -> None:
        """All ranks but the first set the key ``word`` in the store; the first one waits for all of them."""
        if not self.rank:
            self._wait_for([f"{word}/{rank}" for rank in range(1, self.size)], word, peer_ended)
            return
        try:
            self._store.set(f"{word}/{self.rank}", "1")
        except RuntimeError as error:
            raise TransferError(f"the store of group {self.name} is gone ({_first_line(error)})") from error

    def _wait_for(self, keys: list[str], word: str, peer_ended: Callable[[], bool]) -> None:
        """Poll the store for all ``keys``. Raises TransferError at the limit, or when ``peer_ended()``."""
        try:
            end = time.monotonic() + self._limit.total_seconds()
            while not self._store.check(keys):
                if peer_ended():
                    raise TransferError(f"the other side of group {self.name} has ended the call")
                if time.monotonic() > end:
                    raise TransferError(f"no {word} from group {self.name} within {self._limit.total_seconds():g} s")
                time.sleep(_POLL_S)
        except RuntimeError as error:
            raise TransferError(f"the store of group {self.name} is gone ({_first_line(error)})") from error

    def _broadcast(self, boxes: Iterable[Tensor]) -> None:
        if self.backend == "nccl":
            runtime.use_device()
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._limit
        for box in boxes:
            try:
                self._group.broadcast([box], options).wait()
                if self.backend == "nccl":  # wait() alone returns before the GPU is done
                    torch.cuda.current_stream().synchronize()
            except RuntimeError as error:
                raise TransferError(f"a process of group {self.name} was lost ({_first_line(error)})") from error


def _connected(store: dist.Store, rank: int, size: int, backend: str, limit: timedelta) -> Any:
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, limit)
    runtime.use_device()
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
