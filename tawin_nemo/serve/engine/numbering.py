"""Served catalogs whose items keep the numbers that they had in earlier versions of a model, or before a restart.

I: items of the model's catalog; R: rows, those items and then the removed ones; N: item numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tawin_nemo.baselines.assist import AuxiliaryRecommender
from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.data.catalog_builder import answer_paths
from tawin_nemo.data.jinja_prompts import Columns, JinjaTemplate
from tawin_nemo.serve.engine.catalog import NewItem, PromptFormat, ServedCatalog
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError, DataError


def numbered(
    catalog: Catalog, texts: Sequence[str], prompt_format: PromptFormat, known: Sequence[NewItem], *,
    version: int = 1, recommender: AuxiliaryRecommender | None = None,
) -> ServedCatalog:  # fmt: skip
    """The catalog that a model was trained with, whose items have the numbers that ``known`` gives them.

    Item n of ``known`` has the number n; what ``catalog`` has besides gets the next ones. Items that are not in
    ``catalog`` are removed ones, which may occur in a history. Where the tokenizer has no tokens for a removed item, or
    its codes are not known, its text is empty, and histories are read without it. An external id that ``known`` has
    twice means its last number. Raises CatalogError for repeated external ids of ``catalog``.
    """
    made = ServedCatalog.of(catalog, texts, prompt_format, recommender)
    last = {item.external_id: number for number, item in enumerate(known)}
    here_N = [item.external_id in made.number_of and last[item.external_id] == n for n, item in enumerate(known)]
    removed = [item for item, here in zip(known, here_N, strict=True) if not here]
    old_texts, old_paths = _readable([_text_of(item, prompt_format) for item in removed], prompt_format)
    gone = iter(range(len(catalog), len(catalog) + len(removed)))
    row_N = [made.number_of[item.external_id] if here else next(gone) for item, here in zip(known, here_N, strict=True)]
    row_N += [row for row, name in enumerate(catalog.external_ids) if name not in last]
    row_of_number = np.array(row_N, dtype=np.int64)
    live_N = row_of_number < len(catalog)
    names_R = [*catalog.external_ids, *(item.external_id for item in removed)]
    titles_R, texts_R = [*catalog.titles, *(item.title for item in removed)], [*texts, *old_texts]
    paths = TokenRows.cat([catalog.paths, old_paths] if removed else [catalog.paths]).take(row_of_number)
    texts_N = [texts_R[row] for row in row_N]
    number_J = np.flatnonzero(live_N)
    if np.array_equal(row_of_number[live_N], np.arange(len(catalog))):
        trie = catalog.trie
    else:
        trie = TokenTrie.from_paths(paths.take(number_J), names=[texts_N[number] for number in number_J])
    names_N = [names_R[row] for row in row_N]
    prompt_format = _with_columns(prompt_format, [made.number_of.get(name, -1) for name in names_N])
    return ServedCatalog(
        version, prompt_format, [titles_R[row] for row in row_N], names_N, texts_N, paths,
        live_N, trie, recommender,
    )  # fmt: skip


def known_items(current: ServedCatalog, published: Sequence[NewItem]) -> list[NewItem]:
    """Every item of ``current`` with its number, then the items of ``published`` that it does not have.

    Titles and codes are those of ``published``; the codes of an item that only ``current`` has may mean another thing
    to the next model, so it has none.
    """
    newer = {item.external_id: item for item in published}
    kept = [
        newer.get(name) or NewItem(name, title)
        for name, title in zip(current.external_ids, current.titles, strict=True)
    ]
    return kept + [item for item in published if item.external_id not in current.number_of]


def _with_columns(prompt_format: PromptFormat, row_N: Sequence[int]) -> PromptFormat:
    """The columns that a Jinja template shows, by item number instead of by row; ``row_N`` is -1 for removed items."""
    template = prompt_format.template
    if not isinstance(template, JinjaTemplate) or not template.columns.names:
        return prompt_format
    names, rows = template.columns.names, template.columns.rows
    empty = dict.fromkeys(names, "")
    columns = Columns(names, [rows[row] if 0 <= row < len(rows) else empty for row in row_N])
    return replace(prompt_format, template=replace(template, columns=columns))


def _text_of(item: NewItem, prompt_format: PromptFormat) -> str:
    """The text of a removed item; empty where its codes are not known."""
    return "".join(item.codes) if prompt_format.template.kind == "sid" else item.title


def _readable(texts: Sequence[str], prompt_format: PromptFormat) -> tuple[list[str], TokenRows]:
    """The texts of removed items, emptied where the tokenizer cannot express them, and their paths.

    The path of an empty text is the end of text alone; removed items are never searched.
    """
    tokenizer, template = prompt_format.tokenizer, prompt_format.template

    def paths_of(some: Sequence[str]) -> list[list[int]] | None:
        try:
            rows = answer_paths(some, tokenizer, template)
        except (DataError, CatalogError):
            return None
        return [rows[index].tolist() for index in range(len(rows))]

    written = [text for text in texts if text]
    together = paths_of(written) if written else []
    if together is None:  # one that cannot be expressed spoils all: one by one
        path_of = {text: (paths_of([text]) or [[]])[0] for text in written}
    else:
        path_of = dict(zip(written, together, strict=True))
    kept = [text if path_of.get(text) else "" for text in texts]
    return kept, TokenRows.from_lists([path_of.get(text) or [tokenizer.eos_id] for text in texts])
