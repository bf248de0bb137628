"""Builds the catalog: token paths of item texts, tokenised in the context of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError


def build_catalog(
    titles: Sequence[str],
    external_ids: Sequence[str],
    texts: Sequence[str],
    tokenizer: Tokenizer,
    template: Template,
    *,
    kind: str,
) -> Catalog:
    """The catalog whose item ``i`` is written as ``template.answer(texts[i])`` followed by end of text.

    Raises CatalogError for an item whose tokens depend on the prompt, or that holds end of text or a marker inside.
    """
    if not len(titles) == len(external_ids) == len(texts):
        raise CatalogError(
            f"{len(titles)} titles, {len(external_ids)} external ids and {len(texts)} item texts; each item needs one"
        )
    if not len(texts):
        raise CatalogError("the catalog has no items; prepare a dataset that has some")
    paths = answer_paths(texts, tokenizer, template)
    return Catalog(list(titles), list(external_ids), kind, paths, TokenTrie.from_paths(paths, names=texts))


def answer_paths(texts: Sequence[str], tokenizer: Tokenizer, template: Template) -> TokenRows:
    """Token paths of all items, each ending in end of text: tokens(prompt + answer) without tokens(prompt).

    A tokenizer may merge across the border of prompt and answer, or look at what comes before; each item is therefore
    tokenised behind several prompts and must come out the same. Raises CatalogError, showing both tokenisations.
    """
    answers = [template.answer(text) for text in texts]
    first: TokenRows | None = None
    first_prompt = ""
    for prompt in _contexts(texts, template):
        paths = _behind(prompt, answers, tokenizer)
        if first is None:
            first, first_prompt = paths, prompt
        elif not (np.array_equal(first.flat, paths.flat) and np.array_equal(first.offsets, paths.offsets)):
            item = next(i for i in range(len(paths)) if not np.array_equal(first[i], paths[i]))
            raise CatalogError(
                f"item {item} ({texts[item]!r}) is tokenised as {_shown(first[item], tokenizer)} behind the prompt "
                f"{_end(first_prompt)} but as {_shown(paths[item], tokenizer)} behind {_end(prompt)}; "
                "use data.template=compact, or change the text of the item"
            )
    assert first is not None
    _check_reserved(first, texts, tokenizer, template)
    return TokenRows(
        np.insert(first.flat, first.offsets[1:], tokenizer.eos_id), first.offsets + np.arange(len(first.offsets))
    )


def _contexts(texts: Sequence[str], template: Template) -> list[str]:
    """Prompts without history, with the shortest item, and with two items of middling length."""
    by_length = sorted(texts, key=len)
    middle = len(texts) // 2
    histories = [[], by_length[:1], by_length[middle : middle + 2]]
    return list(dict.fromkeys(template.prompt(history) for history in histories))


def _behind(prompt: str, answers: list[str], tokenizer: Tokenizer) -> TokenRows:
    """Tokens that each answer adds to ``prompt``. Raises CatalogError where it changes the prompt's own tokens."""
    head = tokenizer.encode_batch([prompt])[0]
    whole = tokenizer.encode_batch([prompt + answer for answer in answers])
    long_enough = whole.lengths >= len(head)
    positions = whole.offsets[:-1, None] + np.arange(len(head))
    same = long_enough & (whole.flat[np.minimum(positions, len(whole.flat) - 1)] == head).all(axis=1)
    if not same.all():
        item = int(np.flatnonzero(~same)[0])
        raise CatalogError(
            f"item {item}: the answer {answers[item]!r} changes the tokens of the prompt before it; the end of the "
            f"prompt {_end(prompt)} is {_shown(head[-5:], tokenizer)} alone, and prompt and answer together end in "
            f"{_shown(whole[item][max(0, len(head) - 5) :], tokenizer)}; use data.template=compact"
        )
    column = np.arange(len(whole.flat)) - np.repeat(whole.offsets[:-1], whole.lengths)
    return TokenRows(whole.flat[column >= len(head)], whole.offsets - len(head) * np.arange(len(whole.offsets)))


def _check_reserved(paths: TokenRows, texts: Sequence[str], tokenizer: Tokenizer, template: Template) -> None:
    """End of text ends a path and markers end an item; a title that spells one of them would be cut there."""
    markers = tokenizer.encode_batch(list(template.markers)).flat
    reserved = np.flatnonzero(np.isin(paths.flat, [tokenizer.eos_id, *markers.tolist()]))
    if len(reserved):
        item = int(np.searchsorted(paths.offsets, reserved[0], side="right")) - 1
        token = tokenizer.decode([int(paths.flat[reserved[0]])])
        raise CatalogError(
            f"item {item} ({texts[item]!r}) contains the reserved token {token}; remove it from the text, or prepare "
            "the data again with prepare.reserved_tokens=escape"
        )


def _shown(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    return " ".join(f"{int(token)}:{tokenizer.decode([int(token)])!r}" for token in tokens)


def _end(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else f"...{prompt[-60:]}")
