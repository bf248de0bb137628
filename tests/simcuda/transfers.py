"""Copies between host and pretended device, waits of the host, and the faults that a real device would have."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import Tensor

from tests.simcuda.ledger import record
from tests.simcuda.tags import CPU, holder, tag_of


class DeviceFault(RuntimeError):
    """What would end, hang or falsify a run on a real GPU."""


#: Every fault so far, also those whose exception somebody has caught.
FAULTS: list[str] = []
#: Host memory that the device may still be writing into: storages, by id.
_pending: dict[int, Any] = {}


def fault(what: str) -> NoReturn:
    """Remember the fault with its place in the product, and raise it."""
    frames = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if "/simcuda/" not in frame.filename and ("/tawin_nemo/" in frame.filename or "/megatron/" in frame.filename)
    ]
    FAULTS.append(f"{what} at {frames[-1] if frames else 'no place of the product'}")
    raise DeviceFault(what)


def transfer(destination: Tensor, *, to_host: bool, non_blocking: bool, operation: str) -> None:
    """Count a copy between host and device; unless it is ``non_blocking`` the host waits for the device."""
    record("d2h" if to_host else "h2d", operation)
    if not non_blocking:
        wait(operation)
    elif to_host:
        memory = holder(destination)
        _pending[id(memory)] = memory


def wait(operation: str) -> None:
    """Count a wait of the host for the device. All copies have arrived afterwards."""
    record("syncs", operation)
    _pending.clear()


def check_arrived(tensors: Iterable[Tensor]) -> None:
    """Raises DeviceFault for host memory that is used before its copy from the device has been waited for."""
    if not _pending:
        return
    for tensor in tensors:
        if tag_of(tensor) == CPU and id(holder(tensor)) in _pending:
            fault(f"host memory {list(tensor.shape)} is used before its non_blocking copy has been waited for")
