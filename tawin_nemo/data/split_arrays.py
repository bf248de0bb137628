"""The splits of a prepared data set as plain arrays on disk, which every process of a machine maps into its memory.

They are converted once from the Parquet files, part by part, into ``arrays/KEY`` of the data folder; KEY is the
beginning of the SHA-256 of ``manifest.json``. Where that folder cannot be written, they lie in a temporary folder for
one run. ``record.json`` names the format, type, length and SHA-256 of each array, and size and time of the files that
the manifest lists: a file with the same size and time is not hashed again. The folder gets its name when it is
complete; it can be removed at any time while no process reads it.

Arrays of a split: user, target, time (N), history and its offsets (N + 1), with candidates these and their offsets.
Histories and candidates are int32.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tawin_nemo.data.interactions import (
    MANIFEST,
    Split,
    check_table,
    num_items,
    read_manifest,
    split_columns,
    split_of_table,
    verify_files,
)
from tawin_nemo.types import SPLITS, TokenRows
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import sha256, write_json
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

FORMAT = "tawin_nemo.arrays.v1"
FOLDER, RECORD = "arrays", "record.json"
#: Rows of Parquet that are in memory at once.
_ROWS = 1 << 16


@dataclass(frozen=True)
class Arrays:
    """A folder with the arrays of all splits. ``temporary``: whoever opens it removes it when all have opened it."""

    folder: Path
    temporary: bool = False

    def split(self, name: str) -> Split:
        """A split whose arrays are mapped into memory, read-only."""
        listed = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))["arrays"][name]

        def mapped(column: str) -> np.ndarray:
            entry = listed[column]
            if not entry["length"]:
                return np.zeros(0, entry["type"])
            return np.asarray(np.memmap(self.folder / entry["file"], entry["type"], "r", shape=(entry["length"],)))

        def rows(column: str) -> TokenRows:
            return TokenRows(mapped(column), mapped(f"{column}_offsets"))

        candidates = rows("candidates") if "candidates" in listed else None
        return Split(mapped("user"), rows("history"), mapped("target"), mapped("time"), candidates)


def open_arrays(root: Path) -> Arrays:
    """The arrays of the prepared folder ``root``, verified; converted now where they are missing or damaged.

    Raises DataError as ``load_dataset`` does for damaged or wrong files, and where neither the data folder nor the
    folder for temporary files (TMPDIR) can be written.
    """
    manifest = read_manifest(root)
    folder = root / FOLDER / sha256(root / MANIFEST)[:16]
    record = _read_record(folder)
    verify_files(root, manifest, skip=_unchanged(root, record.get("sources", {})))
    if folder.exists():
        if _undamaged(folder, record):
            return Arrays(folder)
        log.warning("%s is damaged; the arrays are converted again", folder)
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(exist_ok=True)
        return _converted(root, manifest, folder)
    except OSError as error:
        log.info("%s cannot be written (%s); the arrays lie in a temporary folder", folder, error.strerror)
    try:
        with temporary_folder("tawin-arrays-") as temporary:
            return Arrays(_convert(root, manifest, temporary), temporary=True)
    except OSError as error:
        raise DataError(
            f"neither {folder.parent} nor {tempfile.gettempdir()} can be written ({error.strerror}); make room in one "
            "of them, or set TMPDIR"
        ) from error


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A new folder in TMPDIR, which is removed if the block ends with an error."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _converted(root: Path, manifest: dict[str, Any], folder: Path) -> Arrays:
    """Convert into a temporary folder and give it its name, unless another process was first."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp", dir=folder.parent))
    try:
        temporary.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp makes it for the owner alone
        _convert(root, manifest, temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not _undamaged(folder, _read_record(folder)):
                raise
        return Arrays(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(root: Path, manifest: dict[str, Any], folder: Path) -> Path:
    items = num_items(root)
    arrays = {name: _convert_split(root / f"{name}.parquet", items, folder, name) for name in SPLITS}
    pa.default_memory_pool().release_unused()
    sources = {name: _state(root / name) for name in manifest["files"]}
    write_json(folder / RECORD, {"format": FORMAT, "arrays": arrays, "sources": sources})
    return folder


def _convert_split(path: Path, items: int, folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Write the arrays of a split; returns their entries in the record. Raises DataError for wrong content."""
    columns = split_columns(path)
    with ExitStack() as stack:
        writers: dict[str, _Writer] = {}

        def write(column: str, values: np.ndarray) -> None:
            if column not in writers:
                file = stack.enter_context((folder / f"{name}.{column}.raw").open("wb"))
                writers[column] = _Writer(file, f"{name}.{column}.raw", values.dtype.newbyteorder("<"))
            writers[column].append(values)

        def write_rows(column: str, rows: TokenRows) -> None:
            before = writers[column].length if column in writers else 0
            write(column, rows.flat.astype(np.int32))
            offsets = rows.offsets + before
            write(f"{column}_offsets", offsets if f"{column}_offsets" not in writers else offsets[1:])

        for split in _parts(path, columns, items):
            write("user", split.user_N)
            write("target", split.target_N)
            write("time", split.time_N)
            write_rows("history", split.history)
            if split.candidates is not None:
                write_rows("candidates", split.candidates)
        return {column: writer.entry() for column, writer in writers.items()}


def _parts(path: Path, columns: list[str], items: int) -> Iterator[Split]:
    """The split in parts, each checked; at least one, which may be empty."""
    first = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                table = pa.Table.from_batches([batch]).select(columns)
                yield split_of_table(path, check_table(path, table), items, first)
                first += len(table)
            if not first:
                table = file.schema_arrow.empty_table().select(columns)
                yield split_of_table(path, table, items, 0)
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); prepare the data set again") from error


class _Writer:
    def __init__(self, file: BinaryIO, name: str, kind: np.dtype[Any]) -> None:
        self._file, self._name, self._kind = file, name, kind
        self._sum, self.length = hashlib.sha256(), 0

    def append(self, values: np.ndarray) -> None:
        content = np.ascontiguousarray(values, dtype=self._kind).data.cast("B") if len(values) else b""
        self._file.write(content)
        self._sum.update(content)
        self.length += len(values)

    def entry(self) -> dict[str, Any]:
        return {"file": self._name, "type": self._kind.str, "length": self.length, "sha256": self._sum.hexdigest()}


def _read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder; empty where there is none of this format."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(record) if isinstance(record, dict) and record.get("format") == FORMAT else {}


def _undamaged(folder: Path, record: dict[str, Any]) -> bool:
    try:
        entries = [entry for split in SPLITS for entry in record["arrays"][split].values()]
        return all(sha256(folder / entry["file"]) == entry["sha256"] for entry in entries)
    except (OSError, KeyError):
        return False


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _unchanged(root: Path, sources: dict[str, list[int]]) -> set[str]:
    """Files whose size and time are those of the record."""
    return {name for name, state in sources.items() if (root / name).is_file() and _state(root / name) == state}
