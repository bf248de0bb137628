"""The run's disk, the clock, the host's name and its ports."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from tawin_nemo.tools.doctor.check import Check, check, fails, gib, ok, warning
from tawin_nemo.util.launch import is_launched

LOW_DISK = 5 * 2**30
SLOW_DISK = 50 * 2**20  # bytes per second; a checkpoint of 1 GiB takes 20 s
SKEW_S = 5.0
_BLOCK, _BLOCKS, _LIMIT_S = 2**23, 8, 2.0


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
    if nodes > 1 and all(address.startswith("127.") or address == "::1" for address in addresses):
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
