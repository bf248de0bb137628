"""Prompts with the trees of their answers as flat token batches in which every common prefix is stored once.

The distinct answers of a prompt in lexicographic order are a preorder of their tree: each shares its first
``shared_U`` tokens with the answer before it and adds the rest. Of depth d's token on the path of answer u, the last
answer up to u that shares at most d tokens is the one that added it, and the next answer that shares at most d tokens
stands behind its last descendant. Both hold for all (u, d) at once, so nothing here loops over answers or tokens.

Axes besides those of types.py: A answers, U distinct answers of one prompt (by prompt, then lexicographic), D depth
(0-based index of a token in its answer).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.data.batches import micro_batches
from tawin_nemo.types import Children, TokenBatch, TokenRows
from tawin_nemo.util.errors import CatalogError


@dataclass(frozen=True)
class AnswerIndex:
    """The answer, and the 0-based token in it, that each of the N log-probs of a batch belongs to."""

    answer_N: Tensor  # ascending
    token_N: Tensor  # ascending within an answer


@dataclass(frozen=True)
class _Scored:
    """The tokens with a log-prob, by distinct answer and depth; ``node_R`` is the trie node before each."""

    answer_R: np.ndarray  # index into U
    depth_R: np.ndarray
    node_R: np.ndarray | None


@dataclass(frozen=True)
class _Trees:
    """The distinct answers of all prompts and the prefixes that they share."""

    prompt_U: np.ndarray
    tokens_UT: np.ndarray  # padded with 0
    inputs_U: np.ndarray  # tokens before the last scored one
    shared_U: np.ndarray  # inputs in common with the answer before it; 0 for the first of a prompt
    distinct_A: np.ndarray  # the distinct answer (index into U) of each answer
    scored: _Scored


def tree_batch(
    prompts: TokenRows, answers: TokenRows, prompt_A: np.ndarray, trie: TokenTrie | None
) -> tuple[TokenBatch, AnswerIndex]:
    """B prompts, each followed by the tree of its answers; equal answers of one prompt share all their tokens.

    Vocabulary space (no trie): all answer tokens are scored; the last one is no input. Trie space: only tokens with an
    alternative, since the log-prob of a forced token is exactly 0; inputs end at the last node with a choice.
    ``prompt_A = arange`` gives plain rows.

    Args:
        prompts: B rows of at least one token.
        answers: A token paths, EOS included.
        prompt_A: The prompt of each answer, ascending; every prompt has one at least.
        trie: The catalog, for trie space.

    Returns:
        The batch and the meaning of its N log-probs, ordered by answer, then token; int64 on the CPU.

    Raises:
        ValueError: an empty prompt, or a prompt without answers.
        CatalogError: an answer that is not a path of the trie.
    """
    trees = _trees(prompts, answers, prompt_A, trie)
    depths = trees.inputs_U.max(initial=0)
    added_U = trees.inputs_U - trees.shared_U
    size_B = _sizes(prompts, trees)
    end_B = np.cumsum(size_B)
    begin_U = np.cumsum(prompts.lengths)[trees.prompt_U] + np.cumsum(added_U) - added_U  # of what each answer adds

    tokens_S, position_S, end_S = (np.empty(size_B.sum(), dtype=np.int64) for _ in range(3))
    row_E, position_E = ragged(prompts.lengths)
    index_E = (end_B - size_B)[row_E] + position_E
    tokens_S[index_E], position_S[index_E], end_S[index_E] = prompts.flat, position_E, end_B[row_E]
    answer_E, extra_E = ragged(added_U)
    depth_E = trees.shared_U[answer_E] + extra_E
    prompt_E, index_E = trees.prompt_U[answer_E], begin_U[answer_E] + extra_E
    tokens_S[index_E] = trees.tokens_UT[answer_E, depth_E]
    position_S[index_E] = prompts.lengths[prompt_E] + depth_E
    behind_E = _next_outside(trees.shared_U, depths)[answer_E, depth_E]
    end_S[index_E] = np.minimum(np.append(begin_U, size_B.sum())[behind_E], end_B[prompt_E])

    index_UD = _token_indices(begin_U, trees.shared_U, depths)
    chain_B = _chains(end_S, size_B)
    index_P, row_N, target_N, children, index = _scores(trees, end_B - size_B + prompts.lengths - 1, index_UD, trie)
    batch = TokenBatch(
        tokens_S=torch.from_numpy(tokens_S),
        position_S=torch.from_numpy(position_S),
        end_S=torch.from_numpy(end_S),
        chain_B=torch.from_numpy(chain_B),
        tree_B=torch.from_numpy(size_B - chain_B),
        index_P=torch.from_numpy(index_P),
        row_N=torch.from_numpy(row_N),
        target_N=torch.from_numpy(target_N),
        children=children,
    )
    return batch, index


def tree_sizes(prompts: TokenRows, answers: TokenRows, prompt_A: np.ndarray, trie: TokenTrie | None) -> np.ndarray:
    """``tokens_B``: tokens that each prompt will have in ``tree_batch``, whose arguments and errors these are."""
    return _sizes(prompts, _trees(prompts, answers, prompt_A, trie))


def tree_batches(
    prompts: TokenRows, answers: TokenRows, prompt_A: np.ndarray, trie: TokenTrie | None, token_budget: int
) -> list[tuple[TokenBatch, AnswerIndex, np.ndarray]]:
    """``tree_batch`` in parts of at most ``token_budget`` tokens, longest prompts first (``micro_batches``).

    With every part comes ``answer_M``, the answers in it: its index counts them from 0. Arguments and errors are those
    of ``tree_batch``.
    """
    sizes_B = tree_sizes(prompts, answers, prompt_A, trie)
    counts_B = np.bincount(prompt_A, minlength=len(prompts))
    answers_of = TokenRows(np.arange(len(answers)), np.concatenate([[0], np.cumsum(counts_B)]))
    parts = []
    for rows in micro_batches(sizes_B, token_budget):
        picked = answers_of.take(rows)
        prompt_M = np.repeat(np.arange(len(rows)), picked.lengths)
        batch, index = tree_batch(prompts.take(rows), answers.take(picked.flat), prompt_M, trie)
        parts.append((batch, index, picked.flat))
    return parts


def ragged(lengths_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every cell of a ragged array, row by row."""
    row_E = np.repeat(np.arange(len(lengths_B)), lengths_B)
    first_B = np.cumsum(lengths_B) - lengths_B
    return row_E, np.arange(len(row_E)) - first_B[row_E]


