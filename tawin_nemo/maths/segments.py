"""Log-softmax over the segments of a flat, sorted array: the children of many trie nodes in one call.

E values, N segments.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_log_softmax(values_E: Tensor, segment_E: Tensor, num_segments: int) -> Tensor:
    """Log-softmax within each segment (``segment_E`` ascending). A segment of one element gives exactly 0.

    >>> segment_log_softmax(torch.tensor([0.0, 0.0, 7.0]), torch.tensor([0, 0, 1]), 2).exp()
    tensor([0.5000, 0.5000, 1.0000])
    """
    if len(values_E) == 0:  # torch has no maximum over nothing
        return values_E
    # offsets, not lengths: these are checked, for which the host would wait for the device
    starts = segment_starts(segment_E, num_segments)
    peak_N = torch.segment_reduce(values_E.detach(), "max", offsets=starts)
    # index_select, not indexing: for a few thousand numbers the latter wakes all CPU threads, which costs far more
    shifted_E = values_E - peak_N.index_select(0, segment_E)
    # Not index_add: its order of summation varies on CUDA, and ranks that share a model must decide alike.
    total_N = torch.segment_reduce(shifted_E.exp(), "sum", offsets=starts)
    return shifted_E - total_N.log().index_select(0, segment_E)


def segment_starts(segment_E: Tensor, num_segments: int) -> Tensor:
    """[N + 1] where each segment begins in an ascending ``segment_E``, and E behind; no host sync.

    >>> segment_starts(torch.tensor([0, 0, 2]), 3).tolist()
    [0, 2, 2, 3]
    """
    return torch.searchsorted(segment_E, torch.arange(num_segments + 1, device=segment_E.device))
