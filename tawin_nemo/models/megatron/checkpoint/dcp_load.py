"""Loading of distributed checkpoints that never unpickles freely.

megatron-core's torch_dist strategy reads ``.metadata`` with ``pickle.load`` and object shards with
``torch.load(weights_only=False)``: either runs whatever code the folder's writer put there. Here the same files are
read by restricted readers, files outside of the checkpoint are not opened, and every file is opened through
``open_trusted``.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan

from tawin_nemo.models.megatron.checkpoint.metadata import check_engine_state, read_metadata
from tawin_nemo.util.trusted import open_trusted, read_text, refuse_pickles

COMMON, BACKEND, METADATA = "common.pt", "metadata.json", ".metadata"
_BACKEND = {"sharded_backend": "torch_dist", "common_backend": "torch"}


def check_kinds(folder: Path, names: Collection[str]) -> None:
    """Refuse the checkpoint ``folder``, whose record lists ``names``, before any of its files is loaded.

    Raises ValueError when the record lacks a file that loading needs or ``metadata.json`` names another format, and
    UserError when the folder holds a pickle besides ``common.pt``, which torch reads as plain tensors and numbers.
    """
    refuse_pickles(folder, known=(COMMON,))
    missing = [name for name in (COMMON, BACKEND, METADATA) if name not in names]
    if missing:
        raise ValueError(f"its record does not list {missing[0]}")
    backend = json.loads(read_text(folder / BACKEND))
    if not isinstance(backend, dict) or any(backend.get(key) != value for key, value in _BACKEND.items()):
        raise ValueError(f"{BACKEND} names another format than torch_dist")


class CommonLoad(TorchCommonLoadStrategy):
    """megatron-core's loading of ``common.pt``, as tensors and plain values only."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """The content of ``common.pt``. Raises UnpicklingError when it names anything else."""
        with open_trusted(Path(checkpoint_dir) / COMMON) as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"{COMMON} holds no dictionary")
        return content


class ShardLoad(TorchDistLoadShardedStrategy):
    """Twin of megatron-core's ``TorchDistLoadShardedStrategy`` for a checkpoint of the files ``names``."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names
        self._read: Metadata | None = None

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> dict[str, Any]:
        """Read the shards that this rank needs; collective."""
        wanted = [part for part in nested_values(sharded_state_dict) if isinstance(part, ShardedTensor)]
        by_key, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        tensors = mcore_to_pyt_state_dict(by_key, True)
        planner = _Planner(
            shapes_validation_sharded_tensors=[part for part in wanted if not part.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={part.key: part for part in wanted if part.allow_shape_mismatch},
        )
        dcp.load_state_dict(tensors, _Reader(Path(checkpoint_dir), self._metadata(checkpoint_dir)), planner=planner)
        values = {key: _unwrap_pyt_sharded_tensor(value) for key, value in tensors.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(values, flat, renamed)
        _restore_dict_types(loaded, sharded_state_dict)
        return dict(loaded)

    def load_tensors_metadata(self, checkpoint_dir: Path, metadata: Metadata | None = None) -> dict[str, Any]:
        """Names and shapes of the tensors in the checkpoint."""
        return dict(super().load_tensors_metadata(checkpoint_dir, metadata or self._metadata(checkpoint_dir)))

    def load_sharded_metadata(self, checkpoint_dir: Path) -> dict[str, Any]:
        """Names of the tensors and the objects in the checkpoint."""
        metadata = self._metadata(checkpoint_dir)
        kinds = metadata.state_dict_metadata.items()
        names = [key for key, kind in kinds if isinstance(kind, BytesStorageMetadata)]
        parts = [ShardedObject.empty_from_unique_key(name) for name in names]
        return {part.unique_key: part for part in parts} | self.load_tensors_metadata(checkpoint_dir, metadata)

    def _metadata(self, checkpoint_dir: str | Path) -> Metadata:
        if self._read is None:
            with open_trusted(Path(checkpoint_dir) / METADATA) as file:
                try:
                    self._read = read_metadata(file, self._names)
                except ValueError as error:
                    raise ValueError(f"{METADATA} is not that of a distributed checkpoint: {error}") from error
        return self._read


class _Planner(MCoreLoadPlanner):
    """megatron-core's planner; objects are read as tensors and plain values only, and no element stays unread."""

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads. Raises ValueError when the checkpoint lacks a part of a tensor."""
        plan = super().create_local_plan()
        read: Counter[tuple[str, tuple[int, ...]]] = Counter()
        for item in plan.items:
            if item.type == LoadItemType.TENSOR:
                read[item.dest_index.fqn, tuple(item.dest_index.offset or ())] += math.prod(item.lengths)
        for part in self.shapes_validation_sharded_tensors:
            lacking = math.prod(part.local_shape) - read[part.key, tuple(part.global_offset)]
            if lacking:
                raise ValueError(f"{METADATA} does not list {lacking} of the elements of {part.key} that are read here")
        return plan

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        content = torch.load(value, map_location="cpu", weights_only=True)
        name = read_item.dest_index.fqn
        if "_extra_state" in name:
            _check_extra_state(content)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], content)
        else:
            self.state_dict[name] = content


def _check_extra_state(content: Any) -> None:
    """Raise ValueError for the state of a module that the module itself would unpickle freely."""
    if isinstance(content, Tensor) and content.dtype == torch.uint8 and content.numel():
        check_engine_state(content.numpy().tobytes())
    elif isinstance(content, io.BytesIO) and content.getbuffer().nbytes:
        torch.load(io.BytesIO(content.getvalue()), map_location="cpu", weights_only=True)


class _Reader(FileSystemReader):
    """torch's reader over metadata that have been checked."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.fs = _Files()
        self._checked = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._checked.storage_meta = StorageMeta(load_id=self.load_id)
        return self._checked


class _Files(FileSystem):
    """torch's file system; files are opened for reading only, through ``open_trusted``."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "rb":
            raise ValueError(f"{path} is opened for reading, not with mode {mode}")
        with open_trusted(Path(path)) as file:
            yield file