# -- the trees -----------------------------------------------------------------------------------------------------
def _trees(prompts: TokenRows, answers: TokenRows, prompt_A: np.ndarray, trie: TokenTrie | None) -> _Trees:
    _check_rows(prompts, answers, prompt_A)
    tokens_AT, lengths_A = (tensor.numpy() for tensor in answers.padded())
    first_U, distinct_A = _distinct(tokens_AT, lengths_A, prompt_A)
    tokens_UT, prompt_U = tokens_AT[first_U], prompt_A[first_U]
    if trie is None:
        scored = _Scored(*ragged(lengths_A[first_U]), node_R=None)
    else:
        scored = _choices(answers.take(first_U), trie, first_U)
    inputs_U = np.zeros(len(first_U), dtype=np.int64)
    inputs_U[scored.answer_R] = scored.depth_R  # ordered by depth within an answer: the last one stays
    shared_U = np.zeros_like(inputs_U)
    if len(first_U) > 1:
        same_UD = (tokens_UT[1:] == tokens_UT[:-1])[:, : inputs_U.max()]
        common_U = np.logical_and.accumulate(same_UD, axis=1).sum(axis=1)
        # No catalog path is the beginning of another; where an answer is, it has fewer inputs than they share.
        common_U = np.minimum(common_U, np.minimum(inputs_U[1:], inputs_U[:-1]))
        shared_U[1:] = np.where(prompt_U[1:] == prompt_U[:-1], common_U, 0)
    return _Trees(prompt_U, tokens_UT, inputs_U, shared_U, distinct_A, scored)


