"""Histories in Parquet, read in pieces, so that memory does not grow with the number of users.

A file, or a folder of files, has the columns ``user_id`` (text or whole numbers, each once) and ``item_ids`` (a list of
external ids, oldest first). N: rows of a piece; E: entries of the lists of a piece.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tawin_nemo.data.histories import USER_ID, HistoryRows
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import DataError

ITEM_IDS = "item_ids"
#: Rows that are decoded at once.
BATCH_ROWS = 8192
#: Names that errors show.
SHOWN = 5


class HistoryFiles:
    """The rows of a Parquet file, or of all ``*.parquet`` below a folder in the order of their names.

    Reading pieces in ascending order decodes every row group once; memory holds one batch beside the piece. Raises
    DataError for no files, files that cannot be read, and columns that are missing or of another type.
    """

    def __init__(self, path: Path, external_ids: Sequence[str], *, key: str) -> None:
        """``key``: the recipe key that names ``path``, for errors."""
        self.path, self._key = path, key
        self.files = history_files(path, key)
        self._known = pa.array(external_ids, type=pa.string())
        self._groups: list[list[int]] = []  # first row of each row group, within its file
        rows, kinds = [], []
        for file in self.files:
            opened = self._opened(file)
            metadata = opened.metadata
            kinds.append(opened.schema_arrow.field(USER_ID).type)
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._groups.append([0, *accumulate(counts)][:-1])
            rows.append(sum(counts))
        self._starts = [0, *accumulate(rows)]
        numbers = [pa.types.is_integer(kind) for kind in kinds]
        if len(set(numbers)) > 1:
            odd = self.files[numbers.index(not numbers[0])]
            raise DataError(f"{key}: {USER_ID} is text in one of {self.files[0]} and {odd}, numbers in the other")
        #: Type of ``user_id`` in the output: whole numbers stay what they are, all else is text.
        self.user_type = kinds[0] if numbers[0] else pa.string()
        self._stream: Iterator[pa.RecordBatch] | None = None
        self._at = 0  # the row at which the stream goes on
        self._rest: list[pa.RecordBatch] = []  # decoded and not yet handed out

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self._starts[-1]

    @property
    def listing(self) -> list[tuple[str, int, int, int]]:
        """Name, bytes, time of the last change in ns, and rows of every file."""
        stats = [(str(file), file.stat()) for file in self.files]
        return [
            (name, stat.st_size, stat.st_mtime_ns, end - begin)
            for (name, stat), begin, end in zip(stats, self._starts, self._starts[1:], strict=False)
        ]

    def read(self, begin: int, end: int) -> HistoryRows:
        """Rows ``begin`` .. ``end`` - 1. Raises DataError for rows that cannot be read or have no user."""
        taken = self._taken(begin, end)
        users = pa.concat_arrays([_text(batch[USER_ID]) for batch in taken]) if taken else pa.array([], pa.string())
        if users.null_count:
            row = begin + users.is_null().to_pylist().index(True)
            raise DataError(f"{self.where(row)}: {USER_ID} is empty; give each history the id of its user")
        lists = [self._items(batch[ITEM_IDS]) for batch in taken]
        items = TokenRows.cat([found for found, _, _ in lists]) if lists else TokenRows.from_lists([])
        unknown_N = np.concatenate([np.zeros(0, np.int64), *(unknown for _, unknown, _ in lists)])
        names = list(dict.fromkeys(name for _, _, some in lists for name in some))[:SHOWN]
        return HistoryRows({USER_ID: users.cast(self.user_type)}, items, unknown_N, names)

    def users(self) -> Iterator[tuple[int, pa.Array]]:
        """First row and ``user_id`` of one batch after the other, as text."""
        row = 0
        for batch in self._batches(0, [USER_ID]):
            yield row, _text(batch[USER_ID])
            row += len(batch)

    def where(self, row: int) -> str:
        """File and row in it (0-based), for errors."""
        file = bisect.bisect_right(self._starts, row) - 1
        return f"{self._key}: row {row - self._starts[file]} of {self.files[file]}"

    def _items(self, column: pa.Array) -> tuple[TokenRows, np.ndarray, list[str]]:
        """Known items of the lists, the number of the other entries of each list, and some of their names."""
        names, lengths_N = _entries(column)
        place_E = pc.fill_null(pc.index_in(names, value_set=self._known), -1).to_numpy(zero_copy_only=False)
        known_E = place_E >= 0
        row_E = np.repeat(np.arange(len(column)), lengths_N)
        known_N = np.bincount(row_E[known_E], minlength=len(column))
        offsets = np.concatenate([[0], np.cumsum(known_N)]).astype(np.int64)
        missing = [] if known_E.all() else pc.unique(names.filter(pa.array(~known_E)))[:SHOWN].to_pylist()
        return TokenRows(place_E[known_E].astype(np.int64), offsets), lengths_N - known_N, list(map(str, missing))

    def _taken(self, begin: int, end: int) -> list[pa.RecordBatch]:
        """The batches of rows ``begin`` .. ``end`` - 1."""
        if begin != self._at or self._stream is None:
            self._stream, self._rest, self._at = self._batches(begin, [USER_ID, ITEM_IDS]), [], begin
        taken: list[pa.RecordBatch] = []
        while self._at < end:
            batch = self._rest.pop() if self._rest else next(self._stream, None)
            if batch is None:
                raise DataError(f"{self._key}: {self.path} has {self._at} rows instead of {self.rows}; it has changed")
            wanted = end - self._at
            if len(batch) > wanted:
                self._rest.append(batch.slice(wanted))
                batch = batch.slice(0, wanted)
            taken.append(batch)
            self._at += len(batch)
        return taken

    def _batches(self, begin: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows from ``begin`` on in small batches; row groups before it are not read."""
        first = max(0, bisect.bisect_right(self._starts, begin) - 1)
        for number in range(first, len(self.files)):
            skipped = max(0, begin - self._starts[number])
            group = max(0, bisect.bisect_right(self._groups[number], skipped) - 1)
            skipped -= self._groups[number][group] if self._groups[number] else 0
            groups = list(range(group, len(self._groups[number])))
            file = self._opened(self.files[number])
            try:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns):
                    kept = batch.slice(min(skipped, len(batch)))
                    skipped -= len(batch) - len(kept)
                    if len(kept):
                        yield kept
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{self._key}: {self.files[number]} cannot be read ({_first(error)})") from error

    def _opened(self, file: Path) -> pq.ParquetFile:
        try:
            opened = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._key}: {file} cannot be read as Parquet ({_first(error)})") from error
        check_columns(opened.schema_arrow, file, self._key)
        return opened


