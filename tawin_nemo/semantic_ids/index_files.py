"""Read and write the index files of MiniOneRec and LC-Rec.

Both write ``{"0": ["<a_12>", "<b_3>", "<c_77>"], ...}``: level 1 has the letter a, level 2 b, and so on; a dedup token
is one more level. MiniOneRec leaves it out for items that need none and lists ``ID <tab> title <tab> item`` in a second
file; LC-Rec's readers expect equally many tokens for every item.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import numpy as np

from tawin_nemo.catalog.semantic_ids import load_codes
from tawin_nemo.semantic_ids.collisions import NO_TOKEN, format_items
from tawin_nemo.util.errors import CatalogError
from tawin_nemo.util.files import atomic_path

_WORD = re.compile(r"<([a-z])_(\d{1,9})>")


@dataclass(frozen=True, eq=False)
class IndexCodes:
    """``codes_IL`` int32; an item with fewer tokens than the longest has NO_TOKEN at the end. ``levels``: tokens that
    every item has; further tokens distinguish items that would otherwise be equal."""

    codes_IL: np.ndarray
    levels: int


def code_tokens(codes_IL: np.ndarray, layout: str = "minionerec") -> list[list[str]]:
    """Tokens of every item. lcrec: an item without dedup token gets the number 0 where others have one."""
    if layout == "lcrec":
        codes_IL = np.where(codes_IL == NO_TOKEN, 0, codes_IL)
    letters = ascii_lowercase[: codes_IL.shape[1]]
    return [
        [f"<{letter}_{code}>" for letter, code in zip(letters, row, strict=True) if code != NO_TOKEN]
        for row in codes_IL.tolist()
    ]


def write_index(path: Path, codes_IL: np.ndarray, layout: str = "minionerec") -> None:
    """Write the index file ``path`` atomically, items in order; ``layout`` is minionerec or lcrec."""
    index = {str(item): words for item, words in enumerate(code_tokens(codes_IL, layout))}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(index) + "\n", encoding="utf-8")


def write_info(path: Path, codes_IL: np.ndarray, titles: Sequence[str]) -> None:
    """MiniOneRec's list of items: ID, title and item number, with tabs; white space within a title becomes a space."""
    lines = [
        f"{''.join(words)}\t{' '.join(title.split())}\t{item}\n"
        for item, (words, title) in enumerate(zip(code_tokens(codes_IL), titles, strict=True))
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def read_index(path: Path, external_ids: Sequence[str], *, levels: int = 0, codes: int = 0) -> IndexCodes:
    """The codes in an index file of either layout.

    With ``levels`` every item must have that many tokens, or one more (dedup); with ``codes`` the numbers of the levels
    must be below it. Raises CatalogError that names the items with another depth or unknown tokens, and as
    ``load_codes`` for items that are missing or extra.
    """
    words_I = load_codes(path, external_ids)
    depth_I = np.array([len(words) for words in words_I])
    shortest = levels or int(depth_I.min())
    problems = {
        f"have another number of tokens than {shortest} or {shortest + 1}": (depth_I < shortest)
        | (depth_I > shortest + 1),
        "have tokens that are not <a_N>, <b_N>, ... in this order": np.array([not _known(words) for words in words_I]),
    }
    if codes and not any(bad_I.any() for bad_I in problems.values()):
        problems[f"have codes that are not below {codes}"] = np.array(
            [any(number >= codes for number in _numbers(words)[:shortest]) for words in words_I]
        )
    messages = [
        f"{bad_I.sum()} items {problem}: {format_items(np.flatnonzero(bad_I))} (first: {words_I[int(bad_I.argmax())]})"
        for problem, bad_I in problems.items()
        if bad_I.any()
    ]
    if messages:
        raise CatalogError(f"{path} is not an index of this kind; {'; '.join(messages)}")
    codes_IL = np.full((len(external_ids), int(depth_I.max())), NO_TOKEN, dtype=np.int32)
    for item, words in enumerate(words_I):
        codes_IL[item, : len(words)] = _numbers(words)
    return IndexCodes(codes_IL, shortest)


def _known(words: Sequence[str]) -> bool:
    matches = [_WORD.fullmatch(word) for word in words]
    return all(
        match is not None and match[1] == letter
        for match, letter in zip(matches, ascii_lowercase[: len(words)], strict=True)
    )


def _numbers(words: Sequence[str]) -> list[int]:
    return [int(word[3:-1]) for word in words]
