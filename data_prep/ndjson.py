"""JSON lines, plain or gzipped, as a stream of frames that hold only the wanted fields.

Chunks whose lines are all good are parsed by polars. A chunk with anything doubtful in it is read again line by line,
which says what is wrong with which line; the good lines of such a chunk are kept. Lines in Python's notation
(``{'asin': ...}``, Amazon 2014) are read as such. Half a surrogate pair (valid JSON, no Unicode text) becomes U+FFFD in
a text and makes a line unusable where it stands in an id; chunks with one are doubtful.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from tawin_nemo.data_prep.files import BOM, chunks, unusable_reason
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.log import say

#: Line numbers that are kept per kind of problem.
EXAMPLES = 5
LINE = "line"

_FLOAT = r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"
_DOUBTFUL_ID = rf"^[\[{{]|^(true|false)$|{_FLOAT}"
_DOUBTFUL_SCALAR = r"^[\[{]|^(true|false)$"
#: An escaped surrogate without its other half; an escaped backslash before it may hide one.
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|\\u[dD][c-fC-F][0-9a-fA-F]{2}(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|\\\\u[dD][89a-fA-F]"
)


@dataclass(frozen=True)
class Field:
    """One wanted field. ``id`` and ``int`` are required; ``scalar`` (text or number) and ``text`` may be absent.

    A list in a ``text`` stays JSON text.
    """

    name: str
    kind: Literal["id", "int", "scalar", "text"]

    @property
    def dtype(self) -> type[pl.DataType]:
        """The polars type of the column."""
        return pl.Int64 if self.kind == "int" else pl.String


@dataclass
class Problems:
    """Unusable lines of one file: their number per reason and the first line numbers."""

    path: Path
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)
    lines: int = 0

    def add(self, reason: str, line: int) -> None:
        """Count one more line, numbered from 1, that is unusable for ``reason``."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        lines = self.examples.setdefault(reason, [])
        if len(lines) < EXAMPLES:
            lines.append(line)

    def add_all(self, reason: str, lines: pl.Series) -> None:
        """Count several lines that are unusable for ``reason``."""
        self.counts[reason] = self.counts.get(reason, 0) + len(lines)
        kept = self.examples.setdefault(reason, [])
        kept += lines.head(EXAMPLES - len(kept)).to_list()

    @property
    def total(self) -> int:
        """Unusable lines, over all reasons."""
        return sum(self.counts.values())

    def as_dict(self) -> dict[str, Any]:
        """Counts and first line numbers per reason, as the report of a preparation lists them."""
        reasons = {
            reason: {"lines": self.counts[reason], "first_lines": self.examples[reason]}
            for reason in sorted(self.counts)
        }
        return {"lines": self.lines, "unusable": self.total, "reasons": reasons}

    def report(self) -> None:
        """Log one line per reason."""
        for reason in sorted(self.counts):
            where = ", ".join(map(str, self.examples[reason]))
            say(f"{self.path.name}: {self.counts[reason]} lines skipped ({reason}), e.g. lines {where}")


def read_frames(path: Path, fields: list[Field], problems: Problems) -> Iterator[pl.DataFrame]:
    """Frames with ``fields`` and the 1-based ``line`` number, in file order; unusable lines go into ``problems``.

    Memory is bounded by the chunk size, not by the file. Raises DataError if the file cannot be opened, its gzip
    stream is damaged, it is a JSON array, or a line is longer than a chunk.
    """
    line = 1
    for chunk in chunks(path):
        if line == 1:
            chunk = chunk.removeprefix(BOM)
            if reason := unusable_reason(path, chunk):
                raise DataError(reason)
        count = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
        frame = _parse_fast(chunk, count, fields)
        if frame is None:
            frame = _parse_lines(chunk, line, fields, problems)
        else:
            numbers = pl.int_range(line, line + count, dtype=pl.Int64, eager=True).alias(LINE)
            frame = frame.with_columns(numbers)
        problems.lines += count
        line += count
        yield frame


def _parse_fast(chunk: bytes, count: int, fields: list[Field]) -> pl.DataFrame | None:
    """The chunk as a frame, or None if any of its lines needs to be parsed by itself."""
    if (b"\\ud" in chunk or b"\\uD" in chunk) and _HALF_PAIR.search(chunk):
        return None
    try:
        frame = pl.read_ndjson(io.BytesIO(chunk), schema={wanted.name: wanted.dtype for wanted in fields})
    except (pl.exceptions.PolarsError, UnicodeDecodeError):
        return None
    if frame.height != count:  # blank lines would shift the line numbers
        return None
    doubts = [_doubt(wanted) for wanted in fields if wanted.kind != "text"]
    return None if doubts and frame.select(pl.any_horizontal(doubts).any()).item() else frame


def _doubt(wanted: Field) -> pl.Expr:
    column = pl.col(wanted.name)
    if wanted.kind == "int":
        return column.is_null()
    if wanted.kind == "scalar":
        return column.str.contains(_DOUBTFUL_SCALAR).fill_null(False)
    # A number in a text column arrives as its digits; only the slow path can tell "5" from 5.0, so floats go there.
    plain_integer = column.str.contains(r"^-?[0-9]+$")
    doubtful = column.str.contains(_DOUBTFUL_ID) & ~plain_integer
    return column.is_null() | (column == "") | doubtful


def _parse_lines(chunk: bytes, first_line: int, fields: list[Field], problems: Problems) -> pl.DataFrame:
    columns: dict[str, list[Any]] = {wanted.name: [] for wanted in fields} | {LINE: []}
    for number, text in enumerate(chunk.split(b"\n"), first_line):
        if not text.strip():
            continue
        row = _parse_line(text, fields)
        if isinstance(row, str):
            problems.add(row, number)
            continue
        for name, value in row.items():
            columns[name].append(value)
        columns[LINE].append(number)
    return pl.DataFrame(columns, schema={wanted.name: wanted.dtype for wanted in fields} | {LINE: pl.Int64})


def _parse_line(text: bytes, fields: list[Field]) -> dict[str, Any] | str:
    """The wanted fields of one line, or the reason why the line is unusable."""
    value = parse_line(text)
    if value is NOT_JSON:
        return "not valid JSON"
    if not isinstance(value, dict):
        return "not a JSON object"
    row = {}
    for wanted in fields:
        entry = value.get(wanted.name)
        if entry in (None, "") and wanted.kind != "text":
            return f"missing field {wanted.name}"
        try:
            row[wanted.name] = _CONVERT[wanted.kind](entry)
        except TypeError:
            return f"wrong type of field {wanted.name}"
        except UnicodeEncodeError:
            return f"field {wanted.name} is not Unicode text"
    return row


NOT_JSON = object()


def parse_line(text: bytes) -> Any:
    """The value of a line in JSON, or in Python's notation of a dictionary; NOT_JSON if it is neither."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        if not text.lstrip().startswith((b"{'", b"{u'")):
            return NOT_JSON
    try:
        return ast.literal_eval(text.decode("utf-8").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return NOT_JSON


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _id(value: Any) -> str:
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError for half a surrogate pair
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise TypeError(value)


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise TypeError(value)
    return value


def _scalar(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return None if value is None else whole_text(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    raise TypeError(value)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return None if value is None else whole_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return whole_text(json.dumps(value, ensure_ascii=False))


def whole_text(text: str) -> str:
    """``text`` with U+FFFD for each half of a surrogate pair that stands alone.

    >>> whole_text("half \\ud83d")
    'half \ufffd'
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_CONVERT = {"id": _id, "int": _int, "scalar": _scalar, "text": _text}
