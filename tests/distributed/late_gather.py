"""Gathers of new weights that nobody gets to see too early: until a rank has waited for them, the weights that other
ranks send are NaN on it. Code that reads a model without waiting computes NaN, on every run and every machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from tawin_nemo.models.megatron.optim import overlap
from tests import forked

#: Parameters of a bucket, at least: several buckets a layer of a small model and of its adapters.
BUCKET = 300
#: Gathers that were started in this process.
started = 0


class _Late:
    """The handle of one bucket group's gather, which runs beside, into other memory."""

    def __init__(self, group: Any) -> None:
        self._parts: list[tuple[torch.Tensor, torch.Tensor, dist.Work]] = []
        ranks, rank = group.intra_distributed_optimizer_instance_size, group.intra_distributed_optimizer_instance_rank
        for bucket in group.buckets:
            whole, own = torch.empty_like(bucket.param_data), bucket.param_data.view(ranks, -1)[rank].clone()
            collective = group.intra_distributed_optimizer_instance_group
            work = dist.all_gather_into_tensor(whole, own, group=collective, async_op=True)
            bucket.param_data.fill_(torch.nan)
            bucket.param_data.view(ranks, -1)[rank] = own
            self._parts.append((bucket.param_data, whole, work))

    def wait(self) -> None:
        for weights, whole, work in self._parts:
            work.wait()
            weights.copy_(whole)


def _start_param_sync(group: Any, force_sync: bool = False) -> None:
    global started
    assert group.ddp_config.overlap_param_gather
    assert not force_sync
    assert group.param_gather_handle is None
    group.param_gather_handle, group.param_gather_dispatched = _Late(group), True
    started += 1


def install() -> None:
    """Small buckets and late gathers for every model that this process trains."""
    overlap.BUCKET_SIZE = BUCKET
    plain = _ParamAndGradBucketGroup.start_param_sync

    def start(group: Any, force_sync: bool = False) -> None:
        (_start_param_sync if group.ddp_config.overlap_param_gather else plain)(group, force_sync)

    _ParamAndGradBucketGroup.start_param_sync = start


def verb(words: Sequence[str]) -> int:
    """``python -m tawin_nemo words`` with late gathers; fails where none was started."""
    install()
    status = forked.verb(words)
    assert started > 0 or os.environ.get("RANK", "0") != "0"  # a rank that only searches trains nothing
    return status
