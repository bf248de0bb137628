"""What every operation on tensors costs on the pretended device, and whether a GPU would accept its devices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.simcuda import groups
from tests.simcuda.ledger import record
from tests.simcuda.tags import CPU, CUDA, UNKNOWN, is_marked, set_tag, tag_of, tensors_in
from tests.simcuda.transfers import check_arrived, fault, transfer, wait

#: Operations for which a GPU needs their result on the host (as torch.cuda.set_sync_debug_mode reports them).
WAITS = (
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    *("equal", "bincount", "segment_reduce", "_local_scalar_dense"),
)
_NO_KERNEL = (
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("_unsafe_view", "set_", "resize_", "_local_scalar_dense", "record_stream"),
)
#: Operations that may see both devices.
_ANY_DEVICES = ("copy_", "set_", "resize_")
_INDEXED = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
#: Operations that take no scalar from the host in place of a tensor; elementwise ones do.
_NO_HOST_SCALAR = (
    *("gather", "index_select", "cat", "stack", "scatter", "scatter_", "index_add", "index_add_", "index_copy"),
    *("index_copy_", "searchsorted", "mm", "addmm", "bmm", "embedding"),
)


class _Facts(NamedTuple):
    name: str
    namespace: str
    launches: bool
    in_place: bool


@cache
def _facts(func: Any) -> _Facts:
    schema = func._schema
    name = schema.name.split("::")[-1]
    returned = [value.alias_info for value in schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returned)
    in_place = any(alias is not None and alias.is_write for alias in returned)
    return _Facts(name, func.namespace, not is_view and name not in _NO_KERNEL, in_place)


class Operations(TorchDispatchMode):
    """Marks results with their device, counts, and raises DeviceFault where devices are mixed."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        facts = _facts(func)
        with torch._C.DisableTorchFunction():
            inputs = [*tensors_in(args), *tensors_in(kwargs.values())]
            tags = [tag_of(tensor) for tensor in inputs]
            if facts.namespace == "c10d":
                groups.check_collective(facts.name, args, inputs, tags)
            elif CUDA in tags and CPU in tags:
                _check_devices(facts, args, inputs, tags)
            if UNKNOWN in tags:
                _adopt(inputs, tags)
            check_arrived(inputs if facts.name != "copy_" else inputs[1:])
        result = func(*args, **kwargs)
        if facts.namespace != "c10d":
            with torch._C.DisableTorchFunction():
                _count(facts, args, kwargs, inputs, CUDA in tags)
                _mark(result, inputs, tags)
        return result


def _check_devices(facts: _Facts, args: Sequence[Any], inputs: list[Tensor], tags: list[str]) -> None:
    """Raises DeviceFault for a mixture of devices that CUDA's kernels do not take."""
    if facts.name in _ANY_DEVICES:
        return
    if facts.name in _INDEXED:
        return _check_index(facts.name, args, inputs, tags)
    if facts.name.startswith("_fused_adam"):  # the kernel reads the counters' addresses without a look at their device
        fault(f"{facts.name} reads {tags.count(CPU)} tensors of host memory on the device: illegal memory access")
    scalars_allowed = facts.name not in _NO_HOST_SCALAR
    wrong = [x for x, tag in zip(inputs, tags, strict=True) if tag == CPU and not (scalars_allowed and x.dim() == 0)]
    written_on_host = facts.in_place and tags[0] == CPU
    if wrong or written_on_host:
        _mixed(facts.name, inputs, tags)
    return None


def _check_index(name: str, args: Sequence[Any], inputs: list[Tensor], tags: list[str]) -> None:
    """Indices on the host are taken (and copied) for a tensor on the device, but not the other way round."""
    values = next((x for x in args[2:3] if isinstance(x, Tensor)), None)
    values_on_host = values is not None and values.dim() > 0 and tag_of(values) == CPU
    if tag_of(args[0]) == CPU or values_on_host:
        _mixed(name, inputs, tags)
    for index in tensors_in(args[1]):
        if tag_of(index) == CPU:
            transfer(index, to_host=False, non_blocking=False, operation=f"{name} by host memory")


def _mixed(name: str, inputs: list[Tensor], tags: list[str]) -> None:
    given = ", ".join(f"{tag}{list(x.shape)}" for x, tag in zip(inputs, tags, strict=True))
    fault(f"Expected all tensors to be on the same device: {name}({given})")


def _adopt(inputs: list[Tensor], tags: list[str]) -> None:
    """Tensors of unknown device are where their partners are."""
    known = CUDA if CUDA in tags else CPU
    partners = [x.dim() for x, tag in zip(inputs, tags, strict=True) if tag == known]
    if known == CPU and not any(partners):  # alone, or only beside numbers, which may be anywhere
        return
    for tensor, tag in zip(inputs, tags, strict=True):
        if tag == UNKNOWN:
            set_tag(tensor, known)


def _count(
    facts: _Facts, args: Sequence[Any], kwargs: dict[str, Any], inputs: list[Tensor], on_device: bool
) -> None:  # fmt: skip
    if not on_device:
        return
    if facts.name == "copy_":
        target, source = tag_of(args[0]), tag_of(args[1])
        if target != source:
            non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            transfer(args[0], to_host=target != CUDA, non_blocking=non_blocking, operation="copy_")
            return
    if facts.launches:
        record("launches", facts.name)
    checks_lengths = kwargs.get("lengths") is not None and not kwargs.get("unsafe", False)
    if facts.name == "segment_reduce" and not checks_lengths:  # offsets are taken as they are
        return
    if facts.name in WAITS or (facts.name == "repeat_interleave" and kwargs.get("output_size") is None):
        wait("item" if facts.name == "_local_scalar_dense" else facts.name)
    elif facts.name in _INDEXED:
        for index in tensors_in(args[1]):
            if index.dtype in (torch.bool, torch.uint8):
                wait(f"{facts.name} by a mask")


def _mark(result: Any, inputs: list[Tensor], tags: list[str]) -> None:
    """New memory is where the inputs are; views and results written in place have their mark."""
    if CUDA in tags:
        tag = CUDA
    else:
        tag = CPU if CPU in tags else UNKNOWN
    given = {id(tensor) for tensor in inputs}
    for tensor in tensors_in((result,)):
        if id(tensor) not in given and not is_marked(tensor):
            set_tag(tensor, tag)
