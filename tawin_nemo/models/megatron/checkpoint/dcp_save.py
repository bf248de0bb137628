"""Saving through torch's distributed checkpoint in this process.

megatron-core's own torch_dist strategy writes in forked processes and collects their results through a spawned
manager process. That costs seconds, forks a process that runs threads, and re-imports the main module. Here the same
files are written by this process, at once or, from a snapshot in CPU memory, by a thread; megatron-core's load
strategy reads them.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystem


class ShardSave(SaveShardedStrategy):
    """Twin of megatron-core's ``TorchDistSaveShardedStrategy`` in two parts, ``save`` and ``write``.

    One file per rank, fsynced, of about the same size: what data-parallel ranks have in common is dealt out to them.
    With ``snapshot``, ``save`` copies every tensor to CPU memory.
    """

    def __init__(self, *, snapshot: bool = False) -> None:
        super().__init__("torch_dist", 1)
        self._snapshot = snapshot
        self._taken: dict[str, Any] = {}
        self._directory = Path()

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Collect the shards that this rank writes; with ``snapshot``, copy them to CPU memory. Collective."""
        share_replicas(sharded_state_dict)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        if self._snapshot:
            by_key = {key: [_copied(part) for part in parts] for key, parts in by_key.items()}
        self._taken = mcore_to_pyt_state_dict(by_key, is_loading=False)
        self._directory = Path(checkpoint_dir)

    def write(self, group: Any = None) -> None:
        """Write what ``save`` collected; collective over ``group`` (None: the default one), exclusively used by it."""
        writer = dcp.FileSystemWriter(self._directory, single_file_per_rank=True, sync_files=True)
        writer.fs = _Files()
        planner = MCoreSavePlanner(flatten_state_dict=False)
        dcp.save(self._taken, storage_writer=writer, planner=planner, process_group=group)
        self._taken = {}


def share_replicas(sharded_state_dict: ShardedStateDict) -> None:
    """Deal the tensors that every data-parallel rank has out to them, by size; collective. Changes the replica ids."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    writers = determine_main_replica_uniform_distribution(sharded_state_dict, group)
    distribute_main_replicas_with_precomputed_distribution(sharded_state_dict, group, writers)


def _copied(part: ShardedBase) -> ShardedBase:
    """The same shard with its data copied to the CPU, where no later step changes it."""
    if isinstance(part, ShardedTensor) and part.data is not None:
        return replace(part, data=part.data.detach().to("cpu", copy=True))
    return part


class _Files(FileSystem):
    """torch's file system; a failed write raises its own OSError."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            watched = _Stream(stream)
            try:
                yield watched
            except RuntimeError as error:  # torch.save's own, about a position, hides why a write failed
                raise watched.error or error from error


class _Stream:
    """A file open for writing that keeps the error of a failed write in ``error``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        try:
            return int(self._stream.write(data))
        except OSError as error:
            self.error = error
            raise
