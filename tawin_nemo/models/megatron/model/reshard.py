"""Resharding: copy the weights of a model into a model of another layout, in memory, with megatron-core's planner.

megatron plans which rank sends which slice to which rank, and sends it (gloo on CPU, NCCL on GPU); a rank only receives
parts of its own shards. Two things are added here. Parameters are matched by their names in the whole model, so that a
tied head on the last pipeline stage is matched with the embedding. And they are sent in portions, so that buffers stay
small beside the weights; where the target has another number format, a portion is converted before it is sent. A model
of the same layout and format can share the weights instead (``SharedWeights``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.resharding import ReshardPlan, build_centralized_reshard_plan, execute_reshard_plan
from torch import Tensor

from tawin_nemo.models.megatron.model.build import full_shape, global_name, own_shard, sharded_axis
from tawin_nemo.models.megatron.model.in_flight import wait_for_weights
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.models.megatron.parallel.disaggregated import whole_job
from tawin_nemo.models.megatron.parallel.groups import copy_service
from tawin_nemo.util.errors import TawinError

#: Bytes of parameters that a rank receives in one portion; a single larger parameter is a portion of its own.
_AT_ONCE = 256 * 2**20
#: Seed of the fixed odd 64-bit factors of the checksums.
_FACTOR_SEED = 20_260_101


class _Named:
    """The module interface that megatron's planner needs, with parameter names of the whole model; empty for None."""

    def __init__(self, model: GPTModel | None) -> None:
        self.pg_collection = ProcessGroupCollection() if model is None else model.pg_collection
        named = () if model is None else model.named_parameters()
        self._parameters = {global_name(model, name): value for name, value in named}

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
        yield from self._parameters.items()

    def converted(self, names: set[str], dtype: torch.dtype | None) -> _Named:
        """The parameters of these names alone, in ``dtype`` (None: as they are)."""
        part = _Named(None)
        part.pg_collection = self.pg_collection
        part._parameters = {name: self._parameters[name].detach() for name in names & self._parameters.keys()}
        if dtype is not None:
            part._parameters = {name: value.to(dtype) for name, value in part._parameters.items()}
        return part

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """No modules: the names contain the layer numbers of the whole model already."""
        yield from ()


class Refit:
    """Copies the weights of ``source`` to ``target``: models of the same shape in two layouts or precisions.

    Collective over all processes, at construction and at every call. Vocabularies must be padded to the same size. Both
    models may lie on the same processes; with disaggregated placement the target of a training rank and the source of a
    rollout rank are None. ``dtype``: number format of the target's parameters (None: the source's).
    """

    def __init__(
        self, source: GPTModel | None, target: GPTModel | None, *, dtype: torch.dtype | None = None
    ) -> None:  # fmt: skip
        self._source, self._target, self._dtype = source, target, dtype
        self._models = _Named(source), _Named(target)
        self._service = copy_service()
        with whole_job():
            whole = build_centralized_reshard_plan(*self._models)
            self._plans = [(names, _only(whole, names)) for names in _portions(self._models[1])]

    @torch.no_grad()
    def __call__(self) -> None:
        """Bring the target's weights up to date."""
        wait_for_weights(self._source)
        with whole_job():
            source, target = self._models
            for names, plan in self._plans:
                execute_reshard_plan(plan, source.converted(names, self._dtype), target, self._service)

    def check_equal(self) -> None:
        """Raises TawinError, on every rank, naming the tensors in which a row or column of the target differs.

        Every rank computes a checksum of every row (or column) of its shards of both models: a sum of 64-bit integers
        over the bits of the numbers, with fixed odd factors. Only the checksums are gathered. Unequal rows have equal
        checksums with a probability of about 2^-62.
        """
        wait_for_weights(self._source)
        with whole_job():
            sums = runtime.gather_objects((_sums(self._source, self._dtype), _sums(self._target)))
        expected = {name: value for source, _ in sums for name, value in source.items()}
        wrong = {
            name
            for _, target in sums
            for (name, index), value in target.items()
            if expected.get((name, index)) != value
        }
        copies = {key for source, _ in sums for key, value in source.items() if expected[key] != value}
        wrong |= {name for name, _ in copies}
        if wrong:
            raise TawinError(
                f"weights of training and rollout differ in {len(wrong)} tensors: {', '.join(sorted(wrong)[:5])}"
            )


