"""Ready-made splits in CSV, as the repositories of MiniOneRec and of ReRe (D3, BIGRec) write them.

One file each for train, valid and test, with a row per sample: ``user_id``, ``history_item_id`` (a list in Python's
notation, oldest first), ``item_id``, and where the repository has them titles (``history_item_title``, ``item_title``),
external ids (ReRe: ``item_asins``, ``item_asin``) and codes (MiniOneRec: ``item_sid``). ``info/NAME*.txt`` lists items
that no sample names: title and item id, in MiniOneRec behind the codes, separated by tabs.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.config.schema import ColumnsConfig, PrepareConfig
from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION, PRICE, Split
from tawin_nemo.data_prep.dataset import Prepared, Step
from tawin_nemo.data_prep.item_texts import ready_made
from tawin_nemo.data_prep.ndjson import LINE, Problems
from tawin_nemo.data_prep.pipeline import user_table
from tawin_nemo.data_prep.table import check_share
from tawin_nemo.data_prep.tables import Table, frames, open_table
from tawin_nemo.types import EXTERNAL_ID, HISTORY, ITEM, SPLITS, TARGET, TITLE, USER, TokenRows
from tawin_nemo.util.errors import DataError

HISTORY_COLUMN, TARGET_COLUMN, USER_COLUMN = "history_item_id", "item_id", "user_id"
#: Further columns by role.
_OPTIONAL = {
    "titles": "history_item_title", TITLE: "item_title", "ids": "item_asins", "id": "item_asin", "codes": "item_sid",
    "all_codes": "history_item_sid",
}  # fmt: skip
#: Words for a split in names of files and folders.
_WORDS = {"train": ("train",), "valid": ("valid", "val", "validation", "eval"), "test": ("test",)}


@dataclass
class _Items:
    """What the rows say about items, by their ``item_id``."""

    titles: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)

    def add(self, column: dict[str, str], items: list[str], texts: list[str]) -> None:
        if len(items) == len(texts):
            column.update((item, text) for item, text in zip(items, texts, strict=True) if text)


@dataclass(frozen=True)
class _Rows:
    users: list[str]
    histories: list[list[str]]
    targets: list[str]


def find(root: Path, prepare: PrepareConfig) -> list[Path]:
    """The files of train, valid and test, and of the items if there is one. Raises DataError where one is missing."""
    if prepare.reviews:
        train = root / prepare.reviews
        if not train.is_file() or "train" not in prepare.reviews:
            raise DataError(f"prepare.reviews={prepare.reviews!r} must be the CSV file of the split train below {root}")
    else:
        trains = _files(root, "train")
        if len(trains) != 1:
            names = ", ".join(str(path.relative_to(root)) for path in trains) or "none"
            raise DataError(f"set prepare.reviews to the CSV of train in {root}; candidates: {names}")
        train = trains[0]
    relative = str(train.relative_to(root))
    splits = [train]
    for split in SPLITS[1:]:
        paths = [root / relative.replace("train", word) for word in _WORDS[split]]
        paths = [path for path in paths if path.is_file()] or _files(root, split)
        if len(paths) != 1:
            raise DataError(f"{root} has {len(paths)} CSV files of the split {split} beside {relative}; it needs one")
        splits.append(paths[0])
    return splits + _info(root, train, prepare)


def found_in(root: Path) -> bool:
    """Whether some CSV file of the split train in ``root`` has this layout."""
    return bool(_files(root, "train"))


def _files(root: Path, split: str) -> list[Path]:
    paths = {path for word in _WORDS[split] for path in (*root.glob(f"{word}/*.csv"), *root.glob(f"*{word}*.csv"))}
    return sorted(path for path in paths if _has_layout(path))


def _has_layout(path: Path) -> bool:
    try:
        table = open_table(path, ColumnsConfig())
    except DataError:
        return False
    return table is not None and {HISTORY_COLUMN, TARGET_COLUMN} <= set(table.columns)


def _info(root: Path, train: Path, prepare: PrepareConfig) -> list[Path]:
    if prepare.metadata:
        path = root / prepare.metadata
        if not path.is_file():
            raise DataError(f"prepare.metadata={prepare.metadata!r}: there is no file {path}")
        return [path]
    return [path for path in [root / "info" / f"{train.stem}.txt"] if path.is_file()]


def read(name: str, files: list[Path], prepare: PrepareConfig, max_history: int) -> Prepared:
    """Splits as they are; time = row number over train, valid and test. Items are ordered by their ``item_id``.

    Rows without history or target are skipped and counted; more than 10 % of them raise DataError, as files without
    the columns do.
    """
    items, parts, problems = _Items(), {}, []
    for split, path in zip(SPLITS, files, strict=False):
        problems.append(Problems(path))
        parts[split] = _read_rows(path, items, problems[-1])
        problems[-1].report()
        check_share(problems[-1])
        if not parts[split].users:
            raise DataError(f"{path} has no rows; every split needs at least one")
    listed = _read_info(files[3], items) if len(files) > 3 else []
    ids = sorted({*listed, *items.titles, *_named(parts)}, key=lambda item: (not item.isdigit(), item.zfill(20)))
    index = {item: place for place, item in enumerate(ids)}
    users = sorted({user for rows in parts.values() for user in rows.users})
    user_index = {user: place for place, user in enumerate(users)}
    splits, first = {}, 0
    for split, rows in parts.items():
        splits[split] = _split(rows, index, user_index, first, max_history)
        first += len(rows.users)
    frame = ready_made(_frame(ids, items), prepare, files[0].parent.name)
    longest = max(int(samples.history.lengths.max()) for samples in splits.values())
    return Prepared(
        name, "split_csv", frame, splits, min(max_history, longest),
        [Step("samples as imported", first, len(users), len(ids))],
        problems={
            f"{split} {found.path.name}": found.as_dict() for split, found in zip(SPLITS, problems, strict=True)
        },
        extra_files=_index_file(name, ids, items), users=user_table(pl.Series(users, dtype=pl.String)),
        has_titles=bool(items.titles),
    )  # fmt: skip


def _named(parts: dict[str, _Rows]) -> Iterator[str]:
    for rows in parts.values():
        yield from rows.targets
        for history in rows.histories:
            yield from history


def _read_rows(path: Path, items: _Items, problems: Problems) -> _Rows:
    table = open_table(path, ColumnsConfig())
    columns = {USER: USER_COLUMN, HISTORY: HISTORY_COLUMN, TARGET: TARGET_COLUMN}
    if table is None or not set(columns.values()) <= set(table.columns):
        raise DataError(f"{path} must be CSV with the columns {', '.join(columns.values())}")
    roles = columns | {role: column for role, column in _OPTIONAL.items() if column in table.columns}
    rows = _Rows([], [], [])
    for row in _dictionaries(table, roles, problems):
        history, target = as_list(row[HISTORY]), _whole(row[TARGET])
        if not row[USER] or not target or not history:
            problems.add("no user, history or target", row[LINE])
            continue
        rows.users.append(row[USER])
        rows.histories.append(history)
        rows.targets.append(target)
        items.add(items.titles, history, as_list(row.get("titles")))
        items.add(items.titles, [target], [row.get(TITLE) or ""])
        items.add(items.names, history, as_list(row.get("ids")))
        items.add(items.names, [target], [row.get("id") or ""])
        items.add(items.codes, history, as_list(row.get("all_codes")))
        items.add(items.codes, [target], [row.get("codes") or ""])
    return rows


def _dictionaries(table: Table, roles: dict[str, str], problems: Problems) -> Iterator[dict[str, Any]]:
    for frame in frames(table, roles, problems):
        yield from frame.iter_rows(named=True)


def as_list(text: str | None) -> list[str]:
    """The entries of a list in JSON or Python's notation; none for a text that is no list.

    >>> as_list("['a', 7]"), as_list("[117.0]"), as_list("[]"), as_list("x")
    (['a', '7'], ['117'], [], [])
    """
    if not text:
        return []
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return []
    return [_whole(str(part)) for part in value] if isinstance(value, list) else []


def _whole(text: str | None) -> str:
    """An id as text; ``117.0``, pandas' way of writing an integer, is ``117``."""
    return re.sub(r"^(\d+)\.0$", r"\1", text or "")


