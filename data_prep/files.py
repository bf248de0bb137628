"""Raw files as streams of whole lines: what the first bytes say counts, not the file's name."""

from __future__ import annotations

import codecs
import gzip
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from tawin_nemo.util.errors import DataError
from tawin_nemo.util.launch import read_launch

CHUNK_BYTES = 16 << 20
#: Bytes of the beginning that tell the format.
HEAD_BYTES = 1 << 18
GZIP = b"\x1f\x8b"
#: First bytes of files that hold no lines, with what they are and the remedy.
_BINARY = {
    b"PK\x03\x04": ("a ZIP archive or spreadsheet", "unpack it, or save it as CSV"),
    b"BZh": ("bzip2", "run bunzip2 on it"),
    b"\xfd7zXZ": ("xz", "run unxz on it"),
    b"\x28\xb5\x2f\xfd": ("zstd", "run unzstd on it"),
    b"ustar": ("a tar archive", "unpack it"),
}
_ARRAY = re.compile(rb"\s*\[\s*(\{|$)")
_SPREAD_OUT = re.compile(rb"\s*\{\s*[\r\n]\s*\x22")
BOM = codecs.BOM_UTF8


def is_gzip(path: Path) -> bool:
    """Whether the content is gzipped, whatever the file is called. Raises DataError if it cannot be read."""
    with _opened(path) as raw:
        return raw.read(len(GZIP)) == GZIP


def head(path: Path, size: int = HEAD_BYTES) -> bytes:
    """The first ``size`` bytes, decompressed. Raises DataError as ``chunks`` does."""
    with _opened(path) as raw:
        stream = _decompressed(raw)
        with _damage_named(path, raw):
            return bytes(stream.read(size))


def unusable_reason(path: Path, beginning: bytes) -> str | None:
    """Why a file with this ``beginning`` holds no table and no JSON lines, with the remedy; None if it may."""
    for magic, (what, remedy) in _BINARY.items():
        if beginning.startswith(magic) or (magic == b"ustar" and beginning[257:262] == magic):
            return f"{path} is {what}; {remedy}"
    if beginning[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and b"\0" in beginning[:64]:
        return f"{path} is UTF-16 text; convert it: iconv -f utf-16 -t utf-8"
    if _ARRAY.match(beginning):
        return (
            f"{path} is a JSON array; expected JSON lines, one object per line: "
            f"jq -c '.[]' {path.name} > {path.name.split('.')[0]}.jsonl"
        )
    if _SPREAD_OUT.match(beginning):
        return (
            f"{path} holds JSON objects over several lines; expected one object per line: "
            f"jq -c . {path.name} > {path.name.split('.')[0]}.jsonl"
        )
    return None


def chunks(path: Path) -> Iterator[bytes]:
    """Whole lines, about CHUNK_BYTES at a time, with a progress bar over the bytes on disk; gzip is decompressed.

    Raises DataError if the file cannot be opened, its gzip stream is damaged, or a line is longer than a chunk.
    """
    with _opened(path) as raw:
        size = path.stat().st_size
        terminal = sys.stderr.isatty()
        stream = _decompressed(raw)
        with (
            tqdm(
                total=size,
                desc=path.name,
                unit="B",
                unit_scale=True,
                disable=read_launch().rank != 0 or size < CHUNK_BYTES,
                mininterval=0.2 if terminal else 10.0,
                file=sys.stderr,
            ) as bar,
            _damage_named(path, raw),
        ):
            while chunk := _read_chunk(stream, path):
                yield chunk
                bar.update(raw.tell() - bar.n)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error
    with raw:
        yield raw


def _decompressed(raw: BinaryIO) -> Any:
    magic = raw.read(len(GZIP))
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if magic == GZIP else raw


@contextmanager
def _damage_named(path: Path, raw: BinaryIO) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: gzip stream damaged near byte {raw.tell()} of {path.stat().st_size} ({error}); "
            "download the file again"
        ) from error


def _read_chunk(stream: BinaryIO, path: Path) -> bytes:
    chunk = stream.read(CHUNK_BYTES)
    if not chunk or chunk.endswith(b"\n"):
        return chunk
    rest = stream.readline(CHUNK_BYTES)
    if len(rest) == CHUNK_BYTES and not rest.endswith(b"\n"):
        reason = f"{path} has a line of more than {CHUNK_BYTES} bytes; expected one object or row per line"
        raise DataError(unusable_reason(path, chunk) or reason)
    return chunk + rest
