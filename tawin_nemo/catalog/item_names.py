"""What belongs to an item belongs to its external id: files that number items are read through the ids they number.

Item numbers are positions in the sorted list of a catalog's external ids. One item more or less shifts them, so a file
made for another state of the catalog would silently be about other items.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from tawin_nemo.util.errors import CatalogError

T = TypeVar("T")

#: The file beside a file of numbers that says which item has which number: a JSON list of external ids, number 0 first.
NAMES = "items.json"


def named(path: Path, pairs: Sequence[tuple[str, T]], external_ids: Sequence[str], what: str) -> list[tuple[str, T]]:
    """``pairs`` of the JSON object in ``path`` with external ids as keys.

    Keys that are numbers are explained by ``items.json`` beside the file; without it they are accepted only where the
    items of the catalog are numbers themselves. ``what`` says in errors what the values are.

    Raises CatalogError for numbers that nothing explains, and for an ``items.json`` that does not fit them.
    """
    keys = {key for key, _ in pairs}
    if not keys or not all(key.isdecimal() for key in keys):
        return list(pairs)
    if (names_file := path.parent / NAMES).is_file():
        names = item_names(names_file)
        if not keys <= set(map(str, range(len(names)))):
            raise CatalogError(
                f"{names_file} names {len(names)} items and {path} has {what} of {len(keys)}, numbered "
                f"{min(map(int, keys))} .. {max(map(int, keys))}: the two files do not belong together"
            )
        return [(names[int(key)], value) for key, value in pairs]
    if len(keys & set(external_ids)) * 2 > len(keys) or list(external_ids) == numbers(len(external_ids)):
        return list(pairs)
    raise CatalogError(
        f"{path} numbers its items, but this catalog names them (the first is {external_ids[0]!r}), and one item more "
        f"or less shifts every number: write {names_file} (a JSON list of external ids, number 0 first), or use "
        "external ids as keys"
    )


def rows_of(path: Path, num_rows: int, external_ids: Sequence[str]) -> np.ndarray:
    """The row of each item in an array file of one row per item. int64 [I].

    Rows are named by ``items.json`` beside the file; without it row i is taken for item i.

    Raises CatalogError when the names are not one per row, and for items without a row; without names also when there
    is not one row per item.
    """
    names_file = path.parent / NAMES
    if not names_file.is_file():
        if num_rows != len(external_ids):
            raise CatalogError(
                f"{path} has {num_rows} rows and the catalog {len(external_ids)} items; write one row per item, in the "
                f"order of items.parquet, or name the rows in {names_file} (a JSON list of external ids)"
            )
        return np.arange(num_rows)
    names = item_names(names_file)
    if len(names) != num_rows:
        raise CatalogError(f"{names_file} names {len(names)} items, but {path} has {num_rows} rows")
    row_of = {name: row for row, name in enumerate(names)}
    if missing := [name for name in external_ids if name not in row_of]:
        raise CatalogError(f"{path} has no row for {len(missing)} items of the catalog: {shorten(missing)}")
    return np.array([row_of[name] for name in external_ids], dtype=np.int64)


def item_names(path: Path) -> list[str]:
    """The external ids in ``items.json``. Raises CatalogError for a file that is no JSON list of texts."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogError(f"cannot read the names of the items, {path}: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CatalogError(f"{path} must hold one JSON list of external ids, number 0 first")
    return names


def numbers(count: int) -> list[str]:
    """``["0", "1", ...]``: the external ids of items that have no other name."""
    return [str(item) for item in range(count)]


def shorten(names: Collection[str] | Iterable[str], shown: int = 5) -> str:
    """The first names, quoted, for an error message."""
    every = list(names)
    return ", ".join(map(repr, every[:shown])) + (" ..." if len(every) > shown else "")
