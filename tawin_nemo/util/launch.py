"""Rank and world size from the launcher (torchrun or srun); nothing else reads these environment variables.

torchrun sets ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; srun sets ``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS`` (or
``SLURM_NTASKS``) and ``SLURM_LOCALID``. A batch script outside srun also sees ``SLURM_PROCID=0`` and the tasks of its
job, but no ``SLURM_STEP_ID``: it is one process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Rank of this process among those that one launcher started."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those on this machine


def read_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Rank and number of processes from torchrun's variables, else from srun's, else one process."""
    if "RANK" in env:
        return Launch(int(env["RANK"]), int(env.get("WORLD_SIZE", "1")), int(env.get("LOCAL_RANK", env["RANK"])))
    if "SLURM_PROCID" in env and env.get("SLURM_STEP_ID"):
        tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
        return Launch(int(env["SLURM_PROCID"]), int(tasks), int(env.get("SLURM_LOCALID", "0")))
    return Launch()


def is_launched(env: Mapping[str, str] = os.environ) -> bool:
    """True if torchrun or srun started this process, perhaps as the only one."""
    return "RANK" in env or bool(env.get("SLURM_STEP_ID"))


def ranks_of_node(env: Mapping[str, str] = os.environ) -> int:
    """Processes of this job on this node, from torchrun's or srun's variables; 1 without a launcher."""
    if "LOCAL_WORLD_SIZE" in env:
        return int(env["LOCAL_WORLD_SIZE"])
    if "RANK" not in env and env.get("SLURM_STEP_ID"):
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))  # 8(x4) or 8,7
        return max(int(part.split("(")[0]) for part in per_node.split(","))
    return 1
