"""Reads the items of a served catalog (``serve.catalogue``) from a JSON lines file."""

from __future__ import annotations

import json
from pathlib import Path

from tawin_nemo.serve.engine.catalog import NewItem
from tawin_nemo.util.errors import CatalogError
from tawin_nemo.util.trusted import read_text


def read_items(path: Path) -> list[NewItem]:
    """Read items from a JSON lines file with ``external_id``, ``title`` and optional ``codes`` (list of strings).

    Raises CatalogError that names the line of the first invalid item.
    """
    items = []
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path} cannot be read as a catalog: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise TypeError("an item must be one JSON object")
            codes = record.get("codes", ())
            item = NewItem(record["external_id"], record["title"], tuple(codes))
            if isinstance(codes, str) or not all(
                isinstance(word, str) and word for word in (item.external_id, item.title, *item.codes)
            ):
                raise TypeError("external_id, title and codes must be strings that are not empty")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CatalogError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
        items.append(item)
    if not items:
        raise CatalogError(f"{path} holds no items")
    return items
