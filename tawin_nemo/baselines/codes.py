"""Items as rows of codes for an encoder-decoder, and the tree of those rows that a constrained search walks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.types import NO_ITEM, Record, TokenRows

#: The first two entries of the vocabulary (T5's own numbers).
PAD, END = 0, 1
#: Where ``CodeTree.states_of`` has no state: nothing is left to choose there.
NO_STATE = -1


@dataclass(frozen=True)
class CodeBook:
    """``rows``: the codes of I items, END last; ``vocab``: PAD, END, then one token per pair of level and code."""

    rows: TokenRows
    vocab: int

    @classmethod
    def from_paths(cls, paths: TokenRows) -> CodeBook:
        """Number the token paths of a catalog anew, each level apart (TIGER's level offsets).

        The last token of every path is its end of text and becomes END. Equal paths become equal rows.
        """
        level_S = np.arange(len(paths.flat)) - np.repeat(paths.offsets[:-1], paths.lengths)
        code_S = level_S < np.repeat(paths.lengths, paths.lengths) - 1
        pairs = level_S * (int(paths.flat.max()) + 1) + paths.flat
        distinct, number = np.unique(pairs[code_S], return_inverse=True)
        flat = np.full(len(paths.flat), END, dtype=np.int64)
        flat[code_S] = number + 2
        return cls(TokenRows(flat, paths.offsets), len(distinct) + 2)


@dataclass(frozen=True)
class CodeTree(Record):
    """Prefixes of the rows as N states, state 0 the empty one; a state of only one row is final and leads to itself.

    ``child_token``, ``child_state`` hold the continuations of state n at ``offsets[n] .. offsets[n + 1] - 1``.
    """

    offsets: Tensor  # [N + 1]
    child_token: Tensor  # [E]
    child_state: Tensor  # [E]
    item_N: Tensor  # first item of a final state's row, -1 elsewhere
    carrier_I: Tensor  # first item with the same row
    num_rows: int  # distinct rows

    @classmethod
    def from_rows(cls, rows: TokenRows) -> CodeTree:
        """Raises CatalogError as ``TokenTrie.from_paths`` does."""
        trie = TokenTrie.from_paths(rows)
        positions, items, edges = [trie.root], [], []  # positions grows while it is walked: breadth first
        for state, position in enumerate(positions):
            node = position % trie.num_nodes
            if node >= trie.num_inner:  # nothing is left to choose on the way to this leaf
                items.append(int(trie.items(node)[0]))
                edges.append([(PAD, state)])
                continue
            items.append(-1)
            tokens, children = trie.children(position)
            edges.append([(int(token), len(positions) + i) for i, token in enumerate(tokens)])
            positions.extend(children.tolist())
        counts = [len(out) for out in edges]
        flat = torch.tensor([edge for out in edges for edge in out])
        _, first, inverse = np.unique(trie.leaf_I, return_index=True, return_inverse=True)
        return cls(
            offsets=torch.tensor([0, *np.cumsum(counts).tolist()]),
            child_token=flat[:, 0],
            child_state=flat[:, 1],
            item_N=torch.tensor(items),
            carrier_I=torch.from_numpy(first[inverse]),
            num_rows=trie.num_leaves,
        )

    def children(self, state_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and next states [N, C] of the continuations and which of them exist; C = the most that a state has."""
        start_N, stop_N = self.offsets[state_N], self.offsets[state_N + 1]
        widest = int((stop_N - start_N).max())
        edge_NC = start_N.unsqueeze(1) + torch.arange(widest, device=state_N.device)
        exists_NC = edge_NC < stop_N.unsqueeze(1)
        edge_NC = edge_NC.clamp(max=len(self.child_token) - 1)
        return self.child_token[edge_NC], self.child_state[edge_NC], exists_NC

    def states_of(self, codes_IC: Tensor) -> Tensor:
        """The state in which each code of a row is chosen [I, C], NO_STATE from the row's final state on.

        ``codes_IC``: rows of this tree, padded behind their end.
        """
        state_I, columns = torch.zeros(len(codes_IC), dtype=torch.long), []
        for code_I in codes_IC.T:
            open_I = self.item_N[state_I] == NO_ITEM
            columns.append(state_I.masked_fill(~open_I, NO_STATE))
            token_IC, next_IC, exists_IC = self.children(state_I)
            taken_I = (exists_IC & (token_IC == code_I.unsqueeze(1))).int().argmax(dim=1, keepdim=True)
            state_I = torch.where(open_I, next_IC.gather(1, taken_I).squeeze(1), state_I)
        return torch.stack(columns, dim=1)
