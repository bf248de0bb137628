"""Weight updates from a training job through a process group, with SGLang's names for routes and fields.

Rank 0 of the server receives whole tensors under their Hugging Face names in the request's thread, while the engine
continues. Only after all of them have arrived are they built into a model and activated; until then any failure leaves
the current weights active.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from tawin_nemo.api.control_schema import DestroyGroup, InitGroup, UpdateFromDistributed
from tawin_nemo.models.megatron.parallel.weight_group import TransferError, WeightGroup
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.engine.replica import FromTensors
from tawin_nemo.serve.engine.weight_sources import FromMemory
from tawin_nemo.serve.http.errors import ApiError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)
_SHOWN = 5


class WeightUpdates:
    """Holds at most one process group. A new group replaces the last one, whose sender may have died."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._busy = threading.Lock()
        self._group: WeightGroup | None = None

    @property
    def group_name(self) -> str | None:
        """The name of the current process group; None without one."""
        return None if self._group is None else self._group.name

    def init(self, body: InitGroup) -> str:
        """Join a process group; returns a description of it.

        Raises ApiError when the other ranks cannot be reached, or while another call uses the group.
        """
        self._parts()
        if body.rank_offset >= body.world_size:
            text = f"rank_offset={body.rank_offset} must be below world_size={body.world_size}"
            raise ApiError(400, text, param="rank_offset")
        if body.backend == "nccl" and not torch.cuda.is_available():
            raise ApiError(400, "backend=nccl needs a GPU and this server has none; use gloo", param="backend")
        with self._exclusive():
            if self._group is not None:
                log.info("weight group %s replaces %s", body.group_name, self._group.name)
            self._drop()
            try:
                self._group = WeightGroup.join(
                    body.master_address, body.master_port, body.group_name, body.rank_offset, body.world_size,
                    backend=body.backend, limit=timedelta(seconds=body.timeout_s),
                )  # fmt: skip
            except TransferError as error:
                raise ApiError(400, str(error), param="master_address", code="group_not_met") from error
        return f"rank {body.rank_offset} of {body.world_size} in {body.group_name}, over {body.backend}"

    def update(self, body: UpdateFromDistributed) -> int:
        """Receive weights and activate them; returns their version.

        Raises ApiError for tensors that do not match the model or are not finite (400), or do not arrive completely
        (503).
        """
        parts = self._parts()
        with self._exclusive():
            group = self._named(body.group_name)
            version = self._engine.history.next_weights(body.weight_version)
            check_tensors(body, parts)
            sizes = {name: parts.sizes[name] for name in body.names}
            try:
                tensors = group.receive(sizes, parts.dtype)
            except TransferError as error:
                self._drop()
                log.error(
                    "weights of version %d did not arrive whole: %s; version %d stays in use", version, error,
                    self._engine.weights,
                )  # fmt: skip
                text = f"the weights did not arrive whole ({error}); make a new group"
                raise ApiError(503, text, reason="fault", code="transfer_failed", retry_after=1) from error
            wrong = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
            if wrong:
                text = f"{_few(wrong)}: not all values are finite; version {self._engine.weights} stays in use"
                raise ApiError(400, text, param="names", code="not_finite")
            return self._engine.update_weights(FromMemory(tensors), version)

    def destroy(self, body: DestroyGroup) -> str:
        """Leave the process group; returns a message. Raises ApiError for an unknown group."""
        with self._exclusive():
            self._named(body.group_name)
            self._drop()
        return f"{body.group_name} was destroyed"

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the lock of the group. Raises ApiError (409) while another call holds it: a group has one sender."""
        if not self._busy.acquire(blocking=False):
            raise ApiError(409, "the weight group is in use by another call", code="group_busy")
        try:
            yield
        finally:
            self._busy.release()

    def _parts(self) -> FromTensors:
        parts = self._engine.leader.replica.from_tensors
        if parts is None:
            raise ApiError(400, "this server loads weights from disk only; use /update_weights_from_disk")
        return parts

    def _named(self, name: str) -> WeightGroup:
        if self._group is None or self._group.name != name:
            text = f"there is no weight group {name!r} here" + (f", but {self.group_name!r}" if self._group else "")
            raise ApiError(404, f"{text}; POST /init_weights_update_group first", param="group_name", code="no_group")
        return self._group

    def _drop(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


def check_tensors(body: UpdateFromDistributed, parts: FromTensors) -> None:
    """Raise ApiError unless the announced names, shapes and dtypes are exactly those of the model's tensors."""
    if not len(body.names) == len(body.dtypes) == len(body.shapes):
        text = f"{len(body.names)} names, {len(body.dtypes)} dtypes, {len(body.shapes)} shapes: one of each per tensor"
        raise ApiError(400, text, param="names")
    expected, announced = parts.sizes, dict(zip(body.names, map(tuple, body.shapes), strict=True))
    missing, unknown = sorted(expected.keys() - announced.keys()), sorted(announced.keys() - expected.keys())
    if missing or unknown or len(announced) < len(body.names):
        text = f"{len(missing)} tensors are missing ({_few(missing)}), {len(unknown)} are unknown ({_few(unknown)})"
        raise ApiError(400, f"these are not the weights of this model: {text}", param="names", code="other_model")
    wrong = [name for name in expected if announced[name] != expected[name]]
    if wrong:
        first = wrong[0]
        text = f"{first} has shape {list(announced[first])}, this model's has {list(expected[first])}"
        raise ApiError(400, f"{text} ({len(wrong)} such)", param="shapes", code="other_model")
    dtype = str(parts.dtype).removeprefix("torch.")
    other = {name.removeprefix("torch.") for name in body.dtypes} - {dtype}
    if other:
        text = f"weights in {', '.join(sorted(other))} for a model in {dtype}: set model.precision alike on both sides"
        raise ApiError(400, text, param="dtypes", code="other_precision")


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "") or "none"