def _check_rows(prompts: TokenRows, answers: TokenRows, prompt_A: np.ndarray) -> None:
    if len(prompt_A) != len(answers):
        raise ValueError(f"{len(answers)} answers but {len(prompt_A)} entries in prompt_A; give each answer its prompt")
    if len(prompts) and not prompts.lengths.min():
        raise ValueError(
            f"prompt {int(prompts.lengths.argmin())} is empty; the first answer token needs a token before it"
        )
    if len(prompt_A) and ((np.diff(prompt_A) < 0).any() or prompt_A[0] < 0 or prompt_A[-1] >= len(prompts)):
        raise ValueError(f"prompt_A must ascend within 0 .. {len(prompts) - 1}; sort the answers by their prompt")
    alone = np.flatnonzero(np.bincount(prompt_A, minlength=len(prompts)) == 0)
    if len(alone):
        raise ValueError(f"prompt {int(alone[0])} has no answers ({len(alone)} such prompts); leave these prompts out")


def _distinct(tokens_AT: np.ndarray, lengths_A: np.ndarray, prompt_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One answer for each distinct one, by prompt and lexicographic order, and each answer's index among these."""
    keys_AT = np.zeros((len(tokens_AT), tokens_AT.shape[1] + 1), dtype=">u4")  # big-endian: bytes sort like numbers
    keys_AT[:, 0] = prompt_A
    keys_AT[:, 1:] = np.where(np.arange(tokens_AT.shape[1]) < lengths_A[:, None], tokens_AT + 1, 0)
    keys_A = keys_AT.view(f"S{4 * keys_AT.shape[1]}").ravel()
    _, first_U, distinct_A = np.unique(keys_A, return_index=True, return_inverse=True)
    return first_U, distinct_A


def _sizes(prompts: TokenRows, trees: _Trees) -> np.ndarray:
    size_B = prompts.lengths.copy()
    np.add.at(size_B, trees.prompt_U, trees.inputs_U - trees.shared_U)
    return size_B


def _chains(end_S: np.ndarray, size_B: np.ndarray) -> np.ndarray:
    """Tokens of each prompt before the first one that is not seen by everything behind it."""
    if not len(size_B):
        return size_B
    end_B = np.cumsum(size_B)
    block_S = np.repeat(end_B, size_B)
    stop_S = np.where(end_S < block_S, np.arange(len(end_S)), block_S)
    return np.minimum.reduceat(stop_S, end_B - size_B) - (end_B - size_B)


def _token_indices(begin_U: np.ndarray, shared_U: np.ndarray, depths: int) -> np.ndarray:
    """``index_UD``: index into S of the token at depth D of each answer's path (meaningless behind its inputs)."""
    adds_UD = shared_U[:, None] <= np.arange(depths)
    owner_UD = np.maximum.accumulate(np.where(adds_UD, np.arange(len(shared_U))[:, None], 0), axis=0)
    return (begin_U - shared_U)[owner_UD] + np.arange(depths)


def _next_outside(shared_U: np.ndarray, depths: int) -> np.ndarray:
    """``next_UD``: the first answer behind U without U's token at depth D; a prompt's first answer always is one."""
    leaves_UD = shared_U[:, None] <= np.arange(depths)
    at_UD = np.where(leaves_UD, np.arange(len(shared_U))[:, None], len(shared_U))
    next_UD = np.full_like(at_UD, len(shared_U))
    next_UD[:-1] = np.minimum.accumulate(at_UD[:0:-1], axis=0)[::-1]
    return next_UD


# -- what is scored ------------------------------------------------------------------------------------------------
def _scores(
    trees: _Trees, last_B: np.ndarray, index_UD: np.ndarray, trie: TokenTrie | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Children | None, AnswerIndex]:
    """Indices, row and target of every log-prob, children, index. ``last_B`` is the index of a prompt's last token."""
    answer_R, depth_R = trees.scored.answer_R, trees.scored.depth_R
    index_R = last_B[trees.prompt_U[answer_R]]
    deeper = depth_R > 0
    index_R[deeper] = index_UD[answer_R[deeper], depth_R[deeper] - 1]
    index_P, first_P, row_R = np.unique(index_R, return_index=True, return_inverse=True)
    # Answers that are equal read the same log-probs.
    count_U = np.bincount(answer_R, minlength=len(trees.prompt_U))
    answer_N, nth_N = ragged(count_U[trees.distinct_A])
    scored_N = (np.cumsum(count_U) - count_U)[trees.distinct_A[answer_N]] + nth_N
    row_N, token_N = row_R[scored_N], depth_R[scored_N]
    target_N = trees.tokens_UT[answer_R, depth_R][scored_N]
    children = None
    if trie is not None:
        assert trees.scored.node_R is not None
        children = _children(trie, trees.scored.node_R[first_P], row_N, target_N)
    return index_P, row_N, target_N, children, AnswerIndex(torch.from_numpy(answer_N), torch.from_numpy(token_N))


def _children(trie: TokenTrie, node_P: np.ndarray, row_N: np.ndarray, target_N: np.ndarray) -> Children:
    position_E, token_E, _ = trie.edges_of(torch.from_numpy(node_P))
    stride = trie.max_token + 1
    chosen_N = torch.searchsorted(position_E * stride + token_E, torch.from_numpy(row_N * stride + target_N))
    return Children(position_E, token_E, chosen_N)


def _choices(paths: TokenRows, trie: TokenTrie, names: np.ndarray) -> _Scored:
    """The tokens that have an alternative, found by walking down all paths at once.

    Raises CatalogError for a path that is not one of the trie's; ``names`` are the numbers to call the paths by.
    """
    node_U = torch.zeros(len(paths), dtype=torch.long)
    lengths_U, offset_U = torch.from_numpy(paths.lengths), torch.from_numpy(paths.offsets)
    flat = torch.from_numpy(np.append(paths.flat, 0))  # the last row may be cut short
    walking_R = (~trie.is_leaf(node_U)).nonzero().squeeze(1)
    walked = [(node_U[:0], node_U[:0], node_U[:0])]
    while len(walking_R):
        node_R = node_U[walking_R]
        depth_R = trie.depth_of(node_R)
        inside_R = depth_R < lengths_U[walking_R]
        child_R = trie.follow(node_R, flat[offset_U[walking_R] + torch.where(inside_R, depth_R, 0)])
        child_R = torch.where(inside_R, child_R, -1)
        walked.append((walking_R, depth_R, node_R))
        node_U[walking_R] = torch.where(child_R >= 0, child_R, node_R)
        walking_R = walking_R[(child_R >= 0) & ~trie.is_leaf(child_R)]
    _check_paths(paths, trie, node_U, names)
    answer_R, depth_R, node_R = (torch.cat(column) for column in zip(*walked, strict=True))
    order_R = torch.argsort(answer_R, stable=True)
    return _Scored(*(column[order_R].numpy() for column in (answer_R, depth_R, node_R)))


def _check_paths(paths: TokenRows, trie: TokenTrie, node_U: Tensor, names: np.ndarray) -> None:
    """CatalogError for the first path that does not end, token by token, at its node, a leaf."""
    depth_U = trie.depth_of(node_U).numpy()
    known_U = np.minimum(depth_U, paths.lengths)
    label_E = trie.labels(node_U, torch.zeros_like(node_U), torch.from_numpy(known_U)).numpy()
    row_E, token_E = ragged(known_U)
    other_E = np.flatnonzero(label_E != paths.flat[paths.offsets[row_E] + token_E])
    never = np.iinfo(np.int64).max
    at_U = np.where(trie.is_leaf(node_U).numpy() & (depth_U == paths.lengths), never, known_U)
    np.minimum.at(at_U, row_E[other_E], token_E[other_E])
    bad = np.flatnonzero(at_U < never)
    if not len(bad):
        return
    row = int(bad[np.argmin(names[bad])])
    index, tokens = int(at_U[row]), paths[row].tolist()
    what = f"leaves the catalog at its token {index} ({tokens[index]})" if index < len(tokens) else "is cut short"
    raise CatalogError(
        f"answer {names[row]} {what}: {tokens}; build the answers from catalog.paths with the same tokenizer"
    )
