"""Item titles: cleaned of HTML, and rejected where they are not a title."""

from __future__ import annotations

import html
import json
import re

import polars as pl

_BLOCKS = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_TAGS = re.compile(r"</?[a-zA-Z][^<>]*>|<![^<>]*>")
_SPACE = re.compile(r"[\s\x00-\x1f\x7f\u200b\ufeff]+")
#: A text without any of these is clean already.
_NEEDS_CLEANING = r"[<&\x00-\x1f\x7f\u00a0\u200b\ufeff]|\s\s|^\s|\s$|[\u2000-\u200a\u2028\u2029\u3000]"
#: Left over after cleaning: an unclosed tag, an entity, or JavaScript (Amazon's pages leak `var aPageStart = ...`).
_MARKUP = r"(?i)</?[a-z]|<!|&[a-z]{2,8};|&#\d+;|getTime\s*\(|function\s*\(|\bvar \w+\s*="

REASONS = ("no metadata", "empty title", "markup in title", "title too long")


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


def title_faults(titles: pl.Series, max_words: int) -> pl.Series:
    """Per cleaned title the first reason of REASONS that rules it out, or null for a valid title."""
    title = pl.col("title")
    reason = (
        pl.when(~title.str.contains(r"[\p{L}\p{N}]"))
        .then(pl.lit("empty title"))
        .when(title.str.contains(_MARKUP))
        .then(pl.lit("markup in title"))
        .when(title.str.count_matches(" ") + 1 > max_words)
        .then(pl.lit("title too long"))
        .otherwise(None)
    )
    return titles.alias("title").to_frame().select(reason.alias("fault"))["fault"]


def join_json_list(text: str | None, separator: str) -> str:
    """Text of a field that is a string or a JSON list of strings (Amazon's description and category)."""
    if not text:
        return ""
    if text.startswith("["):
        try:
            parts = json.loads(text)
        except ValueError:
            return clean_text(text)
        if isinstance(parts, list):
            return separator.join(cleaned for part in parts if part is not None and (cleaned := clean_text(str(part))))
    return clean_text(text)
