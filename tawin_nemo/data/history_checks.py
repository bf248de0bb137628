"""One pass over all histories before anything is computed: what would end a long job late is found first.

Memory does not grow with the number of users: repeated user ids are found by 64-bit hashes, sorted into files of
``MOST_HASHES`` each.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from tawin_nemo.data.history_files import BATCH_ROWS, SHOWN, HistoryFiles
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.log import progress

#: Hashes that are compared in memory at once.
MOST_HASHES = 1 << 22
#: Repeated hashes whose users are looked up.
LOOKED_UP = 1000


@dataclass(frozen=True)
class HistoryCounts:
    """What one pass over the histories found."""

    rows: int
    empty: int = 0  # histories without an item
    emptied: int = 0  # histories of which no item is in the catalog
    unknown: int = 0  # entries that name no item of the catalog
    with_unknown: int = 0  # histories that have such entries
    unknown_names: list[str] = field(default_factory=list)  # the first of them
    first_empty: str = ""  # where the first history without an item is


def count_histories(files: HistoryFiles) -> HistoryCounts:
    """Read all histories once. Raises DataError for rows that cannot be read, users without an id and repeated ones."""
    empty = emptied = unknown = with_unknown = 0
    names: list[str] = []
    first_empty = ""
    starts = range(0, files.rows, BATCH_ROWS)
    for begin in progress(starts, what="checking histories", size=lambda begin: min(BATCH_ROWS, files.rows - begin)):
        end = min(begin + BATCH_ROWS, files.rows)
        rows = files.read(begin, end)
        none_N = rows.items.lengths == 0
        emptied_N = none_N & (rows.unknown_N > 0)
        unknown, with_unknown = unknown + int(rows.unknown_N.sum()), with_unknown + int((rows.unknown_N > 0).sum())
        names = list(dict.fromkeys([*names, *rows.unknown_names]))[:SHOWN]
        empty_N = none_N & ~emptied_N
        empty, emptied = empty + int(empty_N.sum()), emptied + int(emptied_N.sum())
        if empty_N.any() and not first_empty:
            first_empty = files.where(begin + int(empty_N.argmax()))
    check_users(files)
    return HistoryCounts(files.rows, empty, emptied, unknown, with_unknown, names, first_empty)


def check_users(files: HistoryFiles) -> None:
    """Raises DataError for user ids that stand more than once, naming some with their rows."""
    with tempfile.TemporaryDirectory(prefix="tawin_users_") as folder:
        repeated = _repeated_hashes(files, Path(folder))
    if not len(repeated):
        return
    asked = pl.Series(repeated[:LOOKED_UP])
    rows: dict[str, list[int]] = {}
    for begin, users in files.users():
        hit = _hashes(users).is_in(asked).arg_true().to_list()
        for place in hit:
            rows.setdefault(users[place].as_py(), []).append(begin + place)
    several = {user: found for user, found in rows.items() if len(found) > 1}  # equal hashes of two users are no fault
    if not several:
        return
    user, (first, second, *_) = next(iter(several.items()))
    number = f"{len(several)}" if len(repeated) <= LOOKED_UP else f"more than {len(several)}"
    raise DataError(
        f"{files.where(second)}: user_id {user!r} stands also in row {files.where(first).partition('row ')[2]}; "
        f"{number} users have more than one history (the first: {', '.join(list(several)[:SHOWN])}); give each user one"
    )


def _repeated_hashes(files: HistoryFiles, folder: Path) -> np.ndarray:
    """Distinct hashes that at least two rows have. uint64."""
    buckets = -(-files.rows // MOST_HASHES)
    paths = [folder / str(bucket) for bucket in range(buckets)]
    found = [np.zeros(0, dtype=np.uint64)]
    if buckets <= 1:
        found.append(_repeated(np.concatenate([*found, *(_hashes(users).to_numpy() for _, users in files.users())])))
        return np.concatenate(found)
    for _, users in files.users():
        hash_N = _hashes(users).to_numpy()
        bucket_N = hash_N % np.uint64(buckets)
        for bucket in np.unique(bucket_N).tolist():
            with paths[bucket].open("ab") as file:
                file.write(hash_N[bucket_N == bucket].tobytes())
    found += [_repeated(np.fromfile(path, dtype=np.uint64)) for path in paths if path.is_file()]
    return np.concatenate(found)


def _repeated(hash_N: np.ndarray) -> np.ndarray:
    hash_N = np.sort(hash_N)
    return np.unique(hash_N[1:][hash_N[1:] == hash_N[:-1]])


def _hashes(users: pa.Array) -> pl.Series:
    return pl.Series(values=users).hash()
