"""A job of two sides: ranks that train, and behind them ranks that only search (``rollout.placement: separate``).

megatron-core 0.16 takes torch's default process group to be the ranks of training, and has no argument that says
otherwise: ``parallel_state`` lays its groups over all of it (``RankGenerator`` knows a rank offset, which
``initialize_model_parallel`` does not pass on), the optimizer aligns its parameter groups over it, distributed
checkpoints plan over it. Process-group collections, or a ``HyperCommGrid`` with an offset, reach the model, DDP and the
schedules, but neither of these two. Its resharding, on the other hand, wants source and target in the default group. So
the default group of a training rank is that of training, where all that megatron assumes is true as it stands, and it
is the whole job's only while weights travel (``whole_job``). Training ranks come first, so that their numbers agree in
both. Rollout ranks stay in the whole job's group and have no ``parallel_state``: their model brings its own groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tawin_nemo.models.megatron.parallel import groups

#: Rollout ranks wait for work as long as training has none for them, for example all through SFT.
_IDLE = timedelta(days=365)


@dataclass(frozen=True)
class RolloutRanks:
    """The rollout ranks of a job: the last ``ranks`` ones, divided into TP ``tp`` x PP ``pp`` x replicas."""

    ranks: int
    tp: int
    pp: int


class Line:
    """Messages between the first training rank and all rollout ranks, over gloo.

    Work goes one way (``ask``, ``receive``), answers the other (``answer``, ``result``). All ranks of a side call
    alike; every training rank gets the answer. A question that is answered must be followed by its ``result``.
    """

    def __init__(self, first_rollout_rank: int, size: int) -> None:
        ends = [0, *range(first_rollout_rank, size)]
        self._questions = dist.new_group(ends, backend="gloo", timeout=_IDLE)
        self._answers = dist.new_group(ends[:2], backend="gloo", timeout=groups.time_limit())
        self._asks, self._answering = dist.get_rank() == 0, dist.get_rank() == first_rollout_rank
        self.owed = False  # a question was asked whose answer has not been fetched
        self.holder: Any = None  # on a training rank: whose model the rollout ranks hold

    def ask(self, message: Any, *, answered: bool = False) -> None:
        if self.owed:
            raise RuntimeError(f"{message} was asked before the last answer was fetched")
        self.owed = answered
        if self._asks:
            self._carried(message, self._questions, 0)

    def receive(self) -> Any:
        return self._carried(None, self._questions, 0)

    def answer(self, value: Any) -> None:
        """The value of the first rollout rank counts."""
        if self._answering:
            self._carried(value, self._answers, 1)

    def result(self) -> Any:
        found = self._carried(None, self._answers, 1) if self._asks else None
        self.owed = False
        if dist.get_world_size() == 1:
            return found
        box = [found]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @staticmethod
    def _carried(value: Any, group: dist.ProcessGroup, source: int) -> Any:
        box = [value]
        dist.broadcast_object_list(box, group=group, group_src=source)
        return box[0]


@dataclass(frozen=True)
class _Sides:
    job: dist.ProcessGroup
    size: int
    training_ranks: int
    searches: bool
    line: Line


_sides: _Sides | None = None


def split_job(rollout_ranks: RolloutRanks) -> None:
    """Part the processes, which are all in one default group, into the two sides; every process calls it once.

    All groups over both sides are made here: afterwards each side makes its own, and torch would mix up their names.
    """
    global _sides
    job, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    assert job is not None
    first = size - rollout_ranks.ranks
    groups.copy_service()
    groups.search_on(range(first, size))
    groups.rollout_groups(rollout_ranks.tp, rollout_ranks.pp)
    groups.rollout_gather_group(rollout_ranks.tp, rollout_ranks.pp)
    line = Line(first, size)
    training = dist.new_group(list(range(first)), timeout=groups.time_limit())
    _sides = _Sides(job, size, first, rank >= first, line)
    if rank < first:
        dist.group.WORLD = training
    else:  # megatron's layers ask for its random streams when they are built; nothing is drawn from them
        from megatron.core import tensor_parallel

        tensor_parallel.model_parallel_cuda_manual_seed(0, tp_rank=0, ep_rank=0, etp_rank=0)


def is_disaggregated() -> bool:
    return _sides is not None


def is_rollout_rank() -> bool:
    """Whether this process is a rollout rank of a divided job."""
    return _sides is not None and _sides.searches


def line() -> Line:
    """Of a divided job."""
    assert _sides is not None
    return _sides.line


def job_size() -> int:
    """Processes of both sides; without sides, of the default group; 1 before there is one."""
    if _sides is not None:
        return _sides.size
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def whole_job() -> Iterator[None]:
    """While inside, the default group holds all processes of the job: for resharding, which both sides take part in."""
    if _sides is None or _sides.searches:
        yield
        return
    training = dist.group.WORLD
    dist.group.WORLD = _sides.job
    try:
        yield
    finally:
        dist.group.WORLD = training


def forget() -> None:
    """The whole job's group is the default one again, and there are no sides; before the processes part."""
    global _sides
    if _sides is not None:
        dist.group.WORLD = _sides.job
        _sides = None
