"""The prepared data set on disk, read back and checked.

Layout of the folder: ``items.parquet`` (item, external_id, title, description, brand, category), ``users.parquet``
(user, external_id, by user) where users have names, one Parquet file per split (user, history, target, time; candidates
where rows have candidate sets), further files such as code indices, and ``manifest.json`` with the SHA-256 of each.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tawin_nemo.types import CANDIDATES, EXTERNAL_ID, HISTORY, ITEM, SPLITS, TARGET, TIME, TITLE, USER, TokenRows
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import sha256

if TYPE_CHECKING:
    from tawin_nemo.data.split_arrays import Arrays

FORMAT = "tawin_nemo.prepared.v1"
MANIFEST = "manifest.json"
ITEMS_FILE, USERS_FILE = "items.parquet", "users.parquet"
#: Key of the manifest of data without item texts: their titles are external ids.
NO_TITLES = "titles_are_ids"
#: Columns of ITEMS_FILE besides ITEM, EXTERNAL_ID and TITLE.
DESCRIPTION, BRAND, CATEGORY, PRICE = "description", "brand", "category", "price"

_AGAIN = "prepare the data set again"


@dataclass(frozen=True)
class Split:
    """N samples in time order. ``history`` holds item indices, oldest first; ``time_N`` is seconds or a row order.

    ``candidates``: the candidate set of each row, the target among them; None where the data have none.
    """

    user_N: np.ndarray
    history: TokenRows
    target_N: np.ndarray
    time_N: np.ndarray
    candidates: TokenRows | None = None

    def __len__(self) -> int:
        return len(self.user_N)

    def slice(self, begin: int, end: int) -> Split:
        """Samples begin .. end - 1, without copying."""
        offsets = self.history.offsets[begin : end + 1]
        history = TokenRows(self.history.flat[offsets[0] : offsets[-1]], offsets - offsets[0])
        candidates = None if self.candidates is None else self.candidates.take(np.arange(len(self))[begin:end])
        return Split(self.user_N[begin:end], history, self.target_N[begin:end], self.time_N[begin:end], candidates)


@dataclass(frozen=True)
class ItemFrame:
    """The catalog; position i belongs to item index i."""

    external_ids: list[str]
    titles: list[str]
    descriptions: list[str]

    def __len__(self) -> int:
        return len(self.titles)


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: its items, its three splits and the manifest that the preparation wrote.

    ``user_names``: table or file with the names of users, where they have names. ``root``: its folder.
    """

    items: ItemFrame
    train: Split
    valid: Split
    test: Split
    manifest: dict[str, Any]
    user_names: pa.Table | Path | None = None
    root: Path | None = None

    @property
    def has_titles(self) -> bool:
        """Whether items have texts; without, their titles are external ids."""
        return not self.manifest.get(NO_TITLES)

    @cached_property
    def users(self) -> pa.Table | None:
        """USER and EXTERNAL_ID, ordered by user number, read at the first use; None where users have no names."""
        names = self.user_names
        return _read_table(names, [USER, EXTERNAL_ID]) if isinstance(names, Path) else names

    def user_ids(self, user_N: np.ndarray) -> list[str | None]:
        """External ids of users [N]; None for users without a name."""
        if self.users is None or not len(self.users):
            return [None] * len(user_N)
        numbers_U = self.users[USER].to_numpy()
        place_N = np.searchsorted(numbers_U, user_N).clip(max=len(numbers_U) - 1)
        known_N = numbers_U[place_N] == user_N
        names = self.users[EXTERNAL_ID].take(pa.array(place_N)).to_pylist()
        return [name if known else None for name, known in zip(names, known_N.tolist(), strict=True)]


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises DataError if there is none, or it is not one of this format."""
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{root} is not a prepared data set: no readable {MANIFEST} ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error
    actual = manifest.get("format") if isinstance(manifest, dict) else None
    if actual != FORMAT or not isinstance(manifest.get("files"), dict):
        raise DataError(f"{path} has format {actual!r}, expected {FORMAT!r}; {_AGAIN}")
    return manifest


def verify_files(root: Path, manifest: dict[str, Any], *, skip: Collection[str] = ()) -> None:
    """Raise DataError if a file that the manifest lists is absent or has another SHA-256; ``skip`` are not hashed."""
    needed = {ITEMS_FILE} | {f"{split}.parquet" for split in SPLITS}
    if missing := sorted(needed - manifest["files"].keys()):
        raise DataError(f"{root / MANIFEST} does not list {', '.join(missing)}; {_AGAIN}")
    for name, expected in manifest["files"].items():
        path = root / name
        if not path.is_file():
            raise DataError(f"{path} is missing although {MANIFEST} lists it; {_AGAIN}")
        if name not in skip and (actual := sha256(path)) != expected:
            raise DataError(
                f"{path} is damaged or was edited: SHA-256 {actual[:12]}.. instead of {expected[:12]}..; {_AGAIN}"
            )


def load_dataset(root: Path, arrays: Arrays | None = None) -> Dataset:
    """Read a prepared folder after verifying the checksums of its manifest.

    ``arrays``: its splits, verified already; they are mapped into memory, and nothing that grows with the rows is read.

    Raises DataError for a missing or damaged file, missing columns, item indices that are not 0..I-1, an empty
    history, or samples that name an item outside the catalog.
    """
    manifest = read_manifest(root)
    if arrays is None:
        verify_files(root, manifest)
    items = _read_items(root / ITEMS_FILE)
    read = partial(_read_split, root, len(items)) if arrays is None else arrays.split
    train, valid, test = (read(split) for split in SPLITS)
    users = root / USERS_FILE if USERS_FILE in manifest["files"] else None
    return Dataset(items, train, valid, test, manifest, users, root)


def num_items(root: Path) -> int:
    """Rows of the items table, without reading it."""
    return int(pq.read_metadata(root / ITEMS_FILE).num_rows)


def _read_table(path: Path, columns: list[str]) -> pa.Table:
    """These columns of a table. Raises DataError for a missing column or cell, and for a file that is no Parquet."""
    try:
        present = pq.read_schema(path).names
        if missing := [name for name in columns if name not in present]:
            raise DataError(f"{path} has no column {missing[0]!r}; {_AGAIN}")
        table = pq.read_table(path, columns=columns).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); {_AGAIN}") from error
    return check_table(path, table)


def check_table(path: Path, table: pa.Table) -> pa.Table:
    """``table`` itself, of the file ``path``. Raises DataError for a cell without a value."""
    for name in table.column_names:
        if table[name].null_count:
            raise DataError(f"{path}: column {name!r} has {table[name].null_count} empty cells; {_AGAIN}")
    return table


def _read_items(path: Path) -> ItemFrame:
    columns = [ITEM, EXTERNAL_ID, TITLE, DESCRIPTION]
    table = _read_table(path, columns)
    index = table[ITEM].to_numpy()
    if not np.array_equal(index, np.arange(len(index))):
        raise DataError(f"{path}: column {ITEM!r} must be 0..{len(index) - 1} in order; {_AGAIN}")
    return ItemFrame(*(table[name].to_pylist() for name in columns[1:]))


def read_columns(root: Path) -> dict[str, list[Any]]:
    """All columns of the items table besides the item's index, in item order: texts, and what else the data have.

    A cell without a value is None. Raises DataError for a table that cannot be read.
    """
    table = read_item_table(root / ITEMS_FILE)
    return {name: table[name].to_pylist() for name in table.column_names if name != ITEM}


def read_item_table(path: Path) -> pa.Table:
    """All columns of an items table. Raises DataError when it cannot be read."""
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); {_AGAIN}") from error


def split_columns(path: Path) -> list[str]:
    """The columns that a split has. Raises DataError where one is missing."""
    names = pq.read_schema(path).names if path.is_file() else []
    columns = [USER, HISTORY, TARGET, TIME, *([CANDIDATES] if CANDIDATES in names else [])]
    if missing := [name for name in columns if name not in names]:
        raise DataError(f"{path} has no column {missing[0]!r}; {_AGAIN}")
    return columns


def _read_split(root: Path, num_items: int, name: str) -> Split:
    path = root / f"{name}.parquet"
    return split_of_table(path, _read_table(path, split_columns(path)), num_items)


def split_of_table(path: Path, table: pa.Table, num_items: int, first: int = 0) -> Split:
    """The rows of a split's table, or of a part of it whose first row has the number ``first``.

    Raises DataError for an empty history, items outside the catalog and wrong candidates.
    """
    has_candidates = CANDIDATES in table.column_names
    user, target, time = (table[name].to_numpy() for name in (USER, TARGET, TIME))
    history = _ragged(table[HISTORY])
    candidates = _ragged(table[CANDIDATES]) if has_candidates else None
    if len(history) and history.lengths.min() < 1:
        raise DataError(f"{path}: row {first + int(history.lengths.argmin())} has an empty history; {_AGAIN}")
    listed = target[:0] if candidates is None else candidates.flat
    for name, values in ((TARGET, target), (HISTORY, history.flat), (CANDIDATES, listed)):
        if len(values) and (values.min() < 0 or values.max() >= num_items):
            wrong = values.min() if values.min() < 0 else values.max()
            raise DataError(f"{path}: column {name!r} names item {wrong}, the catalog has 0..{num_items - 1}; {_AGAIN}")
    if candidates is not None:
        _check_candidates(path, target, candidates, first)
    return Split(user, history, target, time, candidates)


def _check_candidates(path: Path, target_N: np.ndarray, candidates: TokenRows, first: int) -> None:
    """DataError for a row whose target is missing from its candidates, or that holds a candidate twice."""
    for row, target in enumerate(target_N.tolist()):
        items = candidates[row]
        if target not in items or len(np.unique(items)) < len(items):
            what = "holds a candidate twice" if target in items else f"lacks its target {target}"
            raise DataError(f"{path}: column {CANDIDATES!r} of row {first + row} {what}; {_AGAIN}")


def _ragged(column: pa.ChunkedArray) -> TokenRows:
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # pyarrow before 23 keeps a chunked array of one or no chunk
        lists = lists.chunk(0) if lists.num_chunks else pa.array([], type=column.type)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return TokenRows(lists.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.int64), offsets - offsets[0])
