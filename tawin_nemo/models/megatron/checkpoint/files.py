"""The files of a checkpoint directory: record, checksums, commit by rename, pruning. Knows nothing of models.

Names in a folder of checkpoints: ``step_N`` is whole; ``.step_N.tmp`` is being written; ``.step_N.old`` has been
replaced by a new ``step_N``, or is about to be; ``.step_N.gone`` is being removed; ``step_N.damaged`` was passed over
when a run was continued.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from tawin_nemo.util.errors import CheckpointError
from tawin_nemo.util.files import fsync_path, sha256
from tawin_nemo.util.trusted import OutsideRoots, read_text

T = TypeVar("T")

STATE_FILE = "state.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Ranks:
    """All processes of the run, communicating over ``group`` (None: the default one); one process needs no group.

    Unlike ``runtime.on_rank_0`` it may be used in a thread, with a group of its own.
    """

    group: Any = None

    @property
    def rank(self) -> int:
        """World rank of this process."""
        return dist.get_rank() if dist.is_initialized() else 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def share(self, names: list[str]) -> list[str]:
        """The names that this rank handles: every n-th of n ranks."""
        return names[self.rank :: dist.get_world_size(self.group)] if dist.is_initialized() else names

    def agree(self, part: Callable[[], T]) -> list[T]:
        """Run ``part`` on every rank; returns all results. Raises CheckpointError on all ranks when one fails."""
        result, problem = None, ""
        try:
            result = part()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        results = self.gather((result, problem))
        for rank, (_, failure) in enumerate(results):
            if failure:
                raise CheckpointError(f"rank {rank}: {failure}")
        return [value for value, _ in results]


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every ``step_N`` below ``directory``, oldest first; none are opened."""
    if not Path(directory).is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in Path(directory).iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def recover(directory: Path) -> None:
    """Rename a ``step_N`` back that was moved away for a newer one of the same name, which was then not written."""
    for old in Path(directory).glob(".step_*.old"):
        path = old.with_name(old.name[1 : -len(".old")])
        if not path.exists():
            old.rename(path)


def set_aside(directory: Path, step: int) -> None:
    """Rename checkpoints newer than ``step`` to ``step_N.damaged``: a run that continues after ``step`` skipped them.

    Under its old name such a checkpoint would count as one of the newest that are kept, and if the file system can read
    it again later, it would appear between the steps of another attempt.
    """
    for newer, path in list_checkpoints(directory):
        if newer > step:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(directory: Path, keep_last: int, keep: set[int]) -> None:
    """Remove all checkpoints but the ``keep_last`` newest and those whose step is in ``keep``; left-overs go as well.

    A checkpoint is renamed before it is removed: a kill in between leaves no half-empty ``step_N``.
    """
    checkpoints = list_checkpoints(directory)
    for step, path in checkpoints[: max(len(checkpoints) - keep_last, 0)]:
        if step not in keep:
            path.rename(path.with_name(f".{path.name}.gone"))
    for path in (*Path(directory).glob(".step_*"), *Path(directory).glob("step_*.damaged")):
        shutil.rmtree(path, ignore_errors=True)


def damaged_file(path: Path, names: list[str], files: dict[str, dict[str, Any]]) -> str | None:
    """Describes the first of ``names`` that does not match its record in ``files``; None if all match."""
    for name in names:
        file = path / name
        if not file.is_file():
            return f"the file {name} is missing"
        if file.stat().st_size != files[name]["bytes"]:
            return f"the file {name} has {file.stat().st_size} bytes instead of {files[name]['bytes']}"
        if sha256(file) != files[name]["sha256"]:
            return f"the checksum of {name} is wrong"
    return None


def digests(directory: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file."""
    return {name: {"bytes": (directory / name).stat().st_size, "sha256": sha256(directory / name)} for name in names}


def read_record(path: Path) -> dict[str, Any]:
    """``state.json``. Raises CheckpointError when it is missing, damaged or of another format."""
    try:
        record = json.loads(read_text(path / STATE_FILE))
        digest = record.pop("sha256")
    except FileNotFoundError:
        raise CheckpointError(f"{STATE_FILE} is missing") from None
    except OutsideRoots:
        raise
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{STATE_FILE} is damaged ({error!r})") from error
    if digest != record_digest(record):
        raise CheckpointError(f"the checksum of {STATE_FILE} is wrong")
    if record.get("format") != FORMAT:
        raise CheckpointError(f"format {record.get('format')} is not known (this version reads {FORMAT})")
    if not _is_complete(record):
        raise CheckpointError(f"{STATE_FILE} is damaged (it lacks entries, or they have another form)")
    return dict(record)


def _is_complete(record: dict[str, Any]) -> bool:
    """Whether the record has all entries in their form, and lists files of the checkpoint's own folder only."""
    entries = record.get("files")
    return (
        all(isinstance(record.get(key), dict) for key in ("state", "model", "files"))
        and "optimizer" in record
        and isinstance(entries, dict)
        and all(
            name not in ("", ".", "..")
            and "/" not in name
            and isinstance(entry, dict)
            and isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("sha256"), str)
            for name, entry in entries.items()
        )
    )


def commit(temporary: Path, path: Path, record: dict[str, Any]) -> None:
    """Write ``state.json``, fsync all files, and rename ``temporary`` to ``path``."""
    text = json.dumps({**record, "sha256": record_digest(record)}, indent=2, sort_keys=True) + "\n"
    (temporary / STATE_FILE).write_text(text, encoding="utf-8")
    for name in (*record["files"], STATE_FILE):
        fsync_path(temporary / name)
    fsync_path(temporary)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def record_digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its own checksum."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
