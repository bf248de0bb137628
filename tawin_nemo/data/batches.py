"""Which rows come when, and how rows of prompt and answer become one padded token batch.

The order of the data is a pure function of (seed, step): nothing has to be saved to continue a run, and every
process computes the same order and takes its own share of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.errors import CatalogError
from tawin_nemo.types import Children, DataParallel, Rollout, TokenBatch, TokenRows


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``0..n-1`` that depends on its three arguments only."""
    return np.random.default_rng([seed, epoch]).permutation(n)


@dataclass(frozen=True)
class BatchStream:
    """Endless batches over ``n`` rows: shuffled epochs one after another, each row once per epoch.

    A batch may hold the end of one epoch and the beginning of the next; all batches have ``batch_size`` rows.
    """

    n: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1:
            raise ValueError(f"a stream needs rows and a batch size, not n={self.n}, batch_size={self.batch_size}")

    def batch(self, step: int) -> np.ndarray:
        """Row indices of step ``step`` (0-based)."""
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        for epoch in range(start // self.n, (stop - 1) // self.n + 1):
            order, first = epoch_order(self.n, self.seed, epoch), epoch * self.n
            parts.append(order[max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def epoch(self, step: int) -> float:
        """Passes over the data that are complete before step ``step``."""
        return step * self.batch_size / self.n


def micro_batches(lengths_N: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Split rows into groups of similar length with at most ``token_budget`` tokens each, padding included.

    Longest rows first, so that a batch too large for the memory fails at once; every row is in one group. A row
    longer than the budget is a group of its own.
    """
    order = np.argsort(-np.asarray(lengths_N), kind="stable")
    groups, start = [], 0
    while start < len(order):
        size = max(1, token_budget // max(1, int(lengths_N[order[start]])))
        groups.append(order[start : start + size])
        start += size
    return groups


def shard(rows: np.ndarray, dp: DataParallel) -> np.ndarray:
    """This replica's rows; the replicas' shares are disjoint, together complete, and differ by one row at most."""
    return rows[dp.rank :: dp.size]


@dataclass(frozen=True)
class ChainIndex:
    """Which answer token each of the N scored places of a ``TokenBatch`` is."""

    row_N: Tensor  # row of the batch
    token_N: Tensor  # 0-based token of that row's answer

    def scatter(self, values_N: Tensor, num_rows: int, num_tokens: int) -> Tensor:
        """``values_BT`` by row and answer token; 0 where nothing is scored (forced tokens, padding)."""
        values_BT = values_N.new_zeros((num_rows, num_tokens))
        place = (self.row_N.to(values_N.device), self.token_N.to(values_N.device))
        return values_BT.index_put(place, values_N)


@dataclass(frozen=True)
class _Scored:
    """The scored answer tokens of a batch, row by row; ``node_N`` is the trie node before each."""

    row_N: np.ndarray
    token_N: np.ndarray
    target_N: np.ndarray
    node_N: np.ndarray | None


def chain_batch(prompts: TokenRows, answers: TokenRows, trie: TokenTrie | None) -> tuple[TokenBatch, ChainIndex]:
    """Rows of prompt + answer in which every token of the answer that carries probability is scored.

    Vocabulary space (no trie): all answer tokens; the last one is scored but never an input. Trie space: only tokens
    with an alternative, since the log-prob of a forced token is exactly 0; inputs end before the last such token.
    Scored places are ordered by row, then token. Every prompt needs at least one token.

    Raises CatalogError for an answer that is not a path of the trie, beginning at its root.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; give one answer per prompt")
    if len(prompts) and not prompts.lengths.min():
        raise ValueError(
            f"prompt {int(prompts.lengths.argmin())} is empty; the first answer token needs a token before it"
        )
    scored = _scored_tokens(answers, trie)
    inputs_B = _answer_inputs(scored, len(answers))
    tokens_BT = np.zeros((len(prompts), int((prompts.lengths + inputs_B).max(initial=0))), dtype=np.int64)
    tokens_BT[np.arange(tokens_BT.shape[1]) < prompts.lengths[:, None]] = prompts.flat
    row_E, token_E = _ragged(inputs_B)
    tokens_BT[row_E, prompts.lengths[row_E] + token_E] = answers.flat[answers.offsets[row_E] + token_E]
    index = ChainIndex(torch.from_numpy(scored.row_N), torch.from_numpy(scored.token_N))
    batch = TokenBatch(
        tokens_BT=torch.from_numpy(tokens_BT),
        lengths_B=torch.from_numpy(prompts.lengths + inputs_B),
        row_N=index.row_N,
        position_N=torch.from_numpy(prompts.lengths[scored.row_N] - 1 + scored.token_N),
        target_N=torch.from_numpy(scored.target_N),
        children=None if trie is None else _children(scored, trie),
    )
    return batch, index


def chain_lengths(prompts: TokenRows, answers: TokenRows, trie: TokenTrie | None) -> np.ndarray:
    """Input tokens that ``chain_batch`` will make of each row, for ``micro_batches``."""
    return prompts.lengths + _answer_inputs(_scored_tokens(answers, trie), len(answers))


def candidate_batch(rollout: Rollout, rows: Tensor, trie: TokenTrie | None) -> tuple[TokenBatch, ChainIndex]:
    """``chain_batch`` over candidates of a rollout, each behind its own copy of the prompt.

    ``rows`` are flat indices ``b * G + g`` of valid candidates. Raises ValueError for a candidate that is NO_ITEM.
    """
    flat_R = rows.cpu()
    lengths_R = rollout.lengths_BG.cpu().flatten()[flat_R].numpy()
    if len(lengths_R) and not lengths_R.min():
        raise ValueError(f"candidate {int(flat_R[int(lengths_R.argmin())])} is NO_ITEM; select from rollout.valid_BG")
    tokens_RT = rollout.tokens_BGT.cpu().flatten(0, 1)[flat_R].numpy()
    paths = TokenRows(
        tokens_RT[np.arange(tokens_RT.shape[1]) < lengths_R[:, None]],
        np.concatenate([[0], np.cumsum(lengths_R)]).astype(np.int64),
    )
    prompts = rollout.prompts.prompts.take((flat_R // rollout.items_BG.shape[1]).numpy())
    return chain_batch(prompts, paths, trie)


def _scored_tokens(answers: TokenRows, trie: TokenTrie | None) -> _Scored:
    row_N, token_N = _ragged(answers.lengths)
    if trie is None:
        return _Scored(row_N, token_N, answers.flat, None)
    nodes_BT = trie.walk(*answers.padded())
    before_N = nodes_BT[torch.from_numpy(row_N), torch.from_numpy(token_N)]
    on_trie_N = (trie.step_many(before_N, torch.from_numpy(answers.flat)) >= 0).numpy()
    if not on_trie_N.all():
        place = int(np.flatnonzero(~on_trie_N)[0])
        raise CatalogError(
            f"answer {row_N[place]} leaves the catalogue at its token {token_N[place]} ({answers.flat[place]}): "
            f"{answers[int(row_N[place])].tolist()}; build the answers from catalog.paths with the same tokenizer"
        )
    node_N = before_N.numpy()
    branching_N = trie.child_offsets[node_N + 1] - trie.child_offsets[node_N] > 1
    return _Scored(row_N[branching_N], token_N[branching_N], answers.flat[branching_N], node_N[branching_N])


def _answer_inputs(scored: _Scored, num_rows: int) -> np.ndarray:
    """Answer tokens of each row that are inputs: those before its last scored token."""
    inputs_B = np.zeros(num_rows, dtype=np.int64)
    inputs_B[scored.row_N] = scored.token_N  # ordered by token within a row: the last one stays
    return inputs_B


def _children(scored: _Scored, trie: TokenTrie) -> Children:
    assert scored.node_N is not None
    position_E, token_E, _ = trie.children_of(torch.from_numpy(scored.node_N))
    chosen_N = (token_E == torch.from_numpy(scored.target_N)[position_E]).nonzero().squeeze(1)
    return Children(position_E, token_E, chosen_N)


def _ragged(lengths_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every cell of a ragged array, row by row."""
    row_E = np.repeat(np.arange(len(lengths_B)), lengths_B)
    first_B = np.cumsum(lengths_B) - lengths_B
    return row_E, np.arange(len(row_E)) - first_B[row_E]
