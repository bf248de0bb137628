"""Which device a tensor pretends to be on: a mark on its storage, so that views share it and it ends with the memory.

Unmarked storages are host memory, as they are: from NumPy, pickles and files. ``UNKNOWN`` is what C++ makes without
saying where (zeros in a backward formula); it takes the device of whatever it is first used with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

CPU, CUDA, UNKNOWN = "cpu", "cuda", "unknown"
_MARK, _PINNED = "_simcuda_tag", "_simcuda_pinned"


def holder(tensor: Tensor) -> Any:
    """What carries the tensor's mark: its storage, or the tensor itself where it has none (sparse ones, wrappers)."""
    if tensor.layout is not torch.strided:
        return tensor
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return tensor
    return storage if isinstance(storage, torch.UntypedStorage) else tensor


def tag_of(tensor: Tensor) -> str:
    """CPU, CUDA or UNKNOWN."""
    return getattr(holder(tensor), _MARK, CPU)


def set_tag(tensor: Tensor, tag: str) -> None:
    setattr(holder(tensor), _MARK, tag)


def is_marked(tensor: Tensor) -> bool:
    """Whether anything has said where the tensor is."""
    return hasattr(holder(tensor), _MARK)


def is_pinned(tensor: Tensor) -> bool:
    return bool(getattr(holder(tensor), _PINNED, False))


def set_pinned(tensor: Tensor) -> None:
    setattr(holder(tensor), _PINNED, True)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments or results, also those in lists and dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
