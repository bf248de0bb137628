"""Tables as streams of frames: CSV and TSV, JSON lines, Parquet, folders of Hugging Face ``datasets``, MovieLens.

The content tells the format (magic bytes, first line); names of files do not matter. Memory is bounded by the size of a
batch, not by the file.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from tawin_nemo.config.schema import ColumnsConfig
from tawin_nemo.data_prep.columns import by_number
from tawin_nemo.data_prep.files import BOM, CHUNK_BYTES, chunks, head, is_gzip, unusable_reason
from tawin_nemo.data_prep.ndjson import LINE, NOT_JSON, Field, Problems, parse_line, read_frames
from tawin_nemo.types import ITEM, USER
from tawin_nemo.util.errors import DataError

BATCH_ROWS = 1 << 18
#: JSON lines that are looked at for their keys.
_SAMPLED_LINES = 100
PARQUET = b"PAR1"
_ARROW = b"ARROW1"
#: MovieLens's files without header: pattern of the first line, separator, columns.
_MOVIELENS = (
    (rb"[^:\s]+::[^:\s]+::[\d.]+::\d+", "::", ("user_id", "movie_id", "rating", "timestamp")),
    (rb"\d+\t\d+\t[\d.]+\t\d{9,}", "\t", ("user_id", "movie_id", "rating", "timestamp")),
    (rb"\d+::.*::[^\d:]+", "::", ("movie_id", "movie_title", "genres")),
    (rb"\d+\|[^|]+\|(?:\d\d-\w{3}-\d{4})?\|[^|]*\|.*", "|", ("movie_id", "movie_title", "release_date")),
)


@dataclass(frozen=True)
class Table:
    """A file (or a folder of ``datasets``) with named columns."""

    path: Path
    kind: Literal["csv", "lines", "json", "parquet", "hf"]
    columns: tuple[str, ...]
    separator: str = ","
    has_header: bool = True

    @property
    def format(self) -> str:
        """The format's name, as messages show it."""
        if self.kind == "csv" and self.separator == "\t":
            return "RecBole atomic file" if any(":" in column for column in self.columns) else "TSV"
        names = {"csv": "CSV", "lines": "MovieLens", "json": "JSON lines", "parquet": "Parquet"}
        return names.get(self.kind, "Hugging Face datasets")


