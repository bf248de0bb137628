"""The Parquet files of a prepared folder, written in row groups of bounded size from tables that come one by one.

The bytes are those of ``datasets.Dataset.to_parquet`` 5.0 (row groups of 100 MB, pages cut by content, the features
under the key ``huggingface``), whoever writes them and in whatever portions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: Size of a row group before compression; a writer holds one of them in memory.
ROW_GROUP_BYTES = 100_000_000
_PAGES = {"min_chunk_size": 256 * 1024, "max_chunk_size": 1024 * 1024, "norm_level": 0}


class ParquetRows:
    """Writes ``rows`` rows of about ``nbytes`` bytes in memory, both known before, as the file ``path``."""

    def __init__(self, path: Path, schema: pa.Schema, *, rows: int, nbytes: int) -> None:
        self._schema = pa.schema(list(schema)).with_metadata({"huggingface": json.dumps(_features(schema))})
        self._group = max(1, rows * ROW_GROUP_BYTES // nbytes) if nbytes > 0 else 1
        self._waiting: list[pa.Table] = []
        self._writer = pq.ParquetWriter(
            path, self._schema, compression=dict.fromkeys(schema.names, "snappy"), use_dictionary=schema.names,
            use_content_defined_chunking=_PAGES, write_page_index=True,
        )  # fmt: skip

    def write(self, table: pa.Table) -> None:
        """Add the rows of ``table``, which has the columns of the schema in its order."""
        self._waiting.append(table.cast(self._schema))
        if sum(part.num_rows for part in self._waiting) >= self._group:
            whole = pa.concat_tables(self._waiting)
            full = whole.num_rows // self._group * self._group
            for start in range(0, full, self._group):
                self._write_group(whole.slice(start, self._group))
            self._waiting = [whole.slice(full)] if full < whole.num_rows else []

    def _write_group(self, table: pa.Table) -> None:
        self._writer.write_table(table.combine_chunks())

    def __enter__(self) -> ParquetRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the last row group and the footer; after an error the file is incomplete and of no use."""
        if error is None and self._waiting:
            self._write_group(pa.concat_tables(self._waiting))
        if error is None:
            self._writer.add_key_value_metadata({"content_defined_chunking": json.dumps(_PAGES)})
        self._writer.close()


def write_table(table: pa.Table, path: Path) -> None:
    """Write a whole table; texts of 64-bit offsets are written as texts of 32-bit ones."""
    with ParquetRows(path, short_texts(table.schema), rows=table.num_rows, nbytes=table.nbytes) as file:
        file.write(table)


def write_tables(tables: Iterable[pa.Table], path: Path, schema: pa.Schema, *, rows: int, nbytes: int) -> None:
    """Write the tables one after the other as one file; see ParquetRows."""
    with ParquetRows(path, schema, rows=rows, nbytes=nbytes) as file:
        for table in tables:
            file.write(table)


def short_texts(schema: pa.Schema) -> pa.Schema:
    """``schema`` with ``string`` for ``large_string``, which polars uses."""
    return pa.schema([(f.name, pa.string() if pa.types.is_large_string(f.type) else f.type) for f in schema])


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The columns as the library ``datasets`` describes them in a file."""
    return {"info": {"features": {field.name: _feature(field.type) for field in schema}}}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": str(kind), "_type": "Value"}
