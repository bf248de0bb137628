"""Small integers on their way to a device: many tensors in one copy, for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host, all of one dtype, on ``device``: views of one tensor there, or themselves on a CPU.

    The driver has read host memory before the copy returns, so the tensors may be changed or freed at once.

    >>> [part.tolist() for part in to_device([torch.tensor([[1, 2]]), torch.tensor(3)], torch.device("cpu"))]
    [[[1, 2]], 3]
    """
    if device.type == "cpu":
        return list(tensors)
    joined = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device, non_blocking=True)
    parts = joined.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
