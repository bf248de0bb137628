"""Token-synchronous beam search over the catalogue trie.

Semantics of transformers 4.57 ``generate(num_beams=W, num_return_sequences=W, do_sample=False,
early_stopping="never", prefix_allowed_tokens_fn=..., renormalize_logits=(score_space == "trie"))`` with
``max_new_tokens`` at least the longest path. At every step all beams of a prompt advance by one token; of all
continuations, ranked by their summed log-probs,

- those that end a path are finished if they are among the best W, and lost otherwise;
- the best W of the others are the beams of the next step;
- the best W finished ones, by ``score / length ** length_penalty``, are the result.

Differences: nothing but items is ever returned (fewer than W exist: NO_ITEM), and equal scores are ordered by
finishing earlier, then by the better parent beam, then by the smaller token. Two things save work and change no result:
beams that cannot overtake the W-th finished one are dropped, and in trie space a beam below the last choice on its path
keeps its slot and its score but is not run through the model any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.errors import ConfigError
from tawin_nemo.rollout.lm import LM
from tawin_nemo.rollout.scoring import SCORE_SPACES, candidates_from, check_search, edge_logprobs, no_candidates
from tawin_nemo.types import Candidates, TokenRows


@dataclass(frozen=True)
class _Beams:
    """Running beams of all prompts in one flat list, by prompt and best first within a prompt."""

    prompt_R: Tensor
    node_R: Tensor
    score_R: Tensor  # sum of log-probs
    lm_row_R: Tensor  # row of the model's cache and logits; -1 = not run any more
    parent_R: Tensor  # row among the beams of the step before
    logp_R: Tensor  # of the last token


@dataclass(frozen=True)
class _Ranking:
    """Continuations of B prompts, best first along C; edge -1 is padding."""

    score_BC: Tensor
    edge_BC: Tensor
    node_BC: Tensor
    parent_BC: Tensor  # row among the beams
    logp_BC: Tensor
    ends_BC: Tensor  # bool: the continuation ends a path


@dataclass(frozen=True)
class _Finished:
    """The best W finished paths of each prompt so far, best first; empty slots have leaf -1 and score -inf."""

    score_BW: Tensor  # length-normalised
    leaf_BW: Tensor
    parent_BW: Tensor  # row among the beams one token before the end
    logp_BW: Tensor  # of the last token


@torch.no_grad()
def constrained_beam_search(
    lm: LM,
    prompts: TokenRows,
    trie: TokenTrie,
    width: int,
    *,
    score_space: str = "trie",
    length_penalty: float = 0.0,
) -> Candidates:
    """The W best items of each of B prompts; semantics in the module's text.

    ``score_space``: log-probs over the admissible tokens (``trie``; forced tokens count exactly 0) or over the whole
    vocabulary (``vocab``). ``length_penalty`` p divides the final score by ``length ** p``, EOS counted. Only running
    beams are passed to ``lm.extend``. With W >= the number of distinct paths the result is the exact ranking of the
    whole catalogue; an item of probability 0 is never returned.
    Raises ConfigError (width, score space), DataError (prompt without tokens), CatalogError (token beyond the model's
    vocabulary), TawinError (NaN logits).
    """
    check_search(lm, prompts, trie, width)
    if score_space not in SCORE_SPACES:
        raise ConfigError(f"score_space={score_space!r} is not known; use one of {', '.join(SCORE_SPACES)}")
    if len(prompts) == 0:
        return no_candidates(width, trie.max_depth)
    reserve = trie.decision_depth if score_space == "trie" else trie.max_depth - 1
    logits, cache = lm.prefill(*prompts.padded(), reserve=reserve)
    beams = _first_beams(len(prompts), logits)
    finished = _none_finished(len(prompts), width, logits)
    steps = [beams]
    for length in range(1, trie.max_depth + 1):
        ranking = _rank(beams, logits, trie, len(prompts), score_space)
        finished = _finish(finished, ranking, width, length**length_penalty)
        best_length = trie.max_depth if length_penalty > 0 else length + 1
        beams = _advance(beams, ranking, finished, width, best_length**length_penalty)
        if len(beams.prompt_R) == 0:
            break
        steps.append(beams)
        runs_R = _needs_model(beams, trie, score_space)
        if bool(runs_R.any()):
            token_R = trie.tensors(logits.device).child_tokens[beams.node_R - 1]
            logits, cache = lm.extend(cache, beams.lm_row_R[runs_R], token_R[runs_R])
        beams = _with_rows(beams, runs_R)
    logprobs_BWT = _trace(steps, finished, trie)
    return candidates_from(trie, finished.leaf_BW, finished.score_BW, logprobs_BWT)


def _first_beams(num_prompts: int, logits_BV: Tensor) -> _Beams:
    row_B = torch.arange(num_prompts, device=logits_BV.device)
    zero_B = torch.zeros(num_prompts, dtype=_score_dtype(logits_BV), device=logits_BV.device)
    return _Beams(row_B, torch.full_like(row_B, TokenTrie.root), zero_B, row_B, row_B, zero_B)


def _none_finished(num_prompts: int, width: int, logits: Tensor) -> _Finished:
    none_BW = torch.full((num_prompts, width), -1, dtype=torch.long, device=logits.device)
    score_BW = torch.full(none_BW.shape, -torch.inf, dtype=_score_dtype(logits), device=logits.device)
    return _Finished(score_BW, none_BW, none_BW, torch.zeros_like(score_BW))


def _score_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _rank(beams: _Beams, logits: Tensor, trie: TokenTrie, num_prompts: int, space: str) -> _Ranking:
    """All continuations of all beams, ranked within their prompt; ties stay in the order (parent beam, token)."""
    position_E, token_E, child_E = trie.children_of(beams.node_R)
    logp_E = edge_logprobs(logits, beams.lm_row_R, position_E, token_E, space)
    prompt_E = beams.prompt_R[position_E]
    count_B = torch.bincount(prompt_E, minlength=num_prompts)
    column_E = torch.arange(len(prompt_E), device=prompt_E.device) - (count_B.cumsum(0) - count_B)[prompt_E]
    score_BC = logp_E.new_full((num_prompts, int(count_B.max())), -torch.inf)
    score_BC[prompt_E, column_E] = beams.score_R[position_E] + logp_E
    edge_BC = torch.full(score_BC.shape, -1, device=prompt_E.device)
    edge_BC[prompt_E, column_E] = torch.arange(len(prompt_E), device=prompt_E.device)

    score_BC, order_BC = score_BC.sort(dim=1, descending=True, stable=True)
    edge_BC = edge_BC.gather(1, order_BC)
    safe_BC = edge_BC.clamp(min=0)
    node_BC = child_E[safe_BC]
    ends_BC = trie.tensors(logits.device).is_leaf[node_BC] & (edge_BC >= 0)
    return _Ranking(score_BC, edge_BC, node_BC, position_E[safe_BC], logp_E[safe_BC], ends_BC)


def _finish(finished: _Finished, ranking: _Ranking, width: int, norm: float) -> _Finished:
    """Merge the paths that end within the best ``width`` continuations into the finished ones."""
    ends_BW = ranking.ends_BC[:, :width]
    score_BW = torch.where(ends_BW, ranking.score_BC[:, :width] / norm, -torch.inf)
    # Stable, with the earlier finished first: an equal score does not displace them.
    merged_BW, order_BW = torch.cat([finished.score_BW, score_BW], dim=1).sort(dim=1, descending=True, stable=True)
    order_BW = order_BW[:, :width]

    def merge(old_BW: Tensor, new_BC: Tensor) -> Tensor:
        return torch.cat([old_BW, new_BC[:, :width]], dim=1).gather(1, order_BW)

    merged_BW = merged_BW[:, :width]
    leaf_BW = merge(finished.leaf_BW, ranking.node_BC)
    return _Finished(
        score_BW=merged_BW,
        leaf_BW=torch.where(merged_BW == -torch.inf, -1, leaf_BW),
        parent_BW=merge(finished.parent_BW, ranking.parent_BC),
        logp_BW=merge(finished.logp_BW, ranking.logp_BC),
    )


def _advance(beams: _Beams, ranking: _Ranking, finished: _Finished, width: int, best_norm: float) -> _Beams:
    """The best ``width`` continuations that do not end a path, without those that can no longer enter the result.

    ``best_norm`` is the largest norm that a negative score can still be divided by. A beam dropped by this bound
    scores below every beam that is kept, and so do its continuations: it would not change the rank of any of them.
    """
    worst_B1 = finished.score_BW[:, -1:]  # -inf while a slot is free
    runs_BC = (ranking.edge_BC >= 0) & ~ranking.ends_BC & (ranking.score_BC / best_norm > worst_B1)
    runs_BC &= runs_BC.cumsum(dim=1) <= width
    prompt_R = runs_BC.nonzero()[:, 0]
    parent_R = ranking.parent_BC[runs_BC]
    return _Beams(
        prompt_R=prompt_R,
        node_R=ranking.node_BC[runs_BC],
        score_R=ranking.score_BC[runs_BC],
        lm_row_R=beams.lm_row_R[parent_R],
        parent_R=parent_R,
        logp_R=ranking.logp_BC[runs_BC],
    )


def _needs_model(beams: _Beams, trie: TokenTrie, space: str) -> Tensor:
    if space == "trie":
        return ~trie.tensors(beams.node_R.device).is_settled[beams.node_R]
    return torch.ones_like(beams.node_R, dtype=torch.bool)


def _with_rows(beams: _Beams, runs_R: Tensor) -> _Beams:
    return replace(beams, lm_row_R=torch.where(runs_R, runs_R.cumsum(0) - 1, -1))


def _trace(steps: list[_Beams], finished: _Finished, trie: TokenTrie) -> Tensor:
    """``logprobs_BWT`` of the finished paths, along the back-pointers; 0 at padding. T = longest path searched."""
    leaf_BW = finished.leaf_BW
    length_BW = torch.where(leaf_BW < 0, 0, trie.tensors(leaf_BW.device).depth[leaf_BW.clamp(min=0)])
    logprobs_BWT = finished.logp_BW.new_zeros((*leaf_BW.shape, len(steps)))
    row_BW = finished.parent_BW
    for depth in reversed(range(1, len(steps) + 1)):
        column_BW = torch.where(length_BW == depth, finished.logp_BW, 0)
        if depth < len(steps):
            inner_BW = length_BW > depth
            beams, safe_BW = steps[depth], torch.where(inner_BW, row_BW, 0)
            column_BW = torch.where(inner_BW, beams.logp_R[safe_BW], column_BW)
            row_BW = torch.where(inner_BW, beams.parent_R[safe_BW], row_BW)
        logprobs_BWT[..., depth - 1] = column_BW
    return logprobs_BWT
