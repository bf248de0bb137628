"""Disaggregated placement (``rollout.placement: separate``): ranks that train, then ranks that only search.

megatron-core 0.16 takes torch's default process group to be the ranks of training, and has no argument that says
otherwise: ``parallel_state`` lays its groups over all of it (``RankGenerator`` knows a rank offset, which
``initialize_model_parallel`` does not pass on), the optimizer aligns its parameter groups over it, distributed
checkpoints plan over it. Process-group collections, or a ``HyperCommGrid`` with an offset, reach the model, DDP and the
schedules, but neither of these two. Its resharding, on the other hand, wants source and target in the default group. So
the default group of a training rank holds the training ranks, for which all that megatron assumes is true, and is the
whole job's only while weights are resharded (``whole_job``). Training ranks come first, so that their rank is the same
in both groups. Rollout ranks stay in the whole job's group and have no ``parallel_state``: their model has groups of
its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from tawin_nemo.models.megatron.parallel import groups
from tawin_nemo.models.megatron.parallel.channel import Channel, GroupLink, broadcast_bytes, decode, encode

R = TypeVar("R")

#: Rollout ranks wait for the next message as long as training sends none, for example all through SFT.
_IDLE = timedelta(days=365)


@dataclass(frozen=True)
class RolloutRanks:
    """The rollout ranks of a job: the last ``ranks`` processes, as TP ``tp`` x PP ``pp`` x as many replicas as fit."""

    ranks: int
    tp: int
    pp: int


class RolloutChannel(Channel):
    """Messages from the first training rank to all rollout ranks over gloo, and the responses of the first of them.

    All ranks of a placement (all training ranks, all rollout ranks) make the same calls. A message that is broadcast
    with ``responds=True`` must be followed by ``respond`` on the rollout ranks and by ``response`` on the training
    ranks before the next message.
    """

    def __init__(self, first_rollout_rank: int, size: int) -> None:
        ends = [0, *range(first_rollout_rank, size)]
        super().__init__(GroupLink(dist.new_group(ends, backend="gloo", timeout=_IDLE)))
        self._responses = dist.new_group(ends[:2], backend="gloo", timeout=groups.time_limit())
        self._leads, self._responds = dist.get_rank() == 0, dist.get_rank() == first_rollout_rank
        #: A message was broadcast whose response has not been received.
        self.awaits_response = False
        #: On a training rank: the engine whose model the rollout ranks hold at present.
        self.model_owner: Any = None

    def broadcast(self, message: Any, *, responds: bool = False) -> None:
        """Called by the training ranks; the first one sends. Raises RuntimeError while a response is awaited."""
        if self.awaits_response:
            raise RuntimeError(f"{type(message).__name__} was broadcast before the last response was received")
        self.awaits_response = responds
        if self._leads:
            super().broadcast(message)

    def respond(self, value: Any) -> None:
        """Called by the rollout ranks; the first one's ``value``, a frozen dataclass, is sent."""
        if self._responds:
            broadcast_bytes(encode(value), group=self._responses, source=1)

    def response(self, kind: type[R]) -> R:
        """Called by the training ranks, which all get the response; it must be an instance of ``kind``."""
        data = broadcast_bytes(None, group=self._responses, source=1) if self._leads else None
        self.awaits_response = False
        if dist.get_world_size() > 1:
            data = broadcast_bytes(data, device=groups.collective_device())
        assert data is not None
        value = decode(data, (kind,))
        assert isinstance(value, kind)
        return value


@dataclass(frozen=True)
class _Placement:
    job: dist.ProcessGroup
    job_size: int
    is_rollout_rank: bool
    channel: RolloutChannel


_placement: _Placement | None = None


def split_job(rollout_ranks: RolloutRanks) -> None:
    """Divide the processes of the default group into training ranks and rollout ranks; every process calls it once.

    All groups that span both are made here: afterwards each part makes groups of its own, and torch, which numbers
    groups by the calls of a process, would give different groups the same name.
    """
    global _placement
    job, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    assert job is not None
    first = size - rollout_ranks.ranks
    groups.copy_service()
    groups.set_rollout_ranks(range(first, size))
    groups.rollout_groups(rollout_ranks.tp, rollout_ranks.pp)
    groups.rollout_gather_group(rollout_ranks.tp, rollout_ranks.pp)
    channel = RolloutChannel(first, size)
    training = dist.new_group(list(range(first)), timeout=groups.time_limit())
    _placement = _Placement(job, size, rank >= first, channel)
    if rank < first:
        dist.group.WORLD = training
    else:  # megatron's layers ask for its random streams when they are built; nothing is drawn from them
        from megatron.core import tensor_parallel

        tensor_parallel.model_parallel_cuda_manual_seed(0, tp_rank=0, ep_rank=0, etp_rank=0)


def is_disaggregated() -> bool:
    """Whether this job has rollout ranks of its own."""
    return _placement is not None


def is_rollout_rank() -> bool:
    """Whether this process only searches, for the training ranks of its job."""
    return _placement is not None and _placement.is_rollout_rank


def rollout_channel() -> RolloutChannel:
    """The channel between the training ranks and the rollout ranks of a disaggregated job."""
    assert _placement is not None
    return _placement.channel


def job_size() -> int:
    """Number of processes of the job, training ranks and rollout ranks together; 1 before there is a process group."""
    if _placement is not None:
        return _placement.job_size
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def whole_job() -> Iterator[None]:
    """While inside, the default group holds all processes of the job: for resharding between both kinds of ranks."""
    if _placement is None or _placement.is_rollout_rank:
        yield
        return
    training = dist.group.WORLD
    dist.group.WORLD = _placement.job
    try:
        yield
    finally:
        dist.group.WORLD = training


def reset() -> None:
    """Make the whole job's group the default group again; called before the groups are destroyed."""
    global _placement
    if _placement is not None:
        dist.group.WORLD = _placement.job
        _placement = None
