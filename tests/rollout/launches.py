"""Counts what a piece of torch code would ask of a GPU, while it runs on the CPU: kernel launches and host syncs.

An operation that computes counts as one launch, whatever kernels it consists of; views and allocations count as none.
A sync is where the host would wait for the device: reading a number, or an operation whose output size depends on data.
Under ``Launches`` the calls of the code are seen below torch's dispatcher, so nothing in it has to be changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations that start no kernel.
FREE = frozenset(
    "view _unsafe_view slice select transpose permute expand unsqueeze squeeze t as_strided detach alias split "
    "split_with_sizes chunk unbind reshape _reshape_alias diagonal unfold narrow lift_fresh view_as set_ resize_ "
    "scalar_tensor values crow_indices col_indices empty empty_like new_empty empty_strided new_empty_strided sym_size "
    "_sparse_csr_tensor_unsafe _sparse_compressed_tensor_unsafe _local_scalar_dense is_pinned".split()
)
#: Operations for which the host waits.
SYNCS = frozenset(
    "nonzero _unique2 unique_dim unique_consecutive masked_select _local_scalar_dense equal bincount is_nonzero "
    "allclose histc".split()
)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


@dataclass
class Count:
    """What was counted; ``operations`` are the names and the shapes of the results, in order."""

    launches: int = 0
    syncs: int = 0
    names: Counter[str] = field(default_factory=Counter)
    operations: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def __sub__(self, other: Count) -> Count:
        return Count(self.launches - other.launches, self.syncs - other.syncs, self.names - other.names)

    def copy(self) -> Count:
        return Count(self.launches, self.syncs, Counter(self.names))


class Launches(TorchDispatchMode):
    """Counts everything that runs inside the ``with`` block, in ``count``."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        boolean = name in INDEXING and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        checked = name == "segment_reduce" and (kwargs or {}).get("lengths") is not None
        sized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in SYNCS or boolean or checked or sized:
            self.count.syncs += 1
            self.count.names["sync " + name] += 1
        if name not in FREE:
            self.count.launches += 1
            self.count.names[name] += 1
        shape = tuple(result.shape) if isinstance(result, Tensor) else ()
        self.count.operations.append((name, shape))
        return result


def metered(function: Callable[..., Any], mode: Launches, seen: list[Count]) -> Callable[..., Any]:
    """``function``, which adds what each of its calls under ``mode`` took to ``seen``."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before = mode.count.copy()
        result = function(*args, **kwargs)
        seen.append(mode.count - before)
        return result

    return wrapped
