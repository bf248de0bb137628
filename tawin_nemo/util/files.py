"""Atomic writes of files and directories (temporary name, fsync, rename), and checksums."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tawin_nemo.util.trusted import open_trusted

#: The temporary names that ``atomic_path`` and ``atomic_directory`` make, with mkstemp's eight characters.
_LEFT = re.compile(r"\.(.+)(?:\.[a-z0-9_]{8}\.tmp(?:\.[^.]+)?|\.tmp[a-z0-9_]{8})")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; rename it over ``path`` if the block ends without an error.

    The file has the access rights of any new file (0666 without the bits of the umask), whatever library wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a rename would put the file in place of a device
        raise IsADirectoryError(errno.EISDIR, "is no regular file", str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp{path.suffix}")
    rights = _new_file(temporary)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(rights)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory; rename it to ``path`` if the block ends without an error.

    An older directory of that name is removed only after the new one has its name. The directory and all that lies in
    it have the access rights of new files and directories under the umask, whatever library wrote them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(path))
    temporary = path.with_name(f".{path.name}.tmp{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        _set_rights(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _new_file(path: Path) -> int:
    """Create an empty file as ``open`` does; returns the access rights that the kernel gave it.

    ``tempfile`` would create it for its owner alone. The umask itself can only be read by changing it, which other
    threads would notice.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _set_rights(folder: Path) -> None:
    """Give everything in a new folder the rights of new files and folders; some libraries write for the owner alone."""
    probe = folder / f".{secrets.token_hex(4)}"
    rights = _new_file(probe)
    probe.unlink()
    folder_rights = stat.S_IMODE(folder.stat().st_mode)
    for entry in folder.rglob("*"):
        wanted = folder_rights if entry.is_dir() else rights
        if not entry.is_symlink() and stat.S_IMODE(entry.stat().st_mode) != wanted:
            entry.chmod(wanted)


def remove_leftovers(folder: Path, *, before: float, name: str = "") -> None:
    """Remove the temporary files and folders that writers which were killed have left in ``folder``.

    ``before``: only names last changed before this time (of the file server, in seconds since 1970), as a writer that
    lives has newer ones. ``name``: only those of this file or folder, and its old version beside a new one; without a
    name those of everything in ``folder``, at any depth.
    """
    for left in [*folder.glob(f"{glob.escape(f'.{name}.')}*")] if name else [*folder.rglob(".*")]:
        replaced = name and left.name == f".{name}.old" and (folder / name).exists()
        temporary = _LEFT.fullmatch(left.name)
        if not replaced and (temporary is None or (name and temporary[1] != name)):
            continue
        with contextlib.suppress(OSError):
            if left.lstat().st_mtime >= before:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` atomically as indented JSON with sorted keys."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """SHA-256 of a file's content as hexadecimal digits."""
    with open_trusted(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Return when a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
