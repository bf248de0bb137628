"""The folder of nightly retraining, and how a model is published there.

    ROOT/runs/DATE/       run directory of a nightly run: data, stages, export, gate; night.json says its start
    ROOT/versions/DATE/   Hugging Face exports that passed the gate, each with gate.json beside the weights
    ROOT/latest           symbolic link to one of them: the published model

``latest`` is replaced by a rename, so whoever opens it finds the old version or the new one, never none.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import write_json

EXPORT, GATE_FILE, RUN_FILE = "export", "gate.json", "night.json"


@dataclass(frozen=True)
class NightlyRun:
    """What one date's run was given when it began; read again by every later attempt."""

    date: str
    start: str  # export it starts from; empty = model.init of the recipe
    data: str  # prepared data set


@dataclass(frozen=True)
class PublishRoot:
    """The folder that holds the nightly runs, the published versions and the link ``latest``."""

    folder: Path

    @property
    def latest(self) -> Path:
        return self.folder / "latest"

    def run_dir(self, day: str) -> Path:
        return self.folder / "runs" / day

    def version(self, day: str) -> Path:
        return self.folder / "versions" / day

    def published(self) -> Path | None:
        """The folder that ``latest`` points at. Raises DataError when it is no link, or points at nothing."""
        if not os.path.lexists(self.latest):
            return None
        if not self.latest.is_symlink() or not self.latest.is_dir():
            raise DataError(f"{self.latest} must be a symbolic link to a folder in {self.folder / 'versions'}; mend it")
        return self.latest.resolve()

    def nightly_run(self, day: str, find_data: Callable[[Path], Path], *, warm: bool) -> NightlyRun:
        """The run that was begun under this date, or a new one, which starts from the published model (``warm``)."""
        path = self.run_dir(day) / RUN_FILE
        if path.is_file():
            return NightlyRun(**json.loads(path.read_text(encoding="utf-8")))
        published = self.published() if warm else None
        run = NightlyRun(day, str(published or ""), str(find_data(self.run_dir(day)).resolve()))
        write_json(path, asdict(run))
        return run

    def publish(self, day: str) -> None:
        """Move the run's export, if it is still in its run directory, to ``versions`` and point ``latest`` at it."""
        version = self.version(day)
        if not version.is_dir():
            version.parent.mkdir(parents=True, exist_ok=True)
            (self.run_dir(day) / EXPORT).rename(version)
        temporary = self.folder / f".latest.{os.getpid()}"
        for left in self.folder.glob(".latest.*"):  # by a call that was killed; the root's lock is held
            with contextlib.suppress(FileNotFoundError):
                left.unlink()
        temporary.symlink_to(version.relative_to(self.folder))
        temporary.replace(self.latest)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
