"""One writer at a time in a run directory.

``RUN_DIR/run.lock`` names the process that writes: host, process id, its start, since when, and the command. It is made
by linking a finished file to that name, which succeeds for one of several processes on local disks and on NFS alike;
``flock`` reaches other machines only where the NFS server and every mount offer it. A thread touches the file every
``BEAT_S`` seconds.

A lock is stale when its process is gone (seen at once on its own machine), when Slurm has started
its job again, or when nobody has touched it for ``STALE_S`` seconds. A stale lock is taken over with a
warning. Whoever finds his lock in other hands, after a pause of that length, ends without writing anything more.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tawin_nemo.util.errors import UserError
from tawin_nemo.util.files import remove_leftovers
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

LOCK = "run.lock"
#: Seconds between two touches of a lock; without one for STALE_S the process counts as gone.
BEAT_S, STALE_S = 10.0, 120.0
#: Seconds that a process on this machine gets to end: one that was just killed may still be closing its files.
ENDING_S = 3.0


class Locked(UserError):
    """Another process writes into the directory."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    token: str  # tells this lock from every other one
    host: str
    space: str  # the boot and the process namespace in which ``pid`` counts
    pid: int
    start: int  # the process's start in clock ticks since the boot: a later process may get the same id
    since: str  # UTC
    command: str
    job: str  # SLURM_JOB_ID, or empty
    restart: int  # how often Slurm has started that job again

    @classmethod
    def here(cls, command: str) -> Owner:
        """This process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        pid, host = os.getpid(), socket.gethostname()
        return cls(uuid.uuid4().hex, host, _space(), pid, _start_of(pid) or 0, since, command, *_slurm_job())

    @classmethod
    def of(cls, text: str) -> Owner | None:
        """The owner that a lock file names; None for any other text."""
        try:
            content = dict(json.loads(text))
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since})"

    def gone(self) -> bool | None:
        """Whether the process has ended; None where that cannot be seen from here."""
        job, restart = _slurm_job()
        if self.job and self.job == job and restart > self.restart:
            return True  # Slurm starts a job again only after it has ended everywhere
        if not self.space or self.space != _space():
            return None
        return _start_of(self.pid) != self.start


@contextmanager
def run_lock(folder: Path, command: str, *, outputs: Sequence[str] = ()) -> Iterator[None]:
    """Hold the lock of ``folder`` inside the block; the folder is made if it is missing.

    ``outputs``: names in ``folder`` that alone are written; the lock is then theirs, and lies beside the first one.
    After a block without an error the temporary files that earlier, killed writers have left there are removed.

    Raises Locked when another process holds it, naming host, process and start, and OSError when the folder cannot be
    written.
    """
    made = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    lock, mine = folder / (f".{outputs[0]}.lock" if outputs else LOCK), Owner.here(command)
    _acquire(lock, mine)
    _remove_drafts(lock)
    begun = lock.stat().st_mtime  # by the clock of the file server
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, mine, stop), name="run-lock", daemon=True)
    beat.start()
    try:
        yield
        for name in outputs or ("",):
            remove_leftovers(folder, before=begun, name=name)
    finally:
        stop.set()
        beat.join()
        if _owner(lock) == mine:
            with suppress(OSError):
                lock.unlink()
        if made:  # by a command that then found nothing to write
            with suppress(OSError):
                folder.rmdir()


def _acquire(lock: Path, mine: Owner) -> None:
    draft = lock.with_name(f".{lock.name.removeprefix('.')}.{mine.token}")
    draft.write_text(json.dumps(asdict(mine)) + "\n", encoding="utf-8")
    try:
        begun, waits = time.monotonic(), False
        while not _linked(draft, lock):
            owner = _owner(lock)
            waited = time.monotonic() - begun
            if _is_stale(lock, draft, owner, waited):
                _take_over(lock, owner, mine)
                continue
            gone = owner.gone() if owner else None
            if gone is False and waited >= ENDING_S:
                raise Locked(_message(lock, owner))
            if gone is None and owner and _beats(lock, draft, waited):
                raise Locked(_message(lock, owner))
            if not waits and waited > 1:
                log.warning("%s is held by %s; looking whether that process still lives", lock, owner or "nobody known")
                waits = True
            time.sleep(0.2)
    finally:
        draft.unlink(missing_ok=True)


def _remove_drafts(lock: Path) -> None:
    """Remove the drafts of processes that were killed while they waited for the lock, long ago."""
    for draft in lock.parent.glob(f".{lock.name.removeprefix('.')}.*"):
        with suppress(OSError):
            if draft.stat().st_mtime < lock.stat().st_mtime - 2 * STALE_S:
                draft.unlink()


def _linked(draft: Path, lock: Path) -> bool:
    """Give the draft the lock's name, unless that exists. Where no links exist, create the file exclusively."""
    try:
        os.link(draft, lock)
        return True
    except FileExistsError:
        # over NFS the answer to a link that succeeded can be lost, and its repetition then fails
        return draft.stat().st_nlink == 2
    except (PermissionError, OSError) as error:
        if isinstance(error, FileNotFoundError) or not hasattr(os, "O_EXCL"):
            raise
        return _created(draft, lock)


