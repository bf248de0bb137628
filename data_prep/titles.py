"""Item titles: cleaned of HTML, and rejected where they are not a title."""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Iterator

import polars as pl

_BLOCKS = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_TAGS = re.compile(r"</?[a-zA-Z][^<>]*>|<![^<>]*>")
_SPACE = re.compile(r"[\s\x00-\x1f\x7f\u200b\ufeff]+")
#: A text without any of these is clean already.
_NEEDS_CLEANING = r"[<&\x00-\x1f\x7f\u00a0\u200b\ufeff]|\s\s|^\s|\s$|[\u2000-\u200a\u2028\u2029\u3000]"
#: Left over after cleaning: an unclosed tag, an entity, or JavaScript (Amazon's pages leak `var aPageStart = ...`).
#: A function has braces or no name before its bracket: "Multi-Function (Black)" is a title.
_MARKUP = (
    r"(?i)</?[a-z]|<!|&[a-z]{2,8};|&#\d+;|getTime\s*\(|\bvar \w+\s*="
    r"|[=;{]\s*function\s*\(|\(function\(|\bfunction\b[^(){}]*\([^(){}]*\)\s*\{"
)
#: Tokens that tokenizers reserve: end of text, padding, chat and template markers.
RESERVED = r"<\|[^\s|<>]{1,64}\|>|</?s>|<(?:pad|unk|eos|bos|mask)>"

REASONS = ("no metadata", "empty title", "markup in title", "reserved token in title", "title too long")


def clean_text(text: str) -> str:
    """Plain text: entities decoded (also doubly encoded ones), scripts, comments and tags removed, spaces collapsed."""
    for _ in range(3):
        decoded = html.unescape(text)
        if decoded == text:
            break
        text = decoded
    return _SPACE.sub(" ", _TAGS.sub(" ", _BLOCKS.sub(" ", text))).strip()


def clean_column(texts: pl.Series) -> pl.Series:
    """``clean_text`` of a String column, null as "". Only texts that need cleaning are processed one by one."""
    texts = texts.fill_null("")
    dirty = texts.str.contains(_NEEDS_CLEANING).arg_true()
    if not len(dirty):
        return texts
    return texts.scatter(dirty, pl.Series([clean_text(text) for text in texts.gather(dirty)], dtype=pl.String))


def escape_reserved(texts: pl.Series) -> pl.Series:
    """``texts`` with a space behind the first character of each reserved token, so that no tokenizer sees one."""
    found = texts.str.contains(RESERVED).fill_null(False).arg_true()
    escaped = [re.sub(RESERVED, lambda token: f"< {token[0][1:]}", text) for text in texts.gather(found)]
    return texts.scatter(found, pl.Series(escaped, dtype=pl.String)) if len(found) else texts


def title_faults(titles: pl.Series, max_words: int, max_chars: int = 1000) -> pl.Series:
    """Per cleaned title the first reason of REASONS that rules it out, or null for a valid title."""
    title = pl.col("title")
    reason = (
        pl.when(~title.str.contains(r"[\p{L}\p{N}]"))
        .then(pl.lit("empty title"))
        .when(title.str.contains(_MARKUP))
        .then(pl.lit("markup in title"))
        .when(title.str.contains(RESERVED))
        .then(pl.lit("reserved token in title"))
        .when((title.str.count_matches(" ") + 1 > max_words) | (title.str.len_chars() > max_chars))
        .then(pl.lit("title too long"))
        .otherwise(None)
    )
    return titles.alias("title").to_frame().select(reason.alias("fault"))["fault"]


def join_json_list(text: str | None, separator: str) -> str:
    """Text of a field that is a string or a list of strings, in JSON or Python (Amazon's description and category).

    Lists in the list are joined as well: Amazon 2014 has a list of category paths.
    """
    if not text:
        return ""
    if text.startswith("["):
        parts = _list(text)
        if isinstance(parts, list):
            return join_list(parts, separator)
    return clean_text(text)


def join_list(parts: list[object] | None, separator: str) -> str:
    """The cleaned texts of a list, also of lists in it, joined; "" for None."""
    return separator.join(cleaned for part in _flat(parts or []) if (cleaned := clean_text(part)))


def _list(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _flat(parts: list[object]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, list):
            yield from _flat(part)
        elif part is not None:
            yield str(part)
