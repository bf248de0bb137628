"""The folder of nightly retraining, and how a version is published, taken back and removed there.

    ROOT/runs/DATE/         run directory of a nightly run: data, codes, stages, export, gate; night.json says its start
    ROOT/versions/DATE/     versions that passed the gate (``run.published`` lists what lies in one)
    ROOT/latest             symbolic link to one of them: the live version
    ROOT/items.jsonl        every item that a night ever exported; the line number is its item number
    ROOT/rolled_back.json   dates of versions that were taken back; a nightly run of such a date is not published again

``latest`` is replaced by a rename, so whoever opens it finds the old version or the new one, never none. ``night_lock``
of a whole nightly run is that of ROOT; what changes ``latest`` or removes versions also holds the short lock of
ROOT/versions, so that a rollback need not wait for a night that trains.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tawin_nemo.run.published import GATE_FILE, LATEST, VERSION_FILE, VERSIONS, live_version, read_version, seal
from tawin_nemo.run.run_lock import run_lock
from tawin_nemo.util.files import fsync_path, write_json

EXPORT, RUN_FILE, ROLLED_BACK = "export", "night.json", "rolled_back.json"
#: In front of the name of a version that is being removed.
REMOVED = ".removed."


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
        return self.folder / LATEST

    def run_dir(self, day: str) -> Path:
        return self.folder / "runs" / day

    def version(self, day: str) -> Path:
        return self.folder / VERSIONS / day

    def published(self) -> Path | None:
        """The folder that ``latest`` points at. Raises DataError when it is no link, or points at nothing."""
        return live_version(self.folder)

    def dates(self) -> list[str]:
        """The dates of all versions, oldest first."""
        folders = (self.folder / VERSIONS).glob("[!.]*")
        return sorted(path.name for path in folders if (path / "config.json").is_file())

    def before(self, day: str) -> str:
        """The date of the version that was live when that of ``day`` was judged; empty = none, or it is gone."""
        version = self.version(day)
        if (version / VERSION_FILE).is_file():
            against = str(read_version(version)["against"])
        else:  # published by an older program
            gate = version / GATE_FILE
            against = json.loads(gate.read_text(encoding="utf-8")).get("against", "") if gate.is_file() else ""
        return against if against and self.version(against).is_dir() else ""

    def rolled_back(self) -> set[str]:
        """Dates of the versions that were taken back."""
        path = self.folder / ROLLED_BACK
        return set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()

    def recorded_run(self, day: str) -> NightlyRun | None:
        """The run that was begun under this date, None without one."""
        path = self.run_dir(day) / RUN_FILE
        return NightlyRun(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def nightly_run(self, day: str, find_data: Callable[[Path], Path], *, warm: bool) -> NightlyRun:
        """The run that was begun under this date, or a new one, which starts from the published model (``warm``)."""
        if (begun := self.recorded_run(day)) is not None:
            return begun
        published = self.published() if warm else None
        run = NightlyRun(day, str(published or ""), str(find_data(self.run_dir(day)).resolve()))
        write_json(self.run_dir(day) / RUN_FILE, asdict(run))
        return run

    @contextlib.contextmanager
    def changing(self, command: str) -> Iterator[None]:
        """Inside the block no other process changes ``latest`` or removes versions. Raises Locked."""
        (self.folder / VERSIONS).mkdir(parents=True, exist_ok=True)
        with run_lock(self.folder / VERSIONS, command):
            yield

    def publish(self, day: str, *, against: str = "") -> None:
        """Seal the run's export, if it is still in its run directory, move it to ``versions`` and point ``latest`` at
        it. ``against``: the version that it was judged against. The caller holds ``changing``."""
        version, export = self.version(day), self.run_dir(day) / EXPORT
        if not version.is_dir():
            version.parent.mkdir(parents=True, exist_ok=True)
            seal(export, date=day, against=against)
            export.rename(version)
        self.point(day)

    def point(self, day: str) -> None:
        """Make the version of ``day`` live. It no longer counts as taken back. The caller holds ``changing``."""
        temporary = self.folder / f".latest.{os.getpid()}"
        for left in self.folder.glob(".latest.*"):  # by a call that was killed
            with contextlib.suppress(FileNotFoundError):
                left.unlink()
        temporary.symlink_to(self.version(day).relative_to(self.folder))
        temporary.replace(self.latest)
        fsync_path(self.folder)
        if day in (dates := self.rolled_back()):
            self.note_rolled_back(dates - {day})

    def note_rolled_back(self, dates: set[str]) -> None:
        """Write which versions were taken back."""
        write_json(self.folder / ROLLED_BACK, sorted(dates))

    def remove(self, day: str) -> None:
        """Remove the version and the nightly run of a date. A half-removed version has no date as its name."""
        for folder in (self.version(day), self.run_dir(day)):
            if folder.is_dir():
                folder.rename(folder.with_name(f"{REMOVED}{folder.name}"))
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Finish removals that were killed."""
        for parent in (self.folder / VERSIONS, self.folder / "runs"):
            for left in parent.glob(f"{REMOVED}*"):
                shutil.rmtree(left, ignore_errors=True)