def _created(draft: Path, lock: Path) -> bool:
    try:
        handle = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(draft.read_bytes())
    return True


def _is_stale(lock: Path, draft: Path, owner: Owner | None, waited: float) -> bool:
    if owner is not None and (gone := owner.gone()) is not None:
        return gone
    return _age(lock, draft) + waited > STALE_S or (owner is None and waited > ENDING_S)


def _age(lock: Path, draft: Path) -> float:
    """Seconds since the lock was touched, by the clock of the file server, when ``draft`` was written."""
    try:
        with lock.open("rb") as file:  # opening makes an NFS client ask the server again
            return draft.stat().st_mtime - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _beats(lock: Path, draft: Path, waited: float) -> bool:
    """Whether the lock was touched after ``draft`` was written: its owner lives, on another machine."""
    return waited > 1 and _age(lock, draft) < 0


def _take_over(lock: Path, owner: Owner | None, mine: Owner) -> None:
    """Remove a stale lock, unless another process has just replaced it by its own."""
    aside = lock.with_name(f".{lock.name.removeprefix('.')}.{mine.token}.stale")
    try:
        lock.rename(aside)
    except FileNotFoundError:
        return
    if _owner(aside) == owner:
        log.warning("%s was left by %s, which is gone: taken over", lock, owner or "a process that did not finish it")
    else:  # it belongs to another process that was faster
        with suppress(OSError):
            os.link(aside, lock)
    aside.unlink(missing_ok=True)


def _beat(lock: Path, mine: Owner, stop: threading.Event) -> None:
    """Touch the lock until ``stop``; end the process when the lock has become another's."""
    while not stop.wait(BEAT_S):
        with suppress(OSError):  # a file server that is away: it is touched again later
            owner = _owner(lock)
            if owner is not None and owner != mine:
                print(
                    f"tawin-nemo: this process stood still for more than {STALE_S:.0f} s, and {owner} has taken "
                    f"{lock.parent} over; it ends without writing",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(1)
            os.utime(lock)


def _owner(lock: Path) -> Owner | None:
    try:
        return Owner.of(lock.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _message(lock: Path, owner: Owner | None) -> str:
    return (
        f"{lock.parent} is in use by {owner}: two writers would destroy each other's files. Wait for it, end it, or "
        f"choose another folder (run_dir=); if it is certainly gone, remove {lock}"
    )


def _slurm_job() -> tuple[str, int]:
    """The Slurm job of this process (empty: none) and how often Slurm has started it again."""
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID", ""), int(restart) if restart.isdigit() else 0


def _space() -> str:
    """Names the boot and the process namespace of this process; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """When a process was started, in clock ticks since the boot; None when it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return None if state in ("Z", "X") else int(rest[18])
