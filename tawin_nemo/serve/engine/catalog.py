"""The catalog in use and how it changes: items join and leave, numbers stay.

Items are numbered in the order in which they came and keep their number for the life of the server. An item that was
removed is not recommended any more but may still stand in a history. Every change makes a new catalog with the next
version; the old one goes on serving the requests that began with it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tawin_nemo.catalog.items import Catalog, fingerprint
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.data.catalog_builder import answer_paths
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError, DataError


@dataclass(frozen=True)
class NewItem:
    """``codes``: its semantic ID, where the catalog is written in those."""

    external_id: str
    title: str
    codes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Writing:
    """How items and prompts become tokens; the limits on a history's items and tokens are those of training."""

    tokenizer: Tokenizer
    template: Template
    max_history: int
    max_prompt_tokens: int

    def text_of(self, item: NewItem) -> str:
        """What stands for the item in prompts and answers. Raises CatalogError for codes where titles are used, or
        the other way round."""
        kind = self.template.kind
        if bool(item.codes) != (kind == "sid"):
            wants = "its codes" if kind == "sid" else "no codes"
            raise CatalogError(f"item {item.external_id!r}: a catalog of kind {kind} wants {wants}")
        return "".join(item.codes) if item.codes else item.title


@dataclass(frozen=True, eq=False)
class ServedCatalog:
    """I items ever known, of which some are live; the trie holds the live ones only."""

    version: int
    writing: Writing
    titles: list[str]
    external_ids: list[str]
    texts: list[str]
    paths: TokenRows  # [I]
    live_I: np.ndarray  # bool
    trie: TokenTrie  # over the live items

    @classmethod
    def of(cls, catalog: Catalog, texts: Sequence[str], writing: Writing) -> ServedCatalog:
        """Version 1, from the catalog that the model was trained with. Raises CatalogError for ids named twice."""
        made = cls(
            1, writing, list(catalog.titles), list(catalog.external_ids), list(texts), catalog.paths,
            np.ones(len(catalog), dtype=bool), catalog.trie,
        )  # fmt: skip
        if len(made.number_of) < len(made.external_ids):
            raise CatalogError("the catalog names an external id twice; every item needs its own")
        return made

    def replaced(self, items: Sequence[NewItem], version: int) -> ServedCatalog:
        """The catalog of these items and no others; unchanged ones keep their numbers, or get them back."""
        wanted = {item.external_id: item for item in items}
        if len(wanted) < len(items):
            raise CatalogError(f"items are named twice: {_few(_repeated([item.external_id for item in items]))}")
        same = {name for name, item in wanted.items() if self._is_live(name) and self._is_written_so(item)}
        live = [self.external_ids[number] for number in self.number_J.tolist()]
        new = [item for item in items if item.external_id not in same]
        return self.changed(new, [name for name in live if name not in same], version)

    def _is_written_so(self, item: NewItem) -> bool:
        number = self.number_of[item.external_id]
        return self.titles[number] == item.title and self.texts[number] == self.writing.text_of(item)

    def changed(self, add: Sequence[NewItem], remove: Sequence[str], version: int) -> ServedCatalog:
        """The catalog with items added and others (external ids) taken out.

        An item that was removed before and comes back as it was has its number again, so that a catalog whose items
        come and go does not grow; written differently it gets a new one. Raises CatalogError for an id that is live
        already, an id to remove that is not, an id named twice, and as ``answer_paths`` and ``TokenTrie`` do.
        """
        live_I = self.live_I.copy()
        unknown = [name for name in remove if not self._is_live(name)]
        if unknown:
            raise CatalogError(f"cannot remove items that are not in the catalog: {_few(unknown)}")
        live_I[[self.number_of[name] for name in remove]] = False
        gone = set(remove)
        there = [item.external_id for item in add if self._is_live(item.external_id) and item.external_id not in gone]
        if there:
            raise CatalogError(f"items are in the catalog already: {_few(there)}; remove them in the same call")
        names = [item.external_id for item in add]
        if len(set(names)) < len(names):
            raise CatalogError(f"items are named twice: {_few(_repeated(names))}")
        back = {item.external_id for item in add if item.external_id in self.number_of and self._is_written_so(item)}
        live_I[[self.number_of[name] for name in back]] = True
        return self._with([item for item in add if item.external_id not in back], live_I, version)

    def _with(self, add: Sequence[NewItem], live_I: np.ndarray, version: int) -> ServedCatalog:
        names, writing, paths = [item.external_id for item in add], self.writing, self.paths
        texts = [writing.text_of(item) for item in add]
        if add:
            try:
                new = answer_paths(texts, writing.tokenizer, writing.template)
            except DataError as error:  # a code that the model never saw
                raise CatalogError(str(error)) from error
            ends = np.concatenate([paths.offsets, paths.offsets[-1] + new.offsets[1:]])
            paths = TokenRows(np.concatenate([paths.flat, new.flat]), ends)
            live_I = np.concatenate([live_I, np.ones(len(add), dtype=bool)])
        texts = [*self.texts, *texts]
        number_J = np.flatnonzero(live_I)
        if not len(number_J):
            raise CatalogError("a catalog without items cannot be served; keep at least one")
        trie = TokenTrie.from_paths(paths.take(number_J), names=[texts[number] for number in number_J])
        return ServedCatalog(
            version, writing, [*self.titles, *(item.title for item in add)], [*self.external_ids, *names], texts, paths,
            live_I, trie,
        )  # fmt: skip

    def _is_live(self, external_id: str) -> bool:
        number = self.number_of.get(external_id)
        return number is not None and bool(self.live_I[number])

    # -- names and numbers --------------------------------------------------------------------------------------
    @cached_property
    def number_of(self) -> dict[str, int]:
        """External id -> item number; of an id that came back the newest."""
        return {name: number for number, name in enumerate(self.external_ids)}

    @cached_property
    def titled(self) -> dict[str, int]:
        """Title -> item number: a live item before a removed one, then the first."""
        order = [*np.flatnonzero(~self.live_I)[::-1].tolist(), *np.flatnonzero(self.live_I)[::-1].tolist()]
        return {self.titles[number]: number for number in order}

    @cached_property
    def number_J(self) -> np.ndarray:
        """Item number of every item of the trie."""
        return np.flatnonzero(self.live_I)

    @cached_property
    def place_I(self) -> np.ndarray:
        """Item of the trie of every item number, -1 for a removed one."""
        place_I = np.full(len(self.live_I), -1, dtype=np.int64)
        place_I[self.number_J] = np.arange(len(self.number_J))
        return place_I

    @property
    def trie_paths(self) -> TokenRows:
        """The paths of the live items."""
        return self.paths.take(self.number_J)

    @cached_property
    def search_keys(self) -> list[str]:
        """Titles of the live items as the search compares them."""
        return [self.titles[number].casefold() for number in self.number_J]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids, titles and token paths of the live items."""
        live = self.number_J.tolist()
        ids, titles = ([names[number] for number in live] for names in (self.external_ids, self.titles))
        return fingerprint(ids, titles, self.trie_paths)

    def prompt(self, history: Sequence[int]) -> TokenRows:
        """The prompt of a history of item numbers, oldest first, shortened as ``data.samples.encode_split`` does.

        Raises DataError for a single item that does not fit into a prompt.
        """
        newest = list(history)[-self.writing.max_history :]
        while True:
            tokens = self.tokens(self.writing.template.prompt([self.texts[number] for number in newest]))
            if len(tokens.flat) <= self.writing.max_prompt_tokens:
                return tokens
            if len(newest) <= 1:
                raise DataError(
                    f"the newest item alone makes a prompt of {len(tokens.flat)} tokens; this model was trained with "
                    f"at most {self.writing.max_prompt_tokens}"
                )
            newest = newest[1:]

    def tokens(self, text: str) -> TokenRows:
        """A text as one row. Raises DataError for text that the tokenizer cannot express."""
        return self.writing.tokenizer.encode_batch([text])

    def warm(self) -> None:
        """Make what requests would otherwise wait for."""
        _ = self.number_of, self.titled, self.place_I, self.search_keys, self.trie.spans, self.trie.tensors()
        _ = self.trie.num_leaves, self.trie.max_depth, self.trie.decision_depth, self.trie.max_token, self.fingerprint

    def validate(self, *, vocab: int, positions: int) -> None:
        """Raises CatalogError when a model of this size cannot answer with every item."""
        if self.trie.max_token >= vocab:
            raise CatalogError(f"the catalog uses token {self.trie.max_token}, the model has {vocab} tokens")
        empty = int(self.prompt([]).lengths[0])
        if empty + self.trie.max_depth > positions:
            raise CatalogError(
                f"the longest item has {self.trie.max_depth} tokens, the shortest prompt {empty}, and the model takes "
                f"{positions} together; shorten the longest titles"
            )


def read_items(path: Path) -> list[NewItem]:
    """Items of a JSON lines file. Raises CatalogError that names the line."""
    items = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path} cannot be read as a catalog: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            item = NewItem(record["external_id"], record["title"], tuple(record.get("codes", ())))
            if not all(isinstance(word, str) and word for word in (item.external_id, item.title, *item.codes)):
                raise TypeError("external_id, title and codes are texts that are not empty")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CatalogError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
        items.append(item)
    if not items:
        raise CatalogError(f"{path} holds no items")
    return items


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _few(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(map(repr, names[:shown])) + (f" and {len(names) - shown} more" if len(names) > shown else "")
