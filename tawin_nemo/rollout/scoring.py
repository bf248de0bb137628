"""What beam search and sampling share: log-probs of trie edges, checks of their arguments, the result records."""

from __future__ import annotations

import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.errors import CatalogError, ConfigError, DataError, TawinError
from tawin_nemo.rollout.lm import LM
from tawin_nemo.types import NO_ITEM, Candidates, TokenRows

SCORE_SPACES = ("trie", "vocab")


def segment_log_softmax(values_E: Tensor, segment_E: Tensor, num_segments: int) -> Tensor:
    """Log-softmax within each segment (``segment_E`` ascending). A segment of one element gives exactly 0."""
    count_N = torch.bincount(segment_E, minlength=num_segments)
    peak_N = torch.segment_reduce(values_E, "max", lengths=count_N)
    shifted_E = values_E - peak_N[segment_E]
    # Not index_add: its order of summation varies on CUDA, and ranks that share a model must decide alike.
    total_N = torch.segment_reduce(shifted_E.exp(), "sum", lengths=count_N)
    return shifted_E - total_N.log()[segment_E]


def edge_logprobs(logits_AV: Tensor, lm_row_R: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
    """Log-prob of each trie edge, in float32 or the model's wider type.

    Edge ``e`` leaves row ``position_E[e]``, whose logits are ``logits_AV[lm_row_R[position_E[e]]]``; trie space:
    normalised over the edges of the row (TAWin, arXiv 2604.22504, Eq. 25), vocab space: over the whole vocabulary.
    ``lm_row_R`` -1 marks a row that the model did not run because it has a single edge (trie space only).
    Raises TawinError if a logit is NaN.
    """
    logits_AV = logits_AV.to(torch.promote_types(logits_AV.dtype, torch.float32))
    row_E = lm_row_R[position_E]
    ran_E = row_E >= 0
    logit_E = torch.zeros(len(row_E), dtype=logits_AV.dtype, device=logits_AV.device)
    logit_E[ran_E] = logits_AV[row_E[ran_E], token_E[ran_E]]
    if space == "trie":
        logp_E = segment_log_softmax(logit_E, position_E, len(lm_row_R))
    else:
        logp_E = logit_E - torch.logsumexp(logits_AV, dim=-1)[row_E]
    if bool(torch.isnan(logp_E).any()):
        raise TawinError("the language model returned NaN logits; look at its weights and its precision")
    return logp_E


def check_search(lm: LM, prompts: TokenRows, trie: TokenTrie, width: int) -> None:
    """Raise ConfigError, DataError or CatalogError for arguments that no search can serve."""
    if width < 1:
        raise ConfigError(f"a search needs at least one beam or draw per prompt; got {width}")
    if len(prompts) and int(prompts.lengths.min()) == 0:
        raise DataError(f"prompt row {int(prompts.lengths.argmin())} has no tokens; every prompt needs at least one")
    largest = int(trie.child_tokens.max())
    if largest >= lm.vocab_size:
        raise CatalogError(
            f"the catalogue uses token {largest}, the model has {lm.vocab_size} tokens; "
            "build the catalogue with the model's tokenizer"
        )


def no_candidates(width: int, depth: int) -> Candidates:
    """The result for zero prompts."""
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
    """Fill in items, token paths and lengths; leaf -1 becomes NO_ITEM. ``logprobs_BWT`` must be at least as long."""
    tokens_NT, lengths_N = trie.paths_of(leaf_BW.flatten())
    first_item = trie.tensors(leaf_BW.device).first_item
    depth = tokens_NT.shape[1]
    return Candidates(
        items_BW=torch.where(leaf_BW < 0, NO_ITEM, first_item[leaf_BW.clamp(min=0)]),
        leaf_BW=leaf_BW,
        tokens_BWT=tokens_NT.view(*leaf_BW.shape, depth),
        lengths_BW=lengths_N.view(leaf_BW.shape),
        scores_BW=scores_BW,
        logprobs_BWT=logprobs_BWT[..., :depth],
    )
