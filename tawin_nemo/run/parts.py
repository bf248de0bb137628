"""Output in parts: a folder of Parquet files, each written whole or not at all, by any number of processes.

Rows are divided into parts of equal size, whoever computes them, so that a part has the same bytes under every layout.

    FOLDER/part-000000.parquet         the rows of one part; temporary until it is whole
    FOLDER/_parts/part-000000.json     its SHA-256, and that of the rows that it was made from
    FOLDER/_job.json                   what decides the result: other values than these are refused
    FOLDER/_manifest.json              all parts with their SHA-256, once all are there

Readers of folders (Spark, DuckDB, pyarrow, ``tawin-nemo score``) skip names that begin with ``_``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.files import atomic_path, sha256, write_json
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

FORMAT = "tawin_nemo.parts/1"
JOB_FILE, MANIFEST_FILE, RECORDS = "_job.json", "_manifest.json", "_parts"
#: Differences that an error names.
SHOWN = 5


@dataclass(frozen=True)
class Parts:
    """The parts of ``rows`` rows in ``folder``, ``part_rows`` each (the last one may be shorter).

    ``key``: the recipe key that names the folder, for errors.
    """

    folder: Path
    rows: int
    part_rows: int
    key: str

    def __len__(self) -> int:
        return -(-self.rows // self.part_rows)

    def bounds(self, part: int) -> tuple[int, int]:
        """First row of a part, and the row behind its last one.

        >>> Parts(Path("lists"), rows=25, part_rows=10, key="recommend.output").bounds(2)
        (20, 25)
        """
        return part * self.part_rows, min((part + 1) * self.part_rows, self.rows)

    def file(self, part: int) -> Path:
        """The Parquet file of a part."""
        return self.folder / f"part-{part:06d}.parquet"

    def share(self, index: int, count: int) -> range:
        """The parts of share ``index`` of ``count``: neighbours, so that their rows are read in one go.

        >>> [list(Parts(Path("lists"), rows=25, part_rows=5, key="recommend.output").share(i, 2)) for i in (0, 1)]
        [[0, 1], [2, 3, 4]]
        """
        return range(index * len(self) // count, (index + 1) * len(self) // count)

    def check_job(self, job: Mapping[str, Any]) -> None:
        """Raises ConfigError when the folder holds parts of another job, naming the keys that differ."""
        path = self.folder / JOB_FILE
        if not path.is_file():
            return
        try:
            stored = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ConfigError(
                f"{path} is damaged ({error}); remove {self.folder}, or name another {self.key}"
            ) from error
        new = json.loads(json.dumps({"format": FORMAT, **job}))
        changed = [
            f"{key}: {_short(stored.get(key))} -> {_short(new.get(key))}"
            for key in sorted({*stored, *new})
            if stored.get(key) != new.get(key)
        ]
        if changed:
            raise ConfigError(
                f"{self.key}={self.folder} holds results of another job ({'; '.join(changed[:SHOWN])}): name another "
                f"{self.key}, bring these back, or remove that folder"
            )

    def start(self, job: Mapping[str, Any]) -> None:
        """Record ``job`` in a new folder. Raises ConfigError as ``check_job``."""
        self.check_job(job)
        if not (self.folder / JOB_FILE).is_file():
            write_json(self.folder / JOB_FILE, {"format": FORMAT, **job})

    def record(self, part: int) -> dict[str, Any] | None:
        """The record of a part whose file is whole; None for a part that has to be made (again)."""
        file = self.file(part)
        try:
            record = dict(json.loads(self._record_file(part).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
        if file.is_file() and sha256(file) == record.get("sha256"):
            return record
        log.warning("%s is missing or damaged and is made again", file)
        return None

    def write(self, part: int, table: pa.Table, *, digest: str, more: Mapping[str, Any]) -> None:
        """Write a part and its record, which holds ``more``, too; ``digest``: SHA-256 of the rows it is made from."""
        with atomic_path(self.file(part)) as temporary:
            pq.write_table(table, temporary)
            checksum = sha256(temporary)
        record = {"sha256": checksum, "input": digest, "rows": table.num_rows, **more}
        write_json(self._record_file(part), record)

    def complete(self) -> list[dict[str, Any]] | None:
        """The records of all parts, None while one is missing; writes the manifest once all are there."""
        records: list[dict[str, Any]] = []
        for part in range(len(self)):
            if not self._record_file(part).is_file():
                return None
            records.append({"file": self.file(part).name} | _read(self._record_file(part)))
        write_json(self.folder / MANIFEST_FILE, {"format": FORMAT, "rows": self.rows, "parts": records})
        return records

    def _record_file(self, part: int) -> Path:
        return self.folder / RECORDS / f"{self.file(part).stem}.json"


def divided(parts: Sequence[int], index: int, count: int) -> list[int]:
    """The parts of process ``index`` of ``count``: neighbours.

    >>> [divided([0, 3, 4, 7, 9], rank, 2) for rank in (0, 1)]
    [[0, 3], [4, 7, 9]]
    """
    return list(parts[index * len(parts) // count : (index + 1) * len(parts) // count])


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _short(value: Any) -> Any:
    """A value for an error; of a checksum its beginning."""
    return f"{value[:12]}.." if isinstance(value, str) and len(value) == 64 else value
