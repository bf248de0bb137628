"""Shared names, axis letters and the small records that travel between the stages.

Axis letters are suffixes of tensor names, everywhere in this package:

    B prompts (users)   G candidates of one prompt   T tokens     V vocabulary   W beams      K metric cut-off
    I items             C children of a trie node    E edges      L code length  D width      H heads
    M, N, R flat rows   P positions of a batch whose next-token distribution is needed
    S sequence (Megatron is sequence first: ``hidden_SBD``)

Records hold tensors of one step and never outlive it; padding is 0 for tokens and -1 for item indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

#: Item index that stands for "no item" (fewer valid items than beams, or padding).
NO_ITEM = -1

#: Prompt tokens from here on stand for items: ``FIRST_ITEM_TOKEN + i`` is item i (``model.item_tokens``). No vocabulary
#: is as large.
FIRST_ITEM_TOKEN = 1 << 24

#: Columns of the prepared Parquet files (one row = one sample). Nothing else spells these strings.
USER, HISTORY, TARGET, TIME = "user", "history", "target", "time"
CANDIDATES = "candidates"  # only where a split has candidate sets
ITEM, EXTERNAL_ID, TITLE = "item", "external_id", "title"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class TokenRows:
    """Ragged token rows in one flat array: row ``i`` is ``flat[offsets[i]:offsets[i + 1]]``.

    ``flat`` may be int32 (files that are mapped into memory, ``data/split_arrays.py``); single rows and those that are
    taken are int64 in any case.
    """

    flat: np.ndarray  # [sum of lengths] int64, or int32
    offsets: np.ndarray  # [N + 1] int64

    def __post_init__(self) -> None:
        if self.offsets.ndim != 1 or self.offsets[0] != 0 or self.offsets[-1] != len(self.flat):
            raise ValueError("offsets must start at 0 and end at len(flat)")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.offsets[row] : self.offsets[row + 1]].astype(np.int64, copy=False)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, [N] int64."""
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, 0 without rows."""
        return int(self.lengths.max(initial=0))

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows together."""
        return len(self.flat)

    @classmethod
    def from_lists(cls, rows: list[list[int]] | list[np.ndarray]) -> TokenRows:
        """Copy N lists or arrays of token ids into one ragged array."""
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if rows else np.zeros(0, np.int64)
        return cls(flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @classmethod
    def cat(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """Concatenate the rows of at least one part; a single part is returned as it is, not copied."""
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(
            np.concatenate([part.flat for part in parts]), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        )

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the rows with indices ``rows`` [M], at a cost that does not grow with the number of all rows."""
        rows = np.asarray(rows, dtype=np.int64)
        return self.offsets[rows + 1] - self.offsets[rows]

    def take(self, rows: np.ndarray) -> TokenRows:
        """Copy the rows with indices ``rows`` [M], in that order, into a new TokenRows."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths_of(rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        source = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenRows(self.flat[source].astype(np.int64, copy=False), offsets)

    def select(self, rows: np.ndarray) -> TokenRows:
        """``take``: these rows are in memory already."""
        return self.take(rows)

    def in_memory(self) -> TokenRows:
        """These rows themselves."""
        return self

    def padded(self, pad: int = 0) -> tuple[Tensor, Tensor]:
        """Right-padded ``tokens_NT`` and ``lengths_N``."""
        lengths = self.lengths
        tokens = np.full((len(self), int(lengths.max(initial=0))), pad, dtype=np.int64)
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        tokens[mask] = self.flat
        return torch.from_numpy(tokens), torch.from_numpy(lengths.copy())


@dataclass(frozen=True)
class Record:
    """Base of the frozen dataclasses whose fields are tensors, or None where a tensor is optional, and a few others."""

    def tensors(self) -> dict[str, Tensor]:
        """Those fields that are tensors, by name, in the order of the fields."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy in which every tensor is ``change(tensor)``; other fields, records among them, stay as they are."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})

    def to(self, device: torch.device | str) -> Self:
        """A copy whose tensors lie on ``device``; records inside it (the prompts of a rollout) stay where they are."""
        to_gpu = torch.device(device).type == "cuda"  # the driver has read host memory before the call returns
        return self.map(lambda tensor: tensor.to(device, non_blocking=to_gpu))


@dataclass(frozen=True)
class PromptRecord(Record):
    """A record with one entry per prompt along the first axis of every tensor, token row and record in it.

    Its other fields, such as a weight version, are about all prompts alike.
    """

    def take(self, rows_M: Tensor) -> Self:
        """Select M prompts by their index, in the order of ``rows_M`` (int64, on any device)."""

        def taken(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.index_select(0, rows_M.to(value.device))
            if isinstance(value, TokenRows):
                return value.take(rows_M.cpu().numpy())
            return value.take(rows_M) if isinstance(value, PromptRecord) else value

        return replace(self, **{item.name: taken(getattr(self, item.name)) for item in fields(self)})

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Concatenate the prompts of at least one part; a single part is returned as it is, not copied.

        Tensors whose name ends in ``T`` are right-padded with 0 to the longest last axis among the parts. A tensor that
        is None in some part is None in the result. Raises ValueError without parts, or if parts differ in a field that
        is about all prompts alike.
        """
        if not parts:
            raise ValueError(f"{cls.__name__}.cat needs at least one part; got none")
        if len(parts) == 1:
            return parts[0]
        columns = {item.name: [getattr(part, item.name) for part in parts] for item in fields(parts[0])}
        return replace(parts[0], **{name: _cat_field(name, values) for name, values in columns.items()})


def _cat_field(name: str, values: list[Any]) -> Any:
    """One field of several prompt records, concatenated as ``PromptRecord.cat`` says."""
    if any(value is None for value in values):
        return None
    if isinstance(values[0], Tensor):
        longest = max(value.shape[-1] for value in values) if name.endswith("T") else 0
        return torch.cat([pad(value, (0, longest - value.shape[-1])) if longest else value for value in values])
    if isinstance(values[0], TokenRows | PromptRecord):
        return type(values[0]).cat(values)
    if any(value != values[0] for value in values):
        raise ValueError(f"records with {name} {sorted(set(values))} cannot be concatenated; they need one {name}")
    return values[0]


@dataclass(frozen=True)
class PromptBatch(PromptRecord):
    """One step's prompts. The target travels with its row; it is never looked up by prompt text."""

    row_B: Tensor  # row number in the split, for logs and per-user tables
    prompts: TokenRows  # B rows
    target_B: Tensor  # item index

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Rollout(PromptRecord):
    """G candidates for each of B prompts, best score first."""

    prompts: PromptBatch
    items_BG: Tensor  # item index; NO_ITEM where fewer than G valid items exist
    tokens_BGT: Tensor  # the item's token path incl. EOS, right-padded with 0
    lengths_BG: Tensor  # tokens of the path incl. EOS; 0 for NO_ITEM
    scores_BG: Tensor  # what the group is ranked by; -inf for NO_ITEM
    logprobs_BGT: Tensor | None  # in the policy space, 0 at padding, NaN = not known; None = another space was searched
    is_target_BG: Tensor  # bool: the candidate is the target, or shares the target's token path
    weight_version: int
    inserted_BG: Tensor | None = None  # bool: the candidate was inserted by ensure_target; None = none was inserted

    @property
    def valid_BG(self) -> Tensor:
        """bool [B, G]: there is a candidate, not padding."""
        return self.items_BG != NO_ITEM


@dataclass(frozen=True)
class Candidates(PromptRecord):
    """What a constrained search over the catalog returns, best score first."""

    items_BW: Tensor  # first item of the leaf; NO_ITEM where fewer than W valid paths exist
    leaf_BW: Tensor  # trie node of the finished path; -1 for NO_ITEM
    tokens_BWT: Tensor  # the path incl. EOS, right-padded with 0
    lengths_BW: Tensor
    scores_BW: Tensor  # sum of log-probs / len^length_penalty; -inf for NO_ITEM
    logprobs_BWT: Tensor  # per token, in the space that was searched; 0 at padding

    def top(self, count: int) -> Candidates:
        """The first ``count`` candidates of each prompt."""
        return self.map(lambda tensor: tensor[:, :count])


@dataclass(frozen=True)
class Children:
    """Admissible next tokens at P scored positions as one flat list of E edges."""

    position_E: Tensor  # which of the P positions the edge belongs to, ascending
    token_E: Tensor
    chosen_N: Tensor  # index into E of each token that was taken


@dataclass(frozen=True)
class TokenBatch:
    """Token trees of B prompts in one flat row of S tokens, without padding: every token is computed once.

    A prompt's tokens lie together: its chain (the prompt and whatever follows without a fork), then the tree of its
    candidates in depth-first order, so that the descendants of token j are the tokens behind it up to ``end_S[j]``.
    Token i sees token j exactly if ``j <= i < end_S[j]``; chain tokens are seen by everything behind them in their
    prompt. Next-token distributions are needed at P positions; N log-probs are read from them (many candidates share a
    position). With ``children`` they are normalised over the admissible tokens (trie space), without over the whole
    vocabulary (vocab space).
    """

    tokens_S: Tensor
    position_S: Tensor  # tokens before it on its path: the rotary position
    end_S: Tensor  # index into S behind the token's last descendant
    chain_B: Tensor  # tokens of each prompt's chain
    tree_B: Tensor  # tokens of its tree; S = sum(chain_B + tree_B)
    index_P: Tensor  # index into S, ascending, each once
    row_N: Tensor  # index into P
    target_N: Tensor  # the token whose log-prob is read
    children: Children | None = None


@dataclass(frozen=True)
class DataParallel:
    """This process's rank among the data-parallel replicas; ``gather`` returns the object of each, in rank order."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
