"""The process groups that a model computes in: training's, or those of a rollout layout over the same processes.

megatron's ``parallel_state`` holds one layout, that of training. A model of another layout gets its own groups when it
is built; whatever runs it (forward pass, head, decoding) asks the model's ``pg_collection`` and not the global state.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tawin_nemo.types import DataParallel

if TYPE_CHECKING:  # megatron takes four seconds to import; whoever only asks for ranks (a dry run) does not pay them
    from megatron.core.parallel_state import RankGenerator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.resharding.copy_services.base import CopyService

#: A rank that waits longer than this for another one fails instead of hanging for ever.
TIMEOUT = timedelta(minutes=30)
_limit = TIMEOUT
#: The ranks over which rollout groups are made; None: all processes.
_rollout_range: range | None = None


def time_limit() -> timedelta:
    """The time limit of collectives in groups that are made from now on (``trainer.collective_timeout``)."""
    return _limit


def set_time_limit(limit: timedelta) -> None:
    """Set the limit of ``time_limit``; every process sets the same one before it makes groups."""
    global _limit
    _limit = limit


def collective_device() -> torch.device:
    """The device of tensors for collectives of the default group: this rank's GPU with NCCL, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def training_groups() -> ProcessGroupCollection:
    """The groups of the layout that ``runtime.initialize`` laid out."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def set_rollout_ranks(ranks: range) -> None:
    """Make rollout groups over these ranks only (``disaggregated.split_job``).

    Every process still calls the functions that make groups, as torch requires.
    """
    global _rollout_range
    _rollout_range = ranks


@cache
def rollout_groups(tp: int, pp: int) -> ProcessGroupCollection:
    """Groups of TP ``tp`` x PP ``pp`` x as many replicas as fit, over all processes, which call this alike.

    Ranks are numbered as in training (tensor-parallel neighbours next to each other, pipeline stages farthest apart).
    Only decoding runs in them: there is no group that ties the gradients of embedding and head. A process that does
    not search gets a collection without groups.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    ranks = _rollout_ranks(tp, pp)
    made = {name: _own(ranks.get_ranks(name)) for name in ("tp", "pp", "dp", "cp")}
    return ProcessGroupCollection(**made, embd=None, pos_embd=None)


def _rollout_ranks(tp: int, pp: int) -> RankGenerator:
    from megatron.core.parallel_state import RankGenerator

    ranks = _rollout_range or range(dist.get_world_size())
    return RankGenerator(
        tp=tp, pp=pp, dp=len(ranks) // (tp * pp), cp=1, ep=1, order="tp-cp-ep-dp-pp", rank_offset=ranks.start
    )


def _own(ranks: list[list[int]], backend: str | None = None) -> dist.ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=time_limit(), backend=backend)
    return group


@cache
def rollout_gather_group(tp: int, pp: int) -> dist.ProcessGroup:
    """The replicas of a rollout layout over gloo."""
    return _own(_rollout_ranks(tp, pp).get_ranks("dp"), "gloo")


def rollout_replicas(tp: int, pp: int) -> DataParallel:
    """This process's rank among the replicas of a rollout layout; ``gather`` sends Python objects over gloo."""
    return replicas(rollout_gather_group(tp, pp))


def replicas(group: dist.ProcessGroup) -> DataParallel:
    """This rank among the replicas of a gloo group."""

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * group.size()
        dist.all_gather_object(values, value, group=group)
        return values

    return DataParallel(group.rank(), group.size(), gather)


@cache
def copy_service() -> CopyService:
    """megatron's copy service for resharding, one for all models: over NCCL, or over gloo in a group of its own."""
    from megatron.core import parallel_state
    from megatron.core.resharding.copy_services.gloo_copy_service import GlooCopyService
    from megatron.core.resharding.copy_services.nccl_copy_service import NCCLCopyService

    if torch.cuda.is_available():
        return _ordered(NCCLCopyService)()
    service = GlooCopyService()
    parallel_state.update_pg_timeout(time_limit(), service.gloo_pg)  # megatron makes it with torch's own limit
    return service


def _ordered(service: type[CopyService]) -> type[CopyService]:
    """``service`` with copies within a rank that wait for the work already queued on the current stream.

    megatron-core 0.16's NCCLCopyService runs them on a stream of its own without waiting: it may read a slice before
    the kernel that makes it contiguous has run, and leave stale weights in the target.
    """

    class OrderedCopyService(service):  # megatron is imported at the first use
        def run(self) -> None:
            self._copy_stream.wait_stream(torch.cuda.current_stream())
            super().run()

    return OrderedCopyService


def reset() -> None:
    """Drop all cached groups; called before the process groups are destroyed or training gets another layout."""
    global _rollout_range
    _rollout_range = None
    copy_service.cache_clear()
    rollout_groups.cache_clear()
    rollout_gather_group.cache_clear()
