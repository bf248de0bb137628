"""Which items of a log have a usable title, and what is done about those of ready-made splits."""

from __future__ import annotations

import html
from typing import Any

import polars as pl

from tawin_nemo.config.schema import PrepareConfig
from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION, PRICE
from tawin_nemo.data_prep.raw import ITEM_TEXTS
from tawin_nemo.data_prep.titles import RESERVED, escape_reserved, title_faults
from tawin_nemo.types import EXTERNAL_ID, ITEM, TITLE
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.log import say

#: Rejected items that the screen and the manifest show per reason.
SHOWN = 5
#: The key that admits titles of each fault.
REMEDY = {
    "title too long": "prepare.max_title_words and prepare.max_title_chars",
    "reserved token in title": "prepare.reserved_tokens=escape",
}


def valid_items(
    items: pl.DataFrame, reviewed: pl.DataFrame, prepare: PrepareConfig
) -> tuple[pl.DataFrame, dict[str, Any]]:  # fmt: skip
    """Items with a valid title (columns ITEM and ITEM_TEXTS), and per reason how many others and their reviews.

    ``reviewed``: the items of the log (ITEM) with the number of their ``reviews``. The others are shown on screen.
    Reserved tokens in texts other than titles are always escaped.
    """
    first = items.unique(subset=[EXTERNAL_ID], keep="first", maintain_order=True).rename({EXTERNAL_ID: ITEM})
    escaped = [DESCRIPTION, BRAND, CATEGORY, PRICE, *([TITLE] if prepare.reserved_tokens == "escape" else [])]
    first = first.with_columns(escape_reserved(first[name]) for name in escaped)
    first = first.with_columns(title_faults(first[TITLE], prepare.max_title_words, prepare.max_title_chars))
    judged = reviewed.join(first.with_columns(known=True), on=ITEM, how="left").with_columns(
        pl.when(pl.col("known").is_null()).then(pl.lit("no metadata")).otherwise(pl.col("fault")).alias("fault")
    )
    rejected = judged.filter(pl.col("fault").is_not_null()).sort(ITEM)
    faults = {}
    for (reason,), part in sorted(rejected.group_by("fault"), key=lambda group: str(group[0][0])):
        faults[str(reason)] = {
            "items": part.height,
            "reviews": int(part["reviews"].sum()),
            "first_items": part[ITEM].head(SHOWN).to_list(),
        }
        _report(str(reason), part)
    return judged.filter(pl.col("fault").is_null()).select(ITEM, *ITEM_TEXTS), faults


def untitled(reviewed: pl.Series) -> tuple[pl.DataFrame, dict[str, Any]]:
    """All items of a log (``reviewed``, in any order), each with its id as title and no other text; no fault."""
    items = reviewed.alias(ITEM).unique().sort()
    empty = [pl.lit("").alias(name) for name in (DESCRIPTION, BRAND, CATEGORY, PRICE)]
    return items.to_frame().select(ITEM, pl.col(ITEM).alias(TITLE), *empty), {}


def _report(reason: str, items: pl.DataFrame) -> None:
    first = items.select(ITEM, TITLE).head(3).rows()
    examples = ", ".join(item if title is None else f"{item} {_short(title)!r}" for item, title in first)
    remedy = f"; see {REMEDY[reason]}" if reason in REMEDY else ""
    say(f"{_items(items.height)} skipped ({reason}{remedy}), e.g. {examples}")


def _items(count: int) -> str:
    return f"{count:,} item{'s' if count > 1 else ''}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}... ({len(text):,} characters)"


def ready_made(items: pl.DataFrame, prepare: PrepareConfig, source: str) -> pl.DataFrame:
    """The item texts of ready-made splits, with HTML entities decoded and reserved tokens escaped where keys say so.

    Their items cannot be dropped, because the samples name them: a reserved token in a title raises DataError that
    names the item, unless ``prepare.reserved_tokens=escape``; so does a title of more than ``prepare.max_title_chars``.
    """
    blank = items[TITLE].str.strip_chars() == ""
    if blank.any():
        say(f"{source}: {blank.sum():,} items have no title; their id is written instead")
        items = items.with_columns(pl.when(blank).then(pl.col(EXTERNAL_ID)).otherwise(pl.col(TITLE)).alias(TITLE))
    if prepare.decode_entities:
        items = items.with_columns(
            pl.Series(name, [html.unescape(text) for text in items[name]], dtype=pl.String) for name in ITEM_TEXTS
        )
    escaped = [DESCRIPTION, BRAND, CATEGORY, PRICE, *([TITLE] if prepare.reserved_tokens == "escape" else [])]
    items = items.with_columns(escape_reserved(items[name]) for name in escaped)
    reserved = items.filter(pl.col(TITLE).str.contains(RESERVED))
    if reserved.height:
        raise DataError(
            f"{source}: {_named(reserved)} with a tokenizer's reserved token in the title, which would be cut there; "
            "set prepare.reserved_tokens=escape"
        )
    long = items.filter(pl.col(TITLE).str.len_chars() > prepare.max_title_chars)
    if long.height:
        raise DataError(
            f"{source}: {_named(long)} with a title of more than prepare.max_title_chars={prepare.max_title_chars} "
            "characters; shorten it, or raise the key"
        )
    return items


def _named(items: pl.DataFrame) -> str:
    shown = items.select(EXTERNAL_ID, TITLE).head(3).rows()
    names = ", ".join(f"{item} ({_short(title)!r})" for item, title in shown)
    return f"{_items(items.height)} such as {names}"
