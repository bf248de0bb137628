"""Saving through torch's distributed checkpoint in this process.

megatron-core's own torch_dist strategy writes in forked processes and collects their results through a spawned
manager process. That pays for asynchronous saves of large models; for a synchronous save it costs seconds, forks a
process that runs threads, and re-imports the main module. The files are the same: megatron-core's load strategy reads
them.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)


class InProcessSave(SaveShardedStrategy):
    """Synchronous twin of megatron-core's ``TorchDistSaveShardedStrategy``: one file per rank, fsynced."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        dcp.save(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )
