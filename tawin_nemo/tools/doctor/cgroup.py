"""Limits that a container or a batch system puts on this process: cgroup v2, v1, or both mounted side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: cgroup v1 writes "no limit" as the largest multiple of the page size that fits 63 bits.
_V1_UNLIMITED = 2**62


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
