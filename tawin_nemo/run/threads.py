"""CPU threads of a process.

The number of threads can change the order of floating-point sums, so it is a function of the machine and the launcher
alone: numbers chosen by measured speed made a resumed run differ from an uninterrupted one in its last bits. Threads
never spin: ``cli.main`` sets ``OMP_WAIT_POLICY=PASSIVE`` (unless it is set) before torch is imported, because
OpenMP reads its environment once. Beside another busy process that more than doubles the speed of two threads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from tawin_nemo.util.launch import ranks_of_node


def available_threads(
    env: Mapping[str, str] | None = None, cores: int | None = None, machine: int | None = None
) -> int:
    """Threads that this process may use: its cores, shared fairly with the other ranks of its node; at least 1.

    ``OMP_NUM_THREADS`` is an upper bound. Under srun, cores that are bound to the task are its own; unbound ones, and
    all cores under torchrun, are divided by the ranks of the node. ``cores`` (of this process) and ``machine`` (all)
    are read from the system unless given.
    """
    env = os.environ if env is None else env
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    machine = (os.cpu_count() or cores) if machine is None else machine
    bound = bool(env.get("SLURM_STEP_ID")) and "RANK" not in env and cores < machine
    own = cores if bound else cores // max(1, ranks_of_node(env))
    if asked := env.get("SLURM_CPUS_PER_TASK", ""):
        own = min(own, int(asked)) if own else int(asked)
    if limit := env.get("OMP_NUM_THREADS", "").split(",")[0]:
        own = min(own, int(limit))
    return max(1, own)
