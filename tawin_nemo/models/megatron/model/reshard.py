"""Weights from a model of one layout into a model of another one, in memory, with megatron-core's resharding.

megatron plans who sends which slice to whom, and sends it (gloo on CPU, NCCL on GPU): a rank only ever receives parts
of its own shards. Two things it does not know are added here: parameters go by their names in the whole model, so that
a tied head on a last pipeline stage is the embedding that it is; and they travel some at a time, so that buffers stay
small beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.resharding import ReshardPlan, build_centralized_reshard_plan, execute_reshard_plan
from torch import Tensor

from tawin_nemo.models.megatron.model.build import full_shape, global_name, own_shard, sharded_axis
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.models.megatron.parallel.disaggregated import whole_job
from tawin_nemo.models.megatron.parallel.groups import copy_service
from tawin_nemo.util.errors import TawinError

#: Bytes of parameters that arrive on a rank at a time; a single larger parameter travels alone.
_AT_ONCE = 256 * 2**20
#: Unit of the check's sums: rows or columns are told apart by a sum with fixed odd 64-bit factors.
_FACTOR_SEED = 20_260_101


class _Named:
    """What megatron's planner asks of a module, with the parameters' names in the whole model; of None nothing."""

    def __init__(self, model: GPTModel | None) -> None:
        self.pg_collection = ProcessGroupCollection() if model is None else model.pg_collection
        named = () if model is None else model.named_parameters()
        self._parameters = {global_name(model, name): value for name, value in named}

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
        yield from self._parameters.items()

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """None: there are no layer numbers left to translate."""
        yield from ()


class Refit:
    """Carries the weights of ``source`` to ``target``: one shape and precision, two layouts.

    Every process makes one and calls it; vocabularies must be padded alike. Both models may lie on the same processes;
    in a divided job (``sides``) a training rank has no target and a rollout rank no source: None.
    """

    def __init__(self, source: GPTModel | None, target: GPTModel | None) -> None:
        self._source, self._target = source, target
        self._sides = _Named(source), _Named(target)
        self._service = copy_service()
        with whole_job():
            whole = build_centralized_reshard_plan(*self._sides)
            self._plans = [_only(whole, names) for names in _portions(self._sides[1])]

    @torch.no_grad()
    def __call__(self) -> None:
        """Bring the target's weights up to date."""
        with whole_job():
            for plan in self._plans:
                execute_reshard_plan(plan, *self._sides, self._service)

    def check_equal(self) -> None:
        """Raises TawinError, on every rank, naming the tensors in which a row or column of the target differs.

        Every rank sums up the rows (or columns) of its shards on both sides, in 64-bit integers over the bits of the
        numbers, with fixed odd factors; only the sums travel. Equal sums of unequal rows are possible, at odds of
        about 2^-62.
        """
        with whole_job():
            sums = runtime.gather_objects((_sums(self._source), _sums(self._target)))
        expected = {name: value for source, _ in sums for name, value in source.items()}
        wrong = {
            name
            for _, target in sums
            for (name, place), value in target.items()
            if expected.get((name, place)) != value
        }
        copies = {key for source, _ in sums for key, value in source.items() if expected[key] != value}
        wrong |= {name for name, _ in copies}
        if wrong:
            raise TawinError(
                f"weights of training and rollout differ in {len(wrong)} tensors: {', '.join(sorted(wrong)[:5])}"
            )


def _portions(target: _Named) -> list[set[str]]:
    """Names of parameters that travel together, the same on every rank."""
    mine = {name: value.numel() * value.element_size() for name, value in target.named_parameters()}
    largest: dict[str, int] = {}
    for sizes in runtime.gather_objects(mine):
        for name, size in sizes.items():
            largest[name] = max(size, largest.get(name, 0))
    portions: list[set[str]] = []
    room = 0
    for name in sorted(largest):
        if not portions or largest[name] > room:
            portions.append(set())
            room = _AT_ONCE
        portions[-1].add(name)
        room -= largest[name]
    return portions


def _only(plan: ReshardPlan, names: set[str]) -> ReshardPlan:
    return ReshardPlan(
        send_ops=[op for op in plan.send_ops if op.param_name in names],
        recv_ops=[op for op in plan.recv_ops if op.param_name in names],
    )


@torch.no_grad()
def _sums(model: GPTModel | None) -> dict[tuple[str, int], int]:
    """Per parameter (by its name in the whole model) and place along its sharded axis: the sum over that place."""
    sums: dict[tuple[str, int], int] = {}
    for name, parameter in () if model is None else model.named_parameters():
        axis = sharded_axis(parameter) or 0
        bits = _bits(parameter.detach().movedim(axis, 0).reshape(parameter.shape[axis], -1))
        generator = torch.Generator().manual_seed(_FACTOR_SEED)
        factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator).mul_(2).add_(1)
        values = (bits * factors).sum(dim=1).tolist()
        places = _places(name, model, parameter, axis)
        sums |= {(global_name(model, name), at): value for at, value in zip(places.tolist(), values, strict=True)}
    return sums


def _places(name: str, model: GPTModel, parameter: Tensor, axis: int) -> Tensor:
    """Where in the whole parameter the rows (axis 0) or columns (axis 1) of this rank's shard are."""
    place = torch.arange(full_shape(model, parameter)[axis])
    line = place.unsqueeze(1 - axis) if parameter.dim() == 2 else place
    return own_shard(line, name, model, parameter).flatten()


def _bits(values: Tensor) -> Tensor:
    """The numbers' bits as integers, on the CPU."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.cpu().contiguous().view(whole).long()