class SharedWeights:
    """Lets ``target`` use the weights of ``source`` in place: two models in one layout and number format of parameters.

    A call makes it so, as often as the source's weights may have been given another place in memory (an optimizer
    lays them out anew when it is built). What an update writes is then the target's at once.
    """

    def __init__(self, source: GPTModel, target: GPTModel) -> None:
        """Raises TawinError when the models differ in the names, shapes or number format of their parameters."""
        self._source, self._target = source, target
        forms = [{name: (p.shape, p.dtype) for name, p in model.named_parameters()} for model in (source, target)]
        if forms[0] != forms[1]:
            raise TawinError("weights can be shared by models of one layout and number format only")

    def __call__(self) -> None:
        """Give every parameter of the target the source's memory."""
        weights = dict(self._source.named_parameters())
        for name, parameter in self._target.named_parameters():
            parameter.data = weights[name].data

    def check_equal(self) -> None:
        """Raises TawinError, naming the tensors, where the target does not use the source's memory."""
        weights = dict(self._source.named_parameters())
        own = [name for name, p in self._target.named_parameters() if p.data_ptr() != weights[name].data_ptr()]
        if own:
            raise TawinError(f"{len(own)} tensors of rollouts are not those of training: {', '.join(own[:5])}")


def _portions(target: _Named) -> list[set[str]]:
    """Names of the parameters of each portion, the same on every rank."""
    mine = {name: value.numel() * value.element_size() for name, value in target.named_parameters()}
    largest: dict[str, int] = {}
    for sizes in runtime.gather_objects(mine):
        for name, size in sizes.items():
            largest[name] = max(size, largest.get(name, 0))
    portions: list[set[str]] = []
    remaining = 0
    for name in sorted(largest):
        if not portions or largest[name] > remaining:
            portions.append(set())
            remaining = _AT_ONCE
        portions[-1].add(name)
        remaining -= largest[name]
    return portions


def _only(plan: ReshardPlan, names: set[str]) -> ReshardPlan:
    return ReshardPlan(
        send_ops=[op for op in plan.send_ops if op.param_name in names],
        recv_ops=[op for op in plan.recv_ops if op.param_name in names],
    )


@torch.no_grad()
def _sums(model: GPTModel | None, dtype: torch.dtype | None = None) -> dict[tuple[str, int], int]:
    """(name in the whole model, index along the sharded axis) -> checksum of that row or column, in ``dtype``."""
    sums: dict[tuple[str, int], int] = {}
    for name, parameter in () if model is None else model.named_parameters():
        axis = sharded_axis(parameter) or 0
        values = parameter.detach().to(dtype or parameter.dtype)
        bits = _bits(values.movedim(axis, 0).reshape(parameter.shape[axis], -1))
        generator = torch.Generator().manual_seed(_FACTOR_SEED)
        factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator).mul_(2).add_(1)
        checksums = (bits * factors).sum(dim=1).tolist()
        indices = _global_indices(name, model, parameter, axis).tolist()
        sums |= {(global_name(model, name), index): value for index, value in zip(indices, checksums, strict=True)}
    return sums


def _global_indices(name: str, model: GPTModel, parameter: Tensor, axis: int) -> Tensor:
    """The indices in the whole parameter of the rows (axis 0) or columns (axis 1) of this rank's shard."""
    index = torch.arange(full_shape(model, parameter)[axis])
    indices = index.unsqueeze(1 - axis) if parameter.dim() == 2 else index
    return own_shard(indices, name, model, parameter).flatten()


def _bits(values: Tensor) -> Tensor:
    """The numbers' bits as integers, on the CPU."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.cpu().contiguous().view(whole).long()
