"""This machine: CPUs, memory, limits of containers and batch systems, the run's disk, clock, host name and ports."""

from __future__ import annotations

import ipaddress
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tawin_nemo.tools.doctor.check import Check, absent, check, fails, gib, ok, warning
from tawin_nemo.util.launch import is_launched

#: PyTorch data loaders and gloo need a few MiB per pair of processes, NCCL more; Docker's default of 64 MiB is too few.
ENOUGH_SHM = 2**30
ENOUGH_FILES = 4096
ENOUGH_MEMORY = 2 * 2**30
_SHM = Path("/dev/shm")
LOW_DISK = 5 * 2**30
SLOW_DISK = 50 * 2**20  # bytes per second; a checkpoint of 1 GiB takes 20 s
SKEW_S = 5.0
_BLOCK, _BLOCKS, _LIMIT_S = 2**23, 8, 2.0
ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: cgroup v1 writes "no limit" as the largest multiple of the page size that fits 63 bits.
_V1_UNLIMITED = 2**62


# -- limits of a container or a batch system: cgroup v2, v1, or both mounted side by side
@dataclass(frozen=True)
class Limits:
    """The tightest limits on the way from this process's group to the root; None = none."""

    memory_bytes: int | None
    memory_used_bytes: int | None  # of the group with that limit, without page cache that is given back on demand
    cpus: float | None  # CPU time per wall time


def read_limits(root: Path = ROOT, membership: Path = MEMBERSHIP) -> Limits:
    """Limits of this process. Files that cannot be read count as no limit."""
    memory: list[tuple[int, int | None]] = []
    cpus: list[float] = []
    for folder in _folders(root, membership, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is not None and limit < _V1_UNLIMITED:
            memory.append((limit, _used(folder)))
    for folder in _folders(root, membership, "cpu"):
        cpus.extend(_cpu_quota(folder))
    tightest, used = min(memory, key=lambda pair: pair[0], default=(None, None))
    return Limits(tightest, used, min(cpus, default=None))


def _folders(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """This process's group and its ancestors in every hierarchy that may hold ``controller``.

    Inside a container the path may name folders of the host that cannot be seen here; the root is always looked at.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root, root / "unified"]
        elif controller in controllers.split(","):
            mounts = [root / controllers, root / controller]
        else:
            continue
        inner = Path(path.lstrip("/"))
        for mount in dict.fromkeys(mounts):
            for part in (inner, *inner.parents):
                yield mount / part


def _used(folder: Path) -> int | None:
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
    if used is None:
        return None
    fields = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    cache = fields.get(
        "total_inactive_file", fields.get("inactive_file", "0")
    )  # v1 has both, with and without children
    return max(0, used - int(cache))


def _cpu_quota(folder: Path) -> Iterator[float]:
    text = _text(folder / "cpu.max").split()  # "QUOTA PERIOD" or "max PERIOD"
    if len(text) == 2 and text[0].isdigit() and int(text[1]) > 0:
        yield int(text[0]) / int(text[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    if quota is not None and period and quota > 0:
        yield quota / period


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else None


# -- CPUs and memory
def usable_cpus(limits: Limits) -> float:
    """What this process may use at once: the affinity mask, or the group's share of CPU time if that is less."""
    allowed = float(len(os.sched_getaffinity(0)))
    return allowed if limits.cpus is None else min(allowed, limits.cpus)


def usable_memory(limits: Limits) -> int:
    """Bytes: the machine's memory or the group's limit, whichever is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
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


# -- disk, clock, network
def existing(path: Path) -> Path:
    """``path``, or its nearest parent that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


@check("run folder")
def run_folder(path: Path, *, measure: bool) -> Check:
    """Writable, with room; ``measure`` also writes up to 64 MiB with fsync for the speed (and removes them)."""
    folder = existing(path)
    free = shutil.disk_usage(folder).free
    value = f"{path}: {gib(free)} free"
    try:
        speed = _write(folder, _BLOCKS if measure else 1)
    except OSError as error:
        remedy = f"make {folder} writable, free some space, or set run_dir= to another folder"
        return fails(f"{value}, cannot be written ({error.strerror})", remedy)
    if measure:
        value += f", writes {speed / 2**20:.0f} MiB/s"
    if free < LOW_DISK:
        return warning(value, f"less than {gib(LOW_DISK)} free: checkpoints may not fit")
    if measure and speed < SLOW_DISK:
        return warning(value, "checkpoints will be slow: set run_dir= to a faster disk, or a larger save_interval")
    return ok(value)


def _write(folder: Path, blocks: int) -> float:
    """Bytes per second, written and synchronised; stops early on a slow disk."""
    data = os.urandom(_BLOCK)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tawin_doctor.") as file:
        start, written = time.monotonic(), 0
        for _ in range(blocks):
            written += os.write(file.fileno(), data)
            os.fsync(file.fileno())
            if time.monotonic() - start > _LIMIT_S:
                break
        return written / max(time.monotonic() - start, 1e-9)


@check("clock")
def clock(path: Path) -> Check:
    """This machine's clock against the one that stamps files in the run folder (a file server's may be another)."""
    with tempfile.NamedTemporaryFile(dir=existing(path), prefix=".tawin_doctor.") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        skew = os.stat(file.name).st_mtime - time.time()
    value = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, {skew:+.1f} s against the run folder"
    installed = Path(__file__).stat().st_mtime
    if time.time() < installed - SKEW_S:
        return warning(f"{value}; this program's files are from the future", "set the clock (chronyd, ntpd)")
    if abs(skew) > SKEW_S:
        return warning(value, "set the clock of this machine or of the file server (chronyd, ntpd)")
    return ok(value)


@check("host name")
def host_name(nodes: int) -> Check:
    """gloo and torchrun look the machine's own name up to find the address that others reach it by."""
    name = socket.gethostname()
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError as error:
        remedy = "add the name to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo (one machine; else its interface)"
        return warning(f"{name} has no address ({error.strerror or error})", remedy)
    value = f"{name} is {', '.join(addresses)}"
    if nodes > 1 and all(ipaddress.ip_address(address).is_loopback for address in addresses):
        remedy = "other nodes cannot reach that address: mend /etc/hosts, or export GLOO_SOCKET_IFNAME=INTERFACE"
        return warning(value, remedy)
    return ok(value)


@check("ports")
def ports() -> Check:
    """A listener on this machine can be reached; MASTER_PORT, where it is set for this machine, is not taken."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            value = "a connection to this machine works"
    wanted = os.environ.get("MASTER_PORT", "")
    launched = is_launched()  # the port may be in use by our own job
    if wanted.isdigit() and not launched and os.environ.get("MASTER_ADDR") in (None, "localhost", "127.0.0.1"):
        try:
            socket.create_server(("", int(wanted))).close()
        except OSError as error:
            return fails(f"MASTER_PORT={wanted}: {error.strerror}", "export another MASTER_PORT, or unset it")
        value += f"; MASTER_PORT={wanted} is free"
    return ok(value)
