"""The launcher's environment (torchrun's or srun's): ranks, rendezvous and CPU threads; read here and nowhere else.

torchrun sets ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; srun sets ``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS`` (or
``SLURM_NTASKS``) and ``SLURM_LOCALID``. A batch script outside srun also sees ``SLURM_PROCID=0`` and the tasks of its
job, but no ``SLURM_STEP_ID``: it is one process.

The number of threads can change the order of floating-point sums, so it is a function of the machine and the launcher
alone: numbers chosen by measured speed made a resumed run differ from an uninterrupted one in its last bits. Threads
never spin: ``cli.main`` sets ``OMP_WAIT_POLICY=PASSIVE`` (unless it is set) before torch is imported, because OpenMP
reads its environment once. Beside another busy process that more than doubles the speed of two threads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tawin_nemo.util.errors import ConfigError


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


@dataclass(frozen=True)
class Hosts:
    """The machines of one job, each with a launcher of its own that meets the others at ``head`` (HOST:PORT)."""

    head: str
    count: int
    job: str  # the same word on all of them


#: The port of ``Hosts.head`` where none is named; torchrun's own default.
RENDEZVOUS_PORT = 29500


def hosts(env: Mapping[str, str] = os.environ) -> Hosts | None:
    """The machines that ``TAWIN_HEAD``, ``TAWIN_NODES`` and ``TAWIN_JOB`` name (slurm/torchrun.sh); None without them.

    Raises ConfigError for a number of machines that is none.
    """
    head, count = env.get("TAWIN_HEAD", ""), env.get("TAWIN_NODES", "1")
    if not head:
        return None
    if not count.isdecimal() or count == "0":
        raise ConfigError(f"TAWIN_NODES={count} is no number of machines; set it to how many start this command")
    return Hosts(head if ":" in head else f"{head}:{RENDEZVOUS_PORT}", int(count), env.get("TAWIN_JOB", "tawin"))


def needs_launcher(devices: int, env: Mapping[str, str] = os.environ) -> bool:
    """Whether this command has to start the processes of this machine, ``devices`` of them, itself."""
    return not is_launched(env) and (devices > 1 or hosts(env) is not None)


@dataclass(frozen=True)
class ArrayTask:
    """One task of a Slurm array (``sbatch --array``): its number, and the number and limits of all tasks' numbers."""

    task: int
    count: int
    first: int
    last: int
    step: int = 1

    @property
    def place(self) -> int | None:
        """Place of this task among all of them, from 0; None where their numbers are no regular series."""
        regular = (self.last - self.first) // self.step + 1 == self.count
        return (self.task - self.first) // self.step if regular else None


def read_array_task(env: Mapping[str, str] = os.environ) -> ArrayTask | None:
    """The task of a Slurm array that this process belongs to; None outside of one."""
    if "SLURM_ARRAY_TASK_ID" not in env:
        return None
    task = int(env["SLURM_ARRAY_TASK_ID"])
    count, first, last, step = (
        int(env.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("COUNT", 1), ("MIN", task), ("MAX", task), ("STEP", 1))
    )
    return ArrayTask(task, count, first, last, step)


def ranks_of_node(env: Mapping[str, str] = os.environ) -> int:
    """Processes of this job on this node, from torchrun's or srun's variables; 1 without a launcher."""
    if "LOCAL_WORLD_SIZE" in env:
        return int(env["LOCAL_WORLD_SIZE"])
    if _is_srun(env):
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))  # 8(x4) or 8,7
        return max(int(part.split("(")[0]) for part in per_node.split(","))
    return 1


def rendezvous(env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Address and port of rank 0: as given, or under srun the step's first node and a port made of the job number."""
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return env["MASTER_ADDR"], int(env["MASTER_PORT"])
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))  # for example gpu[07-09,12] or a1,a2
    head = re.match(r"([^,\[]*)(?:\[([^],-]+))?", nodes)
    first = f"{head[1]}{head[2] or ''}" if head else ""
    address = env.get("MASTER_ADDR", first or "127.0.0.1")
    return address, int(env.get("MASTER_PORT", 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def available_threads(
    env: Mapping[str, str] = os.environ, cores: int | None = None, machine: int | None = None
) -> int:  # fmt: skip
    """CPU threads that this process may use: its cores, shared fairly with the other ranks of its node; at least 1.

    ``OMP_NUM_THREADS`` is an upper bound. Under srun, cores that are bound to the task are its own; unbound ones, and
    all cores under torchrun, are divided by the ranks of the node. ``cores`` (of this process) and ``machine`` (all)
    are read from the system unless given.
    """
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    machine = (os.cpu_count() or cores) if machine is None else machine
    own = cores if _is_srun(env) and cores < machine else cores // max(1, ranks_of_node(env))
    if per_task := env.get("SLURM_CPUS_PER_TASK", ""):
        own = min(own, int(per_task)) if own else int(per_task)
    if limit := env.get("OMP_NUM_THREADS", "").split(",")[0]:
        own = min(own, int(limit))
    return max(1, own)


def _is_srun(env: Mapping[str, str]) -> bool:
    """Whether srun started this process, and not torchrun inside a Slurm job."""
    return "RANK" not in env and bool(env.get("SLURM_STEP_ID"))
