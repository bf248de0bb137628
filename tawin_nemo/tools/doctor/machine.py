"""CPUs, memory, shared memory and the limits on this process."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from tawin_nemo.tools.doctor.cgroup import Limits
from tawin_nemo.tools.doctor.check import Check, absent, check, gib, ok, warning

#: PyTorch data loaders and gloo need a few MiB per pair of processes, NCCL more; Docker's default of 64 MiB is too few.
ENOUGH_SHM = 2**30
ENOUGH_FILES = 4096
ENOUGH_MEMORY = 2 * 2**30
_SHM = Path("/dev/shm")


def usable_cpus(limits: Limits) -> float:
    """What this process may use at once: the affinity mask, or the group's share of CPU time if that is less."""
    allowed = float(len(os.sched_getaffinity(0)))
    return allowed if limits.cpus is None else min(allowed, limits.cpus)


def usable_memory(limits: Limits) -> int:
    """Bytes: the machine's memory or the group's limit, whichever is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total if limits.memory_bytes is None else min(total, limits.memory_bytes)


@check("CPUs")
def cpus(limits: Limits, processes: int) -> Check:
    """``processes``: how many the recipe starts on this machine."""
    allowed, usable = len(os.sched_getaffinity(0)), usable_cpus(limits)
    quota = "none" if limits.cpus is None else f"{limits.cpus:g}"
    load = os.getloadavg()[0]
    value = f"{os.cpu_count()} in the machine, {allowed} allowed, group limit {quota}, load {load:.1f}"
    if usable < processes:
        return warning(value, f"{processes} processes share {usable:g} CPUs: lower trainer.devices, or ask for more")
    if usable < allowed:
        threads = max(1, int(usable / processes))
        return warning(value, f"threads follow the allowed CPUs, not the group's limit: set trainer.threads={threads}")
    if load > 1.5 * usable:
        return warning(value, "other work runs here: timings will not be worth much")
    return ok(value)


@check("memory")
def memory(limits: Limits) -> Check:
    import psutil

    machine = psutil.virtual_memory()
    value = f"{gib(machine.available)} free of {gib(machine.total)}"
    free = machine.available
    if limits.memory_bytes is not None and limits.memory_bytes < machine.total:
        free = min(free, limits.memory_bytes - (limits.memory_used_bytes or 0))
        value += f"; group limit {gib(limits.memory_bytes)}, of which {gib(limits.memory_used_bytes or 0)} used"
    if free < ENOUGH_MEMORY:
        return warning(value, f"less than {gib(ENOUGH_MEMORY)} free: ask for more (Slurm: --mem), or stop other work")
    return ok(value)


@check("shared memory")
def shared_memory() -> Check:
    if not _SHM.is_dir():
        return absent(f"no {_SHM}")
    usage = shutil.disk_usage(_SHM)
    value = f"{_SHM}: {gib(usage.free)} free of {gib(usage.total)}"
    if usage.free < ENOUGH_SHM:
        return warning(value, "several processes need 1 GiB: --shm-size=8g or --ipc=host for containers")
    return ok(value)


@check("open files")
def open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{_limit(soft)} (up to {_limit(hard)})"
    if 0 <= soft < ENOUGH_FILES:
        return warning(value, f"ulimit -n {ENOUGH_FILES if hard < 0 else min(hard, 65536)}")
    return ok(value)


@check("locked memory")
def locked_memory(*, rdma: bool) -> Check:
    """``rdma``: there is an InfiniBand adapter, whose driver pins the buffers it sends."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    value = "unlimited" if soft < 0 else gib(soft)
    if soft >= 0 and rdma:
        return warning(value, "InfiniBand pins its buffers: ulimit -l unlimited (Slurm: PropagateResourceLimits)")
    return ok(value)


def _limit(number: int) -> str:
    return "unlimited" if number < 0 else str(number)
