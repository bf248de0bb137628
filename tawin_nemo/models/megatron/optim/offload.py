"""Offload of gradients and optimizer state to CPU memory while the model only runs rollouts.

megatron has the same for RL, but its optimizers replace the tensors by others, which tears float32 master weights off
the parameters that they are views of. Here storages are emptied and filled again, so that every tensor and view stays
what it is. On a CPU the same is done, from memory to memory.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


class OptimizerOffload:
    """Moves the state of ``optimizer`` to (pinned) CPU memory and back; gradients are dropped, not kept."""

    def __init__(self, ddp: DistributedDataParallel, optimizer: Any) -> None:
        self._ddp, self._optimizer = ddp, optimizer
        self._hosts: list[torch.Tensor] = []

    @contextlib.contextmanager
    def offloaded(self) -> Iterator[None]:
        """Inside, nothing may touch gradients or optimizer; the model's weights stay where they are."""
        moved = self._storages()
        self._copy_out(moved)
        with warnings.catch_warnings(action="ignore"):  # torch's about TypedStorage, which megatron uses
            self._ddp.offload_grad_buffers()
        try:
            yield
        finally:
            with warnings.catch_warnings(action="ignore"):
                self._ddp.restore_grad_buffers()
            for storage, host in zip(moved, self._hosts, strict=True):
                storage.resize_(host.numel())
                _bytes(storage, host.numel()).copy_(host, non_blocking=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    def _storages(self) -> list[torch.UntypedStorage]:
        """Storages of moments and of master weights apart from the model's own; step counters stay."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self._ddp.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            if part.optimizer is None:  # a rank without parameters of this kind
                continue
            masters = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
            moments = [value for state in part.optimizer.state.values() for value in state.values()]
            for tensor in [*masters, *moments]:
                if isinstance(tensor, torch.Tensor) and tensor.numel() > 1:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage
        return [storage for address, storage in storages.items() if address not in own]

    def _copy_out(self, storages: list[torch.UntypedStorage]) -> None:
        sizes = [storage.nbytes() for storage in storages]
        if sizes != [host.numel() for host in self._hosts]:
            pinned = torch.cuda.is_available()
            self._hosts = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned) for size in sizes]
        for storage, host in zip(storages, self._hosts, strict=True):
            host.copy_(_bytes(storage, host.numel()), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for storage in storages:
            storage.resize_(0)


def _bytes(storage: torch.UntypedStorage, size: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (size,), (1,))
