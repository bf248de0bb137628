"""Filters over the fields of items (brand, category, price ...): which items of a catalog have the asked values.

A filter maps fields to values: an item must have one of the values in every field. Cells that are lists (an item in
several categories) hold each of their values. The fields are the columns of the prepared data set's items table, and
titles and external ids as they are served. An item that was added to the catalog under an id that the table does not
have has no other fields.

I: item numbers; R: rows of the table; J: items of the trie; M: items that a filter allows.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tawin_nemo.data.interactions import ITEMS_FILE, read_item_table
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.run.exported import COLUMNS_FILE
from tawin_nemo.run.world import World
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.types import EXTERNAL_ID, ITEM, TITLE
from tawin_nemo.util.errors import UserError

Value = str | int | float | bool
Values = Mapping[str, Value | Sequence[Value]]
#: A filter in a form that does not depend on the order in which it was written.
Key = tuple[tuple[str, tuple[Value, ...]], ...]
_SHOWN = 5


class UnknownFilter(UserError):
    """A filter that names a field that items do not have, or a value that no item has. ``code``: which of both."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, eq=False)
class ItemFields:
    """The items table; row r belongs to item number r of the catalog that the server started with."""

    table: pa.Table = field(default_factory=lambda: pa.table({}))

    @classmethod
    def of(cls, table: pa.Table, external_ids: Sequence[str]) -> ItemFields:
        """The rows of ``table`` in the order of ``external_ids``; an id that it lacks gets a row without values."""
        row_of = {name: row for row, name in enumerate(table[EXTERNAL_ID].to_pylist())}
        rows = pa.array([row_of.get(name) for name in external_ids], type=pa.int64())
        known = [name for name, kind in zip(table.column_names, table.schema.types, strict=True) if _holds(kind)]
        return cls(table.select([name for name in known if name not in (ITEM, EXTERNAL_ID, TITLE)]).take(rows))

    @property
    def names(self) -> list[str]:
        """The fields that a filter may name."""
        return sorted([EXTERNAL_ID, TITLE, *self.table.column_names])

    def matching(self, catalog: ServedCatalog, key: Key) -> np.ndarray:
        """Bool [J]: the items of the catalog's trie that a filter allows. Raises UnknownFilter."""
        match_J = np.ones(len(catalog.number_J), dtype=bool)
        for name, values in key:
            if name in (EXTERNAL_ID, TITLE):
                texts = catalog.external_ids if name == EXTERNAL_ID else catalog.titles
                match_I = self._having(name, pa.array(texts, type=pa.string()), values)
            elif name in self.table.column_names:
                match_R = self._having(name, _whole(self.table[name]), values)
                row_I = _rows(catalog, len(match_R))
                match_I = np.append(match_R, False)[row_I]
            else:
                raise UnknownFilter(
                    f"filter: items have no field {name[:80]!r}; they have {', '.join(self.names)}", "unknown_field"
                )
            match_J &= match_I[catalog.number_J]
        return match_J

    def parsed(self, name: str, text: str) -> Value:
        """``text`` as a value of field ``name``: a number or truth value where the field holds such.

        Text that is none stays text, for which ``matching`` names the field's values.
        """
        kind = _cell(self.table.schema.field(name).type) if name in self.table.column_names else pa.string()
        if pa.types.is_boolean(kind):
            return {"true": True, "false": False}.get(text.lower(), text)
        if _is_number(kind):
            with contextlib.suppress(ValueError):
                return float(text)
        return text

    def _having(self, name: str, column: pa.Array, values: tuple[Value, ...]) -> np.ndarray:
        """Bool [R]: the rows of a column that hold one of the values. Raises UnknownFilter for a value in no row."""
        rows, cells = np.arange(len(column)), column
        if _is_list(column.type):
            rows, cells = pc.list_parent_indices(column).to_numpy(), pc.list_flatten(column)
        kind, types = _compared(_cell(column.type))
        wrong = [value for value in values if not _fits(value, types)]
        found = cells.cast(kind, safe=False)
        if not wrong:
            hit = pc.is_in(found, value_set=pa.array(values, type=kind)).to_numpy(zero_copy_only=False)
            there = set(pc.unique(found.filter(pa.array(hit))).to_pylist())
            wrong = [value for value in values if value not in there]
        if wrong:
            shown = ", ".join(repr(value)[:80] for value in pc.unique(found.drop_null())[:_SHOWN].to_pylist())
            raise UnknownFilter(
                f"filter: no item has {name}={wrong[0]!r:.80} (values are {shown or 'none'} ...); fields: "
                f"{', '.join(self.names)}",
                "unknown_value",
            )
        match_R = np.zeros(len(column), dtype=bool)
        match_R[rows[hit]] = True
        return match_R