def is_hf(path: Path) -> bool:
    """Whether ``path`` is a folder that ``datasets.save_to_disk`` wrote."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_table(path: Path, given: ColumnsConfig) -> Table | None:
    """The table in ``path``; None if it is text without columns.

    Raises DataError, with the remedy, for a file that is recognised and cannot be read as one, such as a JSON array.
    """
    if path.is_dir():
        if not is_hf(path):
            raise DataError(f"{path} is a folder, but not one that datasets.save_to_disk wrote")
        return Table(path, "hf", tuple(_hf_parts(path)[0].column_names))
    beginning = head(path)
    if beginning.startswith(PARQUET):
        return Table(path, "parquet", tuple(_parquet(path).schema_arrow.names))
    if beginning.startswith(_ARROW):
        raise DataError(
            f"{path} is an Arrow file by itself; name the folder of datasets.save_to_disk, or write Parquet"
        )
    if reason := unusable_reason(path, beginning):
        raise DataError(reason)
    if b"\0" in beginning:
        raise DataError(f"{path} is not text; expected CSV, TSV, JSON lines or Parquet")
    lines = beginning.removeprefix(BOM).splitlines()
    first = next((line for line in lines if line.strip()), b"")
    if first.lstrip().startswith(b"{"):
        return Table(path, "json", _keys(path, lines))
    for pattern, separator, columns in _MOVIELENS:
        if re.fullmatch(pattern, first.rstrip()):
            return Table(path, "lines", columns, separator, has_header=False)
    return _separated(path, first.decode("utf-8", "replace"), given)


def _keys(path: Path, lines: Sequence[bytes]) -> tuple[str, ...]:
    """Keys of the first objects, in the order in which they come."""
    objects = [parse_line(line) for line in lines[:_SAMPLED_LINES]]
    keys = dict.fromkeys(key for value in objects if isinstance(value, dict) for key in value)
    if not keys and all(value is NOT_JSON for value in objects):
        raise DataError(f"{path} begins with a brace but not with JSON lines, one object per line")
    return tuple(map(str, keys))


def _separated(path: Path, first: str, given: ColumnsConfig) -> Table | None:
    counts = {separator: first.count(separator) for separator in ("\t", ",", ";", "|")}
    separator = "\t" if counts["\t"] else max(counts, key=lambda name: counts[name])
    if counts[separator] == 0:
        return None
    names = [name.strip() for name in next(csv.reader([first], delimiter=separator))]
    if by_number(given) and given.user not in names:
        return Table(path, "csv", tuple(str(place) for place in range(1, len(names) + 1)), separator, has_header=False)
    unique = [name if names.index(name) == place else f"{name}#{place + 1}" for place, name in enumerate(names)]
    return Table(path, "csv", tuple(unique), separator)


def frames(table: Table, roles: Mapping[str, str], problems: Problems) -> Iterator[pl.DataFrame]:
    """Frames whose columns are the keys of ``roles`` (values: columns of the table) and LINE, the row number from 1.

    Cells keep the type that the file gives them (all text in CSV). Rows that cannot be read go into ``problems``.
    Raises DataError for a damaged file, and for text that is not UTF-8.
    """
    if table.kind == "json":
        fields = [Field(column, _kind(role)) for role, column in roles.items()]
        names = {column: role for role, column in roles.items()}
        for frame in read_frames(table.path, fields, problems):
            yield frame.rename(names)
        return
    sources = {"csv": _csv, "lines": _lines, "parquet": _parquet_batches, "hf": _hf_batches}
    before = 1
    for part in sources[table.kind](table, list(dict.fromkeys(roles.values())), problems):
        numbers = pl.int_range(before, before + part.height, dtype=pl.Int64, eager=True).alias(LINE)
        before += part.height
        problems.lines += part.height
        yield part.select(pl.col(column).alias(role) for role, column in roles.items()).with_columns(numbers)


def _kind(role: str) -> Literal["id", "scalar", "text"]:
    if role in (USER, ITEM):
        return "id"
    return "scalar" if role in ("time", "event", "rating") else "text"


def _csv(table: Table, wanted: list[str], problems: Problems) -> Iterator[pl.DataFrame]:
    def skip(row: Any) -> str:
        problems.add(f"{row.actual_columns} columns instead of {row.expected_columns}", row.number or 0)
        problems.lines += 1
        return "skip"

    path = table.path
    typed = any(":" in column for column in table.columns)  # RecBole writes quotes as they are
    parse = pa_csv.ParseOptions(
        delimiter=table.separator, quote_char=False if typed else '"', newlines_in_values=not typed,
        invalid_row_handler=skip,
    )  # fmt: skip
    read = pa_csv.ReadOptions(
        use_threads=False, block_size=CHUNK_BYTES, column_names=list(table.columns), skip_rows=int(table.has_header)
    )
    convert = pa_csv.ConvertOptions(
        include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), null_values=[],
        strings_can_be_null=False,
    )  # fmt: skip
    try:
        with (
            pa.input_stream(str(path), compression="gzip" if is_gzip(path) else None) as stream,
            pa_csv.open_csv(stream, read, parse, convert) as reader,
        ):
            for batch in reader:
                yield _frame(pa.Table.from_batches([batch]))
    except (pa.ArrowException, OSError) as error:
        remedy = "convert it: iconv -f latin1 -t utf-8" if "UTF8" in str(error) else "write the file again"
        raise DataError(f"{path} cannot be read as {table.format} ({str(error)[:200]}); {remedy}") from error


def _lines(table: Table, wanted: list[str], problems: Problems) -> Iterator[pl.DataFrame]:
    """MovieLens's files, of which some are Latin-1; a line with too few columns gives null there."""
    for chunk in chunks(table.path):
        try:
            text = chunk.decode("utf-8")
        except UnicodeDecodeError:
            text = chunk.decode("latin-1")
        rows = pl.Series("row", [line for line in text.split("\n") if line.strip()], dtype=pl.String)
        parts = pl.col("row").str.strip_chars_end("\r").str.split(table.separator)
        yield rows.to_frame().select(
            parts.list.get(table.columns.index(name), null_on_oob=True).alias(name) for name in wanted
        )


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); write the file again") from error


def parquet_schema(path: Path) -> pa.Schema:
    """The columns of a Parquet file. Raises DataError when it is none."""
    with _parquet(path) as file:
        return file.schema_arrow


def _parquet_batches(table: Table, wanted: list[str], problems: Problems) -> Iterator[pl.DataFrame]:
    with _parquet(table.path) as file:
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                yield _frame(pa.Table.from_batches([batch]))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{table.path} is damaged ({error}); write the file again") from error


def _hf_parts(path: Path) -> list[Any]:
    """The data sets of a folder: itself, or those of its splits, train first and test last."""
    import datasets  # takes a second to import

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many types
        raise DataError(f"{path} cannot be read by datasets.load_from_disk ({error}); save it again") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return [loaded]
    order = {"train": 0, "valid": 1, "validation": 1, "test": 2}
    return [loaded[name] for name in sorted(loaded, key=lambda name: (order.get(name, 3), name))]


def _hf_batches(table: Table, wanted: list[str], problems: Problems) -> Iterator[pl.DataFrame]:
    for part in _hf_parts(table.path):
        if missing := [name for name in wanted if name not in part.column_names]:
            raise DataError(f"{table.path} has a split without the column {missing[0]}; its splits must have the same")
        arrow = part.select_columns(wanted).with_format("arrow")
        for start in range(0, len(arrow), BATCH_ROWS):
            yield _frame(arrow[start : start + BATCH_ROWS])


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