def _read_info(path: Path, items: _Items) -> list[str]:
    """Item ids of the item list, whose titles and codes are added. Raises DataError for a line without a tab."""
    ids = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) < 2:
            raise DataError(f"{path} line {number}: expected a title and an item id, or codes, title and item id")
        item = _whole(parts[-1].strip())
        items.titles.setdefault(item, parts[-2].strip())
        if len(parts) > 2:
            items.codes.setdefault(item, parts[0].strip())
        ids.append(item)
    return ids


def _frame(ids: list[str], items: _Items) -> pl.DataFrame:
    names = [items.names.get(item, item) for item in ids]
    columns = {
        ITEM: range(len(ids)),
        EXTERNAL_ID: names if len(set(names)) == len(names) else ids,
        TITLE: [items.titles.get(item, item).strip() or item for item in ids],
    } | {key: [""] * len(ids) for key in (DESCRIPTION, BRAND, CATEGORY, PRICE)}
    return pl.DataFrame(columns, schema_overrides={ITEM: pl.Int64})


def _index_file(name: str, ids: list[str], items: _Items) -> dict[str, bytes]:
    """``NAME.index.json`` with the codes of the CSV, if each item has some; its keys are the external ids."""
    codes = {item: re.findall(r"<[^<>]+>", items.codes.get(item, "")) for item in ids}
    if not all(codes.values()):
        return {}
    names = _frame(ids, items)[EXTERNAL_ID].to_list()
    content = {external: codes[item] for external, item in zip(names, ids, strict=True)}
    return {f"{name}.index.json": json.dumps(content, indent=1).encode()}


def _split(rows: _Rows, index: dict[str, int], users: dict[str, int], first: int, max_history: int) -> Split:
    return Split(
        np.array([users[user] for user in rows.users], dtype=np.int64),
        TokenRows.from_lists([[index[item] for item in history[-max_history:]] for history in rows.histories]),
        np.array([index[item] for item in rows.targets], dtype=np.int64),
        np.arange(first, first + len(rows.users), dtype=np.int64),
    )