def fields_of(world: World, external_ids: Sequence[str]) -> ItemFields:
    """The fields of items, by their numbers: of the data set or of an export with columns, else only ids and titles."""
    root, export = world.dataset.root, world.export
    files = [file for file in (root and root / ITEMS_FILE, export and export / COLUMNS_FILE) if file and file.is_file()]
    return ItemFields.of(read_item_table(files[0]), external_ids) if files else ItemFields()


def _fits(value: Value, types: tuple[type, ...]) -> bool:
    """Whether a field of these types can hold the value; JSON may hold half an emoji, which is no text."""
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types) and (not isinstance(value, str) or value.isascii() or _is_text(value))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)


def _rows(catalog: ServedCatalog, rows: int) -> np.ndarray:
    """[I] the row of every item number; ``rows`` (one behind the last) for an item that the table does not have."""
    later = [catalog.first_number_of[name] for name in catalog.external_ids[rows:]]
    return np.minimum(np.concatenate([np.arange(rows), np.array(later, dtype=np.int64)]), rows)[: len(catalog.titles)]


def _holds(kind: pa.DataType) -> bool:
    """Whether a filter can compare cells of this type: texts, numbers, truth values, and lists of them."""
    cell = _cell(kind)
    text = pa.types.is_string(cell) or pa.types.is_large_string(cell)
    return bool(text or pa.types.is_boolean(cell) or _is_number(cell))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _cell(kind: pa.DataType) -> pa.DataType:
    """The type of one value: of a list's elements, behind a dictionary."""
    kind = kind.value_type if _is_list(kind) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _compared(cell: pa.DataType) -> tuple[pa.DataType, tuple[type, ...]]:
    """The type in which values of a field are compared, and the types of Python that it takes."""
    if pa.types.is_boolean(cell):
        return pa.bool_(), (bool,)
    return (pa.float64(), (int, float)) if _is_number(cell) else (pa.string(), (str,))


def key_of(values: Values) -> Key:
    """The canonical form of a filter."""

    def listed(value: Value | Sequence[Value]) -> tuple[Value, ...]:
        several = [value] if isinstance(value, str | int | float) else list(value)
        distinct = {(type(one).__name__, str(one)): one for one in several}
        return tuple(distinct[name] for name in sorted(distinct))

    return tuple(sorted((name, listed(value)) for name, value in values.items()))


@dataclass(frozen=True, eq=False)
class Match:
    """The items of a catalog's trie that a filter allows."""

    trie_item_M: np.ndarray  # ascending
    filter: ItemFilter
    paths: int  # distinct token paths of these items

    @property
    def nbytes(self) -> int:
        return int(self.trie_item_M.nbytes + self.filter.rank_M.nbytes)


class MatchCache:
    """Evaluates each distinct filter once per catalog. Thread-safe.

    What was used longest ago is dropped beyond ``max_filters`` or ``max_bytes``; the newest is always kept.
    """

    def __init__(self, fields: ItemFields | None = None, *, max_filters: int = 256, max_bytes: int = 1 << 26) -> None:
        self.fields, self.evaluations = fields or ItemFields(), 0
        self._max_filters, self._max_bytes = max_filters, max_bytes
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, Key], Future[Match]] = OrderedDict()

    def match(self, catalog: ServedCatalog, values: Values) -> Match:
        """The items that a filter allows. Raises UnknownFilter."""
        key = (catalog.version, key_of(values))
        with self._lock:
            future = self._known.get(key)
            mine = future is None
            if future is None:
                future = self._known[key] = Future()
            self._known.move_to_end(key)
        if mine:
            try:
                future.set_result(self._evaluate(catalog, key[1]))
            except BaseException as error:  # also for those who wait for the same
                future.set_exception(error)
                with self._lock:
                    self._known.pop(key, None)
            self._drop()
        return future.result()

    def _evaluate(self, catalog: ServedCatalog, key: Key) -> Match:
        match_J = self.fields.matching(catalog, key)
        self.evaluations += 1
        items, trie = np.flatnonzero(match_J), catalog.trie
        few = 2 * len(items) <= len(match_J)
        chosen = ItemFilter.only(trie, items) if few else ItemFilter.without(trie, np.flatnonzero(~match_J))
        return Match(items, chosen, chosen.allowed_paths(trie))

    def _drop(self) -> None:
        with self._lock:
            done = {
                key: future.result().nbytes
                for key, future in self._known.items()
                if future.done() and future.exception() is None
            }
            total = sum(done.values())
            for key in list(done)[:-1]:
                if len(self._known) <= self._max_filters and total <= self._max_bytes:
                    return
                del self._known[key]
                total -= done[key]