def history_files(path: Path, key: str) -> list[Path]:
    """``path`` itself, or the Parquet files below it but those with a name that begins with ``.`` or ``_``.

    Raises DataError where there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{key}={path} is neither a file nor a folder; name Parquet with {USER_ID} and {ITEM_IDS}")
    files = [file.relative_to(path) for file in sorted(path.rglob("*.parquet"))]
    shown = [path / file for file in files if not any(part.startswith((".", "_")) for part in file.parts)]
    if not shown:
        raise DataError(f"{key}={path} holds no file *.parquet; name Parquet with {USER_ID} and {ITEM_IDS}")
    return shown


def check_columns(schema: pa.Schema, file: Path, key: str) -> None:
    """Raises DataError unless ``schema`` has a ``user_id`` and lists ``item_ids``, both of text or whole numbers."""
    for name in (USER_ID, ITEM_IDS):
        if name not in schema.names:
            raise DataError(
                f"{key}: {file} has no column {name!r}; it has {', '.join(schema.names) or 'none'}. Needed are "
                f"{USER_ID} (text or whole numbers) and {ITEM_IDS} (a list of external ids, oldest first)"
            )
    user, items = (schema.field(name).type for name in (USER_ID, ITEM_IDS))
    if not _is_name(user):
        raise DataError(f"{key}: {file}: column {USER_ID!r} holds {user}; write ids as text or whole numbers")
    if not (pa.types.is_list(items) or pa.types.is_large_list(items)) or not _is_name(items.value_type):
        raise DataError(f"{key}: {file}: column {ITEM_IDS!r} holds {items}; write lists of text or whole numbers")


def _is_name(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))


def _text(column: pa.Array) -> pa.Array:
    column = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
    return column.cast(pa.string())


def _entries(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """All entries of the lists, as text, and the length [N] of each list; a list that is null is empty."""
    lengths_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return _text(pc.list_flatten(column)), lengths_N


def _first(error: BaseException) -> str:
    return str(error).splitlines()[0]
