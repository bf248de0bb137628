"""Whether the tokens of pieces of text, one behind the other, are the tokens of the whole text: a proof, or no.

A prompt is head, items with their separators, and the newest item with the template's tail. A tokenizer cuts added
tokens out of a text first, then cuts the rest into words, then tokenises every word. Two pieces that meet are
tokenised as one text is if both cuts are the same there. That is known in two cases:

- At the border an added token ends or begins. What lies on either side is then a text of its own in both ways.
- A word ends at the border. Words are found from left to right by a pattern of ``WORDS``: without white space behind
  the border and without an apostrophe before it, where a word ends depends on the text up to the border and on the one
  character behind it. So each left piece is tokenised with every such character.

Besides, no added token may lie across a border, nothing may depend on how far from the beginning a text lies, and the
normaliser must not join characters across a border. A tokenizer for which all this is not known is none for which the
pieces are wrong; but its prompts are tokenised from their text. Axes: L pieces on the left of a border, R on its right.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from tawin_nemo.types import TokenRows

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: Patterns of words for which the argument above holds: those of GPT-2, Qwen and Llama 3.
WORDS = (
    _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    f"(?i:{_CONTRACTIONS})" + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
    f"(?i:{_CONTRACTIONS})" + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
)
#: Normalisers that change nothing beside a border with an ASCII character behind it.
_NORMALISERS = ("NFC", "NFD", "NFKC", "NFKD")
#: Different characters with which the pieces on the right may begin.
_MOST_BEGINNINGS = 3


@dataclass(frozen=True)
class Pieces:
    """Texts that meet at borders, and their tokens, one row per text.

    Every text of ``left`` may be followed by every text of ``right``.
    """

    left: Sequence[str]
    left_tokens: TokenRows
    right: Sequence[str]
    right_tokens: TokenRows


def unproven_because(backend: Backend, pieces: Pieces) -> str:
    """Why the tokens of joined pieces are not known to be those of the whole text; empty where they are known to be."""
    try:
        settings = json.loads(backend.to_str())
    except Exception:  # the library raises bare Exception
        return "the tokenizer has parts written in Python"
    added = backend.get_added_tokens_decoder()
    if (settings["model"].get("dropout") or 0) > 0:
        return "the tokenizer draws merges by chance"
    if any(token.single_word for token in added.values()):
        return "the tokenizer has added tokens that must be whole words"
    if settings["normalizer"] and any(token.normalized for token in added.values()):
        return "the tokenizer looks for added tokens in normalised text"
    if _strips(added.values(), pieces):
        return "an added token beside a border takes white space from the next piece"
    across = _across([token.content for token in added.values()], pieces)
    if across:
        return f"the added token {across!r} may lie across a border"
    if _cut(added, pieces):
        first = '"prepend_scheme": "first"' in json.dumps(settings["pre_tokenizer"])
        return "the tokenizer treats the beginning of a text in another way" if first else ""
    return _words_unproven(backend, settings, pieces)


def _strips(added: Collection[Any], pieces: Pieces) -> bool:
    """Whether an added token that takes white space beside it stands at a border."""
    behind = tuple(token.content for token in added if token.rstrip)
    before = tuple(token.content for token in added if token.lstrip)
    return bool(behind and any(text.rstrip().endswith(behind) for text in pieces.left)) or bool(
        before and any(text.lstrip().startswith(before) for text in pieces.right)
    )


def _across(contents: Sequence[str], pieces: Pieces) -> str:
    """An added token whose beginning ends a left piece and whose rest begins a right one, or contains it; or empty."""
    longest = max(map(len, contents), default=0)
    ends = [{text[-size:] for text in pieces.left} for size in range(1, longest)]
    starts = [{text[:size] for text in pieces.right if len(text) >= size} for size in range(1, longest)]
    short = [text for text in set(pieces.right) if len(text) < longest - 1]
    for content in contents:
        for size in range(1, len(content)):
            rest = content[size:]
            if content[:size] not in ends[size - 1]:
                continue
            if rest in starts[len(rest) - 1] or any(rest.startswith(text) for text in short):
                return content
    return ""


def _cut(added: dict[int, Any], pieces: Pieces) -> bool:
    """Whether an added token ends every left piece, or begins every right one."""
    ends = _edges(pieces.left_tokens, pieces.left_tokens.offsets[1:] - 1)
    begins = _edges(pieces.right_tokens, pieces.right_tokens.offsets[:-1])
    return all(
        token in added and text.endswith(added[token].content) for token, text in zip(ends, pieces.left, strict=True)
    ) or all(
        token in added and text.startswith(added[token].content)
        for token, text in zip(begins, pieces.right, strict=True)
    )


def _edges(rows: TokenRows, place_N: np.ndarray) -> list[int]:
    """The token at each place; -1 for a row without tokens."""
    if not len(rows.flat):
        return [-1] * len(rows)
    tokens_N = rows.flat[np.clip(place_N, 0, len(rows.flat) - 1)]
    return [int(token) for token in np.where(rows.lengths > 0, tokens_N, -1)]


def _words_unproven(backend: Backend, settings: dict[str, Any], pieces: Pieces) -> str:
    """As ``unproven_because``, where words end at the borders."""
    if settings["model"]["type"] not in ("BPE", "WordLevel", "WordPiece", "Unigram"):
        return f"the tokenizer's model is {settings['model']['type']}"
    if not all(part["type"] in _NORMALISERS for part in _flat(settings["normalizer"], "normalizers")):
        return "the tokenizer normalises texts in a way that is not known"
    if not _known_words([*_flat(settings["pre_tokenizer"], "pretokenizers")]):
        return "the tokenizer finds words in a way that is not known"
    if not all(pieces.right) or not all(pieces.left):
        return "a piece is empty"
    beginnings = sorted({text[0] for text in pieces.right})
    if len(beginnings) > _MOST_BEGINNINGS or not all(text.isascii() and not text.isspace() for text in beginnings):
        return "pieces begin with white space, characters beyond ASCII, or too many different ones"
    if any(text.endswith("'") for text in pieces.left):
        return "a piece ends in an apostrophe"
    for beginning in beginnings:
        if not _ends_words(backend, pieces, beginning):
            return f"a word may go on across a border with {beginning!r} behind it"
    return ""


def _flat(part: dict[str, Any] | None, of_sequence: str) -> Iterator[dict[str, Any]]:
    """The steps of a normaliser or a pre-tokenizer; none for None."""
    if part is not None:
        if part["type"] == "Sequence":
            for step in part[of_sequence]:
                yield from _flat(step, of_sequence)
        else:
            yield part


def _known_words(steps: list[dict[str, Any]]) -> bool:
    """Whether the steps are: digits apart (or not), then one pattern of ``WORDS``, then bytes (or not)."""
    while steps and steps[0]["type"] == "Digits":
        steps = steps[1:]
    if not steps or any(step.get("add_prefix_space") for step in steps):
        return False
    first, *others = steps
    if any(step["type"] != "ByteLevel" or step["use_regex"] for step in others):
        return False
    if first["type"] == "ByteLevel":
        return bool(first["use_regex"])
    split = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    return split and first["pattern"].get("Regex") in WORDS


def _ends_words(backend: Backend, pieces: Pieces, beginning: str) -> bool:
    """Whether every left piece, with ``beginning`` behind it, has its own tokens and ends in a whole word."""
    chunk = 4096
    for start in range(0, len(pieces.left), chunk):
        texts = [text + beginning for text in pieces.left[start : start + chunk]]
        for place, encoding in enumerate(backend.encode_batch(texts, add_special_tokens=False)):
            own = pieces.left_tokens[start + place].tolist()
            words = encoding.word_ids
            if encoding.ids[: len(own)] != own or len(encoding.ids) == len(own):
                return False
            if own and words[len(own)] == words[len(own) - 1]:
                return False
    return True
