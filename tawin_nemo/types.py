"""Shared names, axis letters and the small records that travel between the stages.

Axis letters are suffixes of tensor names, everywhere in this package:

    B prompts (users)   G candidates of one prompt   T tokens     V vocabulary   W beams      K metric cut-off
    I items             C children of a trie node    E edges      L code length  D width      H heads
    N, R flat rows      P places in a batch whose next-token distribution is wanted
    S sequence (Megatron is sequence first: ``hidden_SBD``)

Records hold tensors of one step and never outlive it; padding is 0 for tokens and -1 for item indices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Item index that stands for "no item" (fewer valid items than beams, or padding).
NO_ITEM = -1

#: Columns of the prepared Parquet files (one row = one sample). Nothing else spells these strings.
USER, HISTORY, TARGET, TIME = "user", "history", "target", "time"
CANDIDATES = "candidates"  # only where a split has candidate sets
ITEM, EXTERNAL_ID, TITLE = "item", "external_id", "title"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class TokenRows:
    """Ragged token rows in one flat array: row ``i`` is ``flat[offsets[i]:offsets[i + 1]]``."""

    flat: np.ndarray  # [sum of lengths] int64
    offsets: np.ndarray  # [N + 1] int64

    def __post_init__(self) -> None:
        if self.offsets.ndim != 1 or self.offsets[0] != 0 or self.offsets[-1] != len(self.flat):
            raise ValueError("offsets must start at 0 and end at len(flat)")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @classmethod
    def from_lists(cls, rows: list[list[int]] | list[np.ndarray]) -> TokenRows:
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if rows else np.zeros(0, np.int64)
        return cls(flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @classmethod
    def joined(cls, parts: list[TokenRows]) -> TokenRows:
        """The rows of all parts, one part after another; a single part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(
            np.concatenate([part.flat for part in parts]), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        )

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Lengths of the named rows, at a cost that does not grow with the number of all rows."""
        rows = np.asarray(rows, dtype=np.int64)
        return self.offsets[rows + 1] - self.offsets[rows]

    def take(self, rows: np.ndarray) -> TokenRows:
        """The named rows, in that order, as a new TokenRows."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths_of(rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenRows(self.flat[places], offsets)

    def padded(self, pad: int = 0) -> tuple[Tensor, Tensor]:
        """Right-padded ``tokens_NT`` and ``lengths_N``."""
        lengths = self.lengths
        tokens = np.full((len(self), int(lengths.max(initial=0))), pad, dtype=np.int64)
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        tokens[mask] = self.flat
        return torch.from_numpy(tokens), torch.from_numpy(lengths.copy())


@dataclass(frozen=True)
class PromptBatch:
    """One step's prompts. The target travels with its row; it is never looked up by prompt text."""

    row_B: Tensor  # row number in the split, for logs and per-user tables
    prompts: TokenRows  # B rows
    target_B: Tensor  # item index

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Rollout:
    """G candidates for each of B prompts, best score first."""

    prompts: PromptBatch
    items_BG: Tensor  # item index; NO_ITEM where fewer than G valid items exist
    tokens_BGT: Tensor  # the item's token path incl. EOS, right-padded with 0
    lengths_BG: Tensor  # tokens of the path incl. EOS; 0 for NO_ITEM
    scores_BG: Tensor  # what the group is ranked by; -inf for NO_ITEM
    logprobs_BGT: Tensor | None  # in the policy space, 0 at padding, NaN = not known; None = another space was searched
    is_target_BG: Tensor  # bool: the candidate is the target, or shares the target's token path
    weight_version: int
    inserted_BG: Tensor | None = None  # bool: the candidate was put in by ensure_target; None = nobody put anything in

    @property
    def valid_BG(self) -> Tensor:
        return self.items_BG != NO_ITEM

    def to(self, device: torch.device | str) -> Rollout:
        """The same on another device; the prompts stay where they are."""
        there: Rollout = moved(self, device)
        return there


def moved(record: Any, device: torch.device | str) -> Any:
    """A dataclass with those of its fields that are tensors on another device."""
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    return replace(record, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class Candidates:
    """What a constrained search over the catalog returns, best score first."""

    items_BW: Tensor  # first item of the leaf; NO_ITEM where fewer than W valid paths exist
    leaf_BW: Tensor  # trie node of the finished path; -1 for NO_ITEM
    tokens_BWT: Tensor  # the path incl. EOS, right-padded with 0
    lengths_BW: Tensor
    scores_BW: Tensor  # sum of log-probs / len^length_penalty; -inf for NO_ITEM
    logprobs_BWT: Tensor  # per token, in the space that was searched; 0 at padding


@dataclass(frozen=True)
class Children:
    """Admissible next tokens at P scored places as one flat list of E edges."""

    position_E: Tensor  # which of the P places the edge belongs to, ascending
    token_E: Tensor
    chosen_N: Tensor  # index into E of each token that was taken


@dataclass(frozen=True)
class TokenBatch:
    """Token trees of B prompts in one flat row of S tokens, without padding: every token is computed once.

    A prompt's tokens lie together: its chain (the prompt and whatever follows without a fork), then the tree of its
    candidates in depth-first order, so that the descendants of token j are the tokens behind it up to ``end_S[j]``.
    Token i sees token j exactly if ``j <= i < end_S[j]``; chain tokens are seen by everything behind them in their
    prompt. Next-token distributions are wanted at P places; N log-probs are read from them (many candidates share a
    place). With ``children`` a place is normalised over the admissible tokens (trie space), without over the whole
    vocabulary (vocab space).
    """

    tokens_S: Tensor
    position_S: Tensor  # tokens before it on its path: the rotary position
    end_S: Tensor  # index into S behind the token's last descendant
    chain_B: Tensor  # tokens of each prompt's chain
    tree_B: Tensor  # tokens of its tree; S = sum(chain_B + tree_B)
    place_P: Tensor  # index into S, ascending, each once
    row_N: Tensor  # index into P
    target_N: Tensor  # the token whose log-prob is read
    children: Children | None = None


@dataclass(frozen=True)
class DataParallel:
    """This process's place among data-parallel replicas; ``gather`` returns every replica's object, in rank order."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
