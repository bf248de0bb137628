"""The served catalog and its changes: items are added and removed, item numbers are stable.

Items are numbered in the order in which they were added and keep their number for the life of the server. A removed
item is not recommended any more but may still occur in a history. Every change makes a new, immutable catalog with the
next version; requests that started with an older catalog finish with it. I: all item numbers; J: live items, in the
order of the trie's items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tawin_nemo.baselines.assist import AuxiliaryRecommender
from tawin_nemo.catalog.items import Catalog, fingerprint
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.data.catalog_builder import answer_paths
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.special_tokens import encode_prompts
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.rollout.assist import Assist
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError, DataError


@dataclass(frozen=True)
class NewItem:
    """An item to add. ``codes``: its semantic ID, for a catalog of kind ``sid``; empty for a catalog of titles."""

    external_id: str
    title: str
    codes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptFormat:
    """How items and histories become tokens; histories are cut to the numbers of items and tokens used in training.

    ``generation`` counts the published versions that a server has followed: catalogs of one generation have the same
    tokenizer and are searched with that generation's weights. ``vocab_size`` and ``max_positions`` are those of its
    model; 0: of the model that the server started with.
    """

    tokenizer: Tokenizer
    template: Template
    max_history: int
    max_prompt_tokens: int
    generation: int = 0
    vocab_size: int = 0
    max_positions: int = 0

    def text_of(self, item: NewItem) -> str:
        """The item's text in prompts and answers: its codes or its title.

        Raises CatalogError for an item without codes in a catalog of kind ``sid``, or with codes in one of titles.
        """
        kind = self.template.kind
        if bool(item.codes) != (kind == "sid"):
            wants = "its codes" if kind == "sid" else "no codes"
            raise CatalogError(f"item {item.external_id!r}: a catalog of kind {kind} wants {wants}")
        return "".join(item.codes) if item.codes else item.title


@dataclass(frozen=True, eq=False)
class ServedCatalog:
    """All I items that were ever added, and a trie of those that are live."""

    version: int
    prompt_format: PromptFormat
    titles: list[str]
    external_ids: list[str]
    texts: list[str]
    paths: TokenRows  # [I]
    live_I: np.ndarray  # bool
    trie: TokenTrie  # over the live items
    recommender: AuxiliaryRecommender | None = None  # joins searches for histories (``rollout.assist``)

    @classmethod
    def of(
        cls, catalog: Catalog, texts: Sequence[str], prompt_format: PromptFormat,
        recommender: AuxiliaryRecommender | None = None,
    ) -> ServedCatalog:  # fmt: skip
        """Version 1: the catalog that the model was trained with. Raises CatalogError for repeated external ids."""
        made = cls(
            1, prompt_format, list(catalog.titles), list(catalog.external_ids), list(texts), catalog.paths,
            np.ones(len(catalog), dtype=bool), catalog.trie, recommender,
        )  # fmt: skip
        if len(made.number_of) < len(made.external_ids):
            raise CatalogError("the catalog names an external id twice; every item needs its own")
        return made

    def replaced(self, items: Sequence[NewItem], version: int) -> ServedCatalog:
        """A catalog of exactly these items; unchanged items keep their numbers, and returning ones get theirs back.

        Raises CatalogError for an item that is named twice, and as ``changed`` does.
        """
        wanted = {item.external_id: item for item in items}
        if len(wanted) < len(items):
            raise CatalogError(f"items are named twice: {_few(_repeated([item.external_id for item in items]))}")
        same = {name for name, item in wanted.items() if self._is_live(name) and self._is_unchanged(item)}
        live = [self.external_ids[number] for number in self.number_J.tolist()]
        new = [item for item in items if item.external_id not in same]
        return self.changed(new, [name for name in live if name not in same], version)

    def _is_unchanged(self, item: NewItem) -> bool:
        number = self.number_of[item.external_id]
        return self.titles[number] == item.title and self.texts[number] == self.prompt_format.text_of(item)

    def changed(self, add: Sequence[NewItem], remove: Sequence[str], version: int) -> ServedCatalog:
        """A catalog with ``add`` added and ``remove`` (external ids) removed.

        A removed item that is added again unchanged gets its old number, so that a catalog whose items come and go does
        not grow; with another title or other codes it gets a new number. Raises CatalogError for an id to add that is
        live, an id to remove that is not, an id named twice, and as ``answer_paths`` and ``TokenTrie`` do.
        """
        live_I = self.live_I.copy()
        unknown = [name for name in remove if not self._is_live(name)]
        if unknown:
            raise CatalogError(f"cannot remove items that are not in the catalog: {_few(unknown)}")
        live_I[[self.number_of[name] for name in remove]] = False
        removed = set(remove)
        live = [name for name in (item.external_id for item in add) if self._is_live(name) and name not in removed]
        if live:
            raise CatalogError(f"items are in the catalog already: {_few(live)}; remove them in the same call")
        names = [item.external_id for item in add]
        if len(set(names)) < len(names):
            raise CatalogError(f"items are named twice: {_few(_repeated(names))}")
        returning = {
            item.external_id for item in add if item.external_id in self.number_of and self._is_unchanged(item)
        }
        live_I[[self.number_of[name] for name in returning]] = True
        return self._with([item for item in add if item.external_id not in returning], live_I, version)

    def _with(self, add: Sequence[NewItem], live_I: np.ndarray, version: int) -> ServedCatalog:
        names, prompt_format, paths = [item.external_id for item in add], self.prompt_format, self.paths
        texts = [prompt_format.text_of(item) for item in add]
        if add:
            try:
                new = answer_paths(texts, prompt_format.tokenizer, prompt_format.template)
            except DataError as error:  # a code without tokens
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
            version, prompt_format, [*self.titles, *(item.title for item in add)], [*self.external_ids, *names], texts,
            paths, live_I, trie, self.recommender,
        )  # fmt: skip

    def _is_live(self, external_id: str) -> bool:
        number = self.number_of.get(external_id)
        return number is not None and bool(self.live_I[number])

    # -- names and numbers --------------------------------------------------------------------------------------
    @cached_property
    def number_of(self) -> dict[str, int]:
        """External id -> item number; the newest number of an id that has several."""
        return {name: number for number, name in enumerate(self.external_ids)}

    @cached_property
    def first_number_of(self) -> dict[str, int]:
        """External id -> the first item number of that id, whose columns of the items table a template may show."""
        pairs = zip(reversed(self.external_ids), range(len(self.external_ids) - 1, -1, -1), strict=True)
        return dict(pairs)

    @cached_property
    def number_of_title(self) -> dict[str, int]:
        """Title -> item number; of items with one title the first live one, or else the first."""
        order = [*np.flatnonzero(~self.live_I)[::-1].tolist(), *np.flatnonzero(self.live_I)[::-1].tolist()]
        return {self.titles[number]: number for number in order}

    @cached_property
    def number_J(self) -> np.ndarray:
        """The item number of each item of the trie."""
        return np.flatnonzero(self.live_I)

    @cached_property
    def trie_item_I(self) -> np.ndarray:
        """The trie's item for each item number; -1 for a removed item."""
        trie_item_I = np.full(len(self.live_I), -1, dtype=np.int64)
        trie_item_I[self.number_J] = np.arange(len(self.number_J))
        return trie_item_I

    @property
    def trie_paths(self) -> TokenRows:
        """The token paths of the live items, in the order of the trie's items."""
        return self.paths.take(self.number_J)

    @cached_property
    def search_keys(self) -> list[str]:
        """The live items' titles in folded case, for ``/v1/items/search``."""
        return [self.titles[number].casefold() for number in self.number_J]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the ids, titles and token paths of the live items."""
        live = self.number_J.tolist()
        ids, titles = ([names[number] for number in live] for names in (self.external_ids, self.titles))
        return fingerprint(ids, titles, self.trie_paths)

    @cached_property
    def auxiliary_item_I(self) -> np.ndarray:
        """The item of ``recommender`` for each item number, by external id; -1 where it knows none."""
        assert self.recommender is not None
        return self.recommender.items_of(self.external_ids)

    def assist(self, histories: Sequence[Sequence[int]]) -> Assist | None:
        """The auxiliary recommender's part in the searches for B histories of item numbers, oldest first.

        It reads the newest ``max_history`` items, of which those that it does not know are skipped. None if it has no
        part in any of them.
        """
        if self.recommender is None or not any(histories):
            return None
        item_I, newest = self.auxiliary_item_I, self.prompt_format.max_history
        rows = [item_I[np.asarray(history[-newest:], dtype=np.int64)] for history in histories]
        return self.recommender.assist(self.trie, [row[row >= 0] for row in rows], item_I[self.number_J])

    def prompt(self, history: Sequence[int]) -> TokenRows:
        """The prompt [1 row] of a history of item numbers, oldest first, cut as ``data.samples.encode_split`` cuts it.

        Items without a text (``numbering``) are skipped. Raises DataError for a single item that does not fit into a
        prompt.
        """
        newest = [number for number in history if self.texts[number]][-self.prompt_format.max_history :]
        while True:
            table = [self.first_number_of[self.external_ids[number]] for number in newest]
            tokens = self.tokens(self.prompt_format.template.prompt_of(table, [self.texts[n] for n in newest]))
            if len(tokens.flat) <= self.prompt_format.max_prompt_tokens:
                return tokens
            if len(newest) <= 1:
                raise DataError(
                    f"the newest item alone makes a prompt of {len(tokens.flat)} tokens; this model was trained with "
                    f"at most {self.prompt_format.max_prompt_tokens}"
                )
            newest = newest[1:]

    def tokens(self, text: str) -> TokenRows:
        """The tokens of a prompt as one row. Raises DataError for text that the tokenizer cannot express."""
        return encode_prompts(self.prompt_format.tokenizer, [text])

    def warm(self) -> None:
        """Compute all cached properties now, so that no request waits for them."""
        _ = (
            self.number_of,
            self.first_number_of,
            self.number_of_title,
            self.trie_item_I,
            self.search_keys,
            self.trie.spans,
            self.trie.tensors(),
        )
        _ = None if self.recommender is None else self.auxiliary_item_I
        _ = self.trie.num_leaves, self.trie.max_depth, self.trie.decision_depth, self.trie.max_token, self.fingerprint

    def validate(self, *, vocab: int, positions: int) -> None:
        """Raise CatalogError unless a model with this vocabulary and these positions can generate every item."""
        if self.trie.max_token >= vocab:
            raise CatalogError(f"the catalog uses token {self.trie.max_token}, the model has {vocab} tokens")
        empty = int(self.prompt([]).lengths[0])
        if empty + self.trie.max_depth > positions:
            raise CatalogError(
                f"the longest item has {self.trie.max_depth} tokens, the shortest prompt {empty}, and the model takes "
                f"{positions} together; shorten the longest titles"
            )


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _few(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(map(repr, names[:shown])) + (f" and {len(names) - shown} more" if len(names) > shown else "")
