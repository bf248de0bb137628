"""Argument checks and result records that beam search and sampling share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.rollout.lm import LM, num_item_tokens
from tawin_nemo.types import FIRST_ITEM_TOKEN, NO_ITEM, Candidates, TokenRows
from tawin_nemo.util.errors import CatalogError, ConfigError, DataError, TawinError

SCORE_SPACES = ("trie", "vocab")


def check_no_nan(logp_E: Tensor) -> Tensor:
    """Return the log-probs unchanged; raises TawinError if one is NaN."""
    if bool(torch.isnan(logp_E).any()):
        raise nan_error()
    return logp_E


def nan_error() -> TawinError:
    """The error of a search whose model returns NaN."""
    return TawinError("the language model returned NaN log-probs; look at its weights and its precision")


def token_rows(flat_S: Tensor, lengths_R: Tensor) -> TokenRows:
    """R ragged rows from their concatenated tokens [S] and lengths [R]."""
    offsets = np.zeros(len(lengths_R) + 1, dtype=np.int64)
    np.cumsum(lengths_R.cpu().numpy(), out=offsets[1:])
    return TokenRows(flat_S.cpu().numpy(), offsets)


def check_search(lm: LM, trie: TokenTrie, width: int) -> None:
    """Raise ConfigError for ``width`` < 1, CatalogError for a catalog with tokens beyond the model's vocabulary."""
    if width < 1:
        raise ConfigError(f"a search needs at least one beam or draw per prompt; got {width}")
    if trie.max_token >= lm.vocab_size:
        raise CatalogError(
            f"the catalog uses token {trie.max_token}, the model has {lm.vocab_size} tokens; "
            "build the catalog with the model's tokenizer"
        )


def check_prompts(lm: LM, prompts: TokenRows, trie: TokenTrie) -> None:
    """Raise DataError for a prompt that is empty, too long with the longest path, or not of the model's tokens."""
    if len(prompts) == 0:
        return
    lengths = prompts.lengths
    if lengths.min() == 0:
        raise DataError(f"prompt row {int(lengths.argmin())} has no tokens; every prompt needs at least one")
    longest = int(lengths.argmax())
    if lengths[longest] + trie.max_depth > lm.max_positions:
        raise DataError(
            f"prompt row {longest} has {lengths[longest]} tokens, the longest path of the catalog {trie.max_depth}, "
            f"and the model takes {lm.max_positions} together; "
            f"set data.max_prompt_tokens to at most {lm.max_positions - trie.max_depth}"
        )
    if prompts.flat.min() < 0 or prompts.flat.max() >= lm.vocab_size:
        last = FIRST_ITEM_TOKEN + num_item_tokens(lm)
        is_item = (prompts.flat >= FIRST_ITEM_TOKEN) & (prompts.flat < last)
        unknown = ~is_item & ((prompts.flat < 0) | (prompts.flat >= lm.vocab_size))
        if not unknown.any():
            return
        position = int(unknown.argmax())
        raise DataError(
            f"prompt row {int(np.searchsorted(prompts.offsets, position, side='right')) - 1} has token "
            f"{prompts.flat[position]}, the model's are 0 .. {lm.vocab_size - 1}; "
            "write prompts with the model's tokenizer"
        )


def append_root_path(prompts: TokenRows, trie: TokenTrie) -> tuple[TokenRows, int]:
    """Append the tokens that all paths begin with to each prompt; also returns their number, 0 for a single path.

    In trie space these tokens have probability 1, so the model can run them with the prompts.
    """
    root = torch.zeros(1, dtype=torch.long)
    shared = 0 if bool(trie.is_leaf(root)) else int(trie.depth_of(root))
    if shared == 0:
        return prompts, 0
    path = trie.labels(root, torch.zeros_like(root), torch.full_like(root, shared)).numpy()
    ends = np.repeat(prompts.offsets[1:], shared)
    flat = np.insert(prompts.flat, ends, np.tile(path, len(prompts)))
    return TokenRows(flat, prompts.offsets + shared * np.arange(len(prompts) + 1)), shared


def probe_logprob(lm: LM, cache: Any, trie: TokenTrie, space: str) -> Tensor:
    """One log-prob [1], whose device and dtype are those of all later log-probs of ``lm``."""
    zero = torch.zeros(1, dtype=torch.long)
    return lm.logprobs(cache, zero, zero, zero + trie.max_token, space)


def empty_candidates(width: int, depth: int) -> Candidates:
    """The result for zero prompts, with W = ``width`` and T = ``depth``."""
    index, real = torch.zeros((0, width), dtype=torch.long), torch.zeros((0, width))
    return Candidates(
        items_BW=index,
        leaf_BW=index,
        tokens_BWT=index[..., None].expand(-1, -1, depth),
        lengths_BW=index,
        scores_BW=real,
        logprobs_BWT=real[..., None].expand(-1, -1, depth),
    )


def candidates_from(trie: TokenTrie, leaf_BW: Tensor, scores_BW: Tensor, logprobs_BWT: Tensor) -> Candidates:
    """Candidates with the items, token paths and lengths of the leaves; leaf -1 becomes NO_ITEM.

    ``logprobs_BWT`` is padded with 0, or cut, to the longest path among the candidates.
    """
    tokens_NT, lengths_N = trie.paths_of(leaf_BW.flatten())
    depth = tokens_NT.shape[1]
    return Candidates(
        items_BW=torch.where(leaf_BW < 0, NO_ITEM, trie.first_item(leaf_BW)),
        leaf_BW=leaf_BW,
        tokens_BWT=tokens_NT.view(*leaf_BW.shape, depth),
        lengths_BW=lengths_N.view_as(leaf_BW),
        scores_BW=scores_BW,
        logprobs_BWT=pad(logprobs_BWT, (0, depth - logprobs_BWT.shape[-1])),  # cuts off what no path has, too
    )
