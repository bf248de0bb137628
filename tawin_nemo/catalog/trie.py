"""Path-compressed (radix) trie over the catalog's token paths, as frozen arrays.

Only nodes with a choice are kept. Inner nodes are 0 .. num_inner - 1 in the order of (depth, first leaf); node
``num_inner + r`` is the leaf of the distinct path that begins at rank r of the sorted items, so that items with equal
paths have the ranks behind their leaf. The root is node 0: the only leaf if all items share one path, and deeper than 0
if all paths begin alike. An edge carries a *label* of one or more tokens; no two labels of one node begin with the same
token.

Inspection and slow oracles walk token by token: a *position* is ``node + num_nodes * (tokens still to go to that
node)``, so a node id is the position at that node, and ``root`` the position before the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie_arrays import Spans, TrieArrays, load_arrays, save_arrays
from tawin_nemo.catalog.trie_build import build_arrays
from tawin_nemo.types import TokenRows


@dataclass(frozen=True)
class TrieTensors:
    """The trie on one device; n inner nodes, E edges, I items, V = n + I node ids. Integers as narrow as on disk."""

    child_offsets: Tensor  # [n + 3] as TrieArrays, with a 0 before and an E behind: nodes -1 and n have no edges
    child_tokens: Tensor  # [E]
    child_nodes: Tensor  # [E]
    node_depth: Tensor  # [V]
    node_item: Tensor  # [V]
    pool_tokens: Tensor
    pool_offsets: Tensor  # [I + 1]


@dataclass(frozen=True, eq=False)
class TokenTrie:
    """Immutable trie; build with ``from_paths``, ``save`` to and ``load`` from a folder.

    The vectorised methods take tensors on any device and return int64 tensors (or bool) on the same one. Node -1
    stands for "none".
    """

    arrays: TrieArrays

    @classmethod
    def from_paths(cls, paths: TokenRows | list[list[int]], names: Sequence[str] | None = None) -> TokenTrie:
        """Trie in which item ``i`` ends at the leaf of ``paths[i]``; items with equal paths share one leaf.

        ``names`` (one per item) only make messages readable. Rows of int32 are kept, not copied. Raises CatalogError
        for an empty catalog, an empty path, a token outside 0 .. 2^31 - 1, or a path that is the beginning of
        another one (end every path with EOS).
        """
        return cls(build_arrays(paths if isinstance(paths, TokenRows) else TokenRows.from_lists(paths), names))

    def save(self, folder: Path, *, tokenizer: str = "") -> None:
        """Write the arrays and a manifest with their SHA-256 to a folder, whole or not at all.

        ``tokenizer``: fingerprint of the tokenizer that made the paths; token ids mean nothing without it.
        """
        save_arrays(self.arrays, folder, tokenizer)

    @classmethod
    def load(cls, folder: Path, *, tokenizer: str = "") -> TokenTrie:
        """Memory-map a saved trie.

        Raises CatalogError if a file is missing, of another format or altered, or the trie was saved with another
        tokenizer fingerprint.
        """
        return cls(load_arrays(folder, tokenizer))

    @property
    def num_items(self) -> int:
        """Number of items I, those with equal paths included."""
        return len(self.arrays.pool_offsets) - 1

    @property
    def num_inner(self) -> int:
        """Number of nodes with a choice."""
        return len(self.arrays.child_offsets) - 1

    @property
    def num_nodes(self) -> int:
        """Upper bound of the node ids; ids of items that share the leaf of the rank before are unused."""
        return self.num_inner + self.num_items

    @cached_property
    def num_leaves(self) -> int:
        """Number of distinct paths."""
        return int(np.count_nonzero(self.arrays.node_depth[self.num_inner :]))

    @cached_property
    def max_depth(self) -> int:
        """Tokens of the longest path."""
        return int(self.arrays.node_depth.max())

    @cached_property
    def decision_depth(self) -> int:
        """Depth of the deepest node that has a choice; below it nothing is left to decide (0 also if there is none)."""
        return int(self.arrays.node_depth[: self.num_inner].max(initial=0))

    @cached_property
    def max_token(self) -> int:
        """The largest token id on any path; the model's vocabulary must be larger."""
        return int(self.arrays.pool_tokens.max())

    @cached_property
    def leaf_I(self) -> np.ndarray:
        """Leaf of every item, int64."""
        leaf_I = np.empty(self.num_items, dtype=np.int64)
        leaf_I[self._order_I] = np.repeat(self.num_inner + self._first_rank_D, self._group_size_D)
        return leaf_I

    @cached_property
    def sharing_I(self) -> np.ndarray:
        """Number of items on each item's path, itself included (1 = unique). int64 [I]."""
        sharing_I = np.empty(self.num_items, dtype=np.int64)
        sharing_I[self._order_I] = np.repeat(self._group_size_D, self._group_size_D)
        return sharing_I

    @cached_property
    def spans(self) -> Spans:
        """The items below and the choices above every node; computed at the first use."""
        return Spans.of(self.arrays)

    def shared_leaves(self) -> np.ndarray:
        """Leaves of two or more items, ascending."""
        return self.num_inner + self._first_rank_D[self._group_size_D > 1]

    @property
    def index_bytes(self) -> int:
        """Memory of everything but the paths themselves."""
        return sum(getattr(self.arrays, f.name).nbytes for f in fields(TrieArrays)) - self.pool_bytes

    @property
    def pool_bytes(self) -> int:
        """Memory of the paths themselves."""
        return int(self.arrays.pool_tokens.nbytes + self.arrays.pool_offsets.nbytes)

    # --- many nodes at once -------------------------------------------------------------------------------------

    def tensors(self, device: torch.device | str = "cpu") -> TrieTensors:
        """The trie as tensors on ``device``, made once per device; on the CPU they share the arrays' memory."""
        key = str(torch.device(device))
        if key not in self._tensor_cache:
            offsets = self.arrays.child_offsets
            padded = np.concatenate([[0], offsets, offsets[-1:]]).astype(offsets.dtype)
            arrays = {f.name: getattr(self.arrays, f.name) for f in fields(TrieArrays)} | {"child_offsets": padded}
            self._tensor_cache[key] = TrieTensors(**{k: torch.from_numpy(a).to(device) for k, a in arrays.items()})
        return self._tensor_cache[key]

    def edges_of(self, nodes_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Edges out of N nodes as flat ``position_E`` (ascending index into N), ``token_E``, ``child_E``.

        ``token_E`` is the first token of the edge's label, ascending within a node. Leaves and -1 have no edges.
        """
        t = self.tensors(nodes_N.device)
        slot_N = nodes_N.clamp(max=self.num_inner) + 1
        start_N = _pick(t.child_offsets, slot_N)
        count_N = _pick(t.child_offsets, slot_N + 1) - start_N
        position_E, edge_E = _runs(start_N, count_N)
        return position_E, _pick(t.child_tokens, edge_E), _pick(t.child_nodes, edge_E)

    def follow(self, nodes_N: Tensor, tokens_N: Tensor) -> Tensor:
        """``child_N``: the child whose label begins with the token; -1 if there is none."""
        t = self.tensors(nodes_N.device)
        slot_N = nodes_N.clamp(max=self.num_inner) + 1
        low_N, end_N = _pick(t.child_offsets, slot_N), _pick(t.child_offsets, slot_N + 1)
        last = len(t.child_tokens) - 1
        if last < 0:
            return torch.full_like(nodes_N, -1)
        high_N = end_N
        for _ in range(self._max_degree.bit_length()):  # binary search for the first edge not below the token
            middle_N = (low_N + high_N) >> 1
            below_N = _pick(t.child_tokens, middle_N.clamp(max=last)) < tokens_N
            low_N, high_N = torch.where(below_N, middle_N + 1, low_N), torch.where(below_N, high_N, middle_N)
        edge_N = low_N.clamp(max=last)
        exists_N = (low_N < end_N) & (_pick(t.child_tokens, edge_N) == tokens_N)
        return torch.where(exists_N, _pick(t.child_nodes, edge_N), -1)

    def is_leaf(self, nodes_N: Tensor) -> Tensor:
        """Bool: the node is a finished path; False for -1."""
        return nodes_N >= self.num_inner

    def depth_of(self, nodes_N: Tensor) -> Tensor:
        """Tokens from the root; 0 for -1."""
        depth_N = _pick(self.tensors(nodes_N.device).node_depth, nodes_N.clamp(min=0))
        return depth_N.masked_fill_(nodes_N < 0, 0)

    def labels(self, nodes_N: Tensor, start_N: Tensor, stop_N: Tensor) -> Tensor:
        """``flat_S``: tokens ``start .. stop - 1`` (counted from 0) of the path from the root to each node, joined.

        Needs ``start <= stop <= depth_of(node)``; node -1 gives nothing if ``start == stop``.
        """
        t = self.tensors(nodes_N.device)
        first_N = _pick(t.pool_offsets, _pick(t.node_item, nodes_N.clamp(min=0))) + start_N
        return _pick(t.pool_tokens, _runs(first_N, stop_N - start_N)[1])

    def paths_of(self, nodes_N: Tensor) -> tuple[Tensor, Tensor]:
        """``tokens_NT`` (padded with 0) and ``lengths_N`` of the paths from the root to N nodes; -1 gives length 0."""
        lengths_N = self.depth_of(nodes_N)
        tokens_NT = nodes_N.new_zeros((len(nodes_N), int(lengths_N.max()) if len(nodes_N) else 0))
        inside_NT = torch.arange(tokens_NT.shape[1], device=nodes_N.device) < lengths_N[:, None]
        tokens_NT[inside_NT] = self.labels(nodes_N, torch.zeros_like(lengths_N), lengths_N)
        return tokens_NT, lengths_N

    def first_item(self, leaf_N: Tensor) -> Tensor:
        """The first item (lowest number) of each leaf; -1 for -1."""
        item_N = _pick(self.tensors(leaf_N.device).node_item, leaf_N.clamp(min=0))
        return item_N.masked_fill_(leaf_N < 0, -1)

    # --- token by token, for inspection and slow oracles ------------------------------------------------------------

    @property
    def root(self) -> int:
        """The position before the first token."""
        return self.num_nodes * int(self.arrays.node_depth[0])

    def children(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Admissible next tokens at a position, ascending, and the positions they lead to (both empty at a leaf)."""
        to_go, node = divmod(position, self.num_nodes)
        depth = int(self.arrays.node_depth[node])
        if to_go:
            start = int(self.arrays.pool_offsets[int(self.arrays.node_item[node])])
            token = self.arrays.pool_tokens[start + depth - to_go]
            return np.array([token], dtype=np.int64), np.array([position - self.num_nodes])
        if node >= self.num_inner:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        edges = slice(int(self.arrays.child_offsets[node]), int(self.arrays.child_offsets[node + 1]))
        nodes = self.arrays.child_nodes[edges].astype(np.int64)
        label = self.arrays.node_depth[nodes].astype(np.int64) - depth
        return self.arrays.child_tokens[edges].astype(np.int64), nodes + self.num_nodes * (label - 1)

    def step(self, position: int, token: int) -> int:
        """The position after ``token``, or -1; -1 stays -1."""
        if position < 0:
            return -1
        tokens, positions = self.children(position)
        index = int(np.searchsorted(tokens, token))
        return int(positions[index]) if index < len(tokens) and tokens[index] == token else -1

    def items(self, position: int) -> np.ndarray:
        """Items whose path ends at this leaf, ascending; empty anywhere else."""
        group = int(np.searchsorted(self._first_rank_D, position - self.num_inner))
        if group == len(self._first_rank_D) or self._first_rank_D[group] != position - self.num_inner:
            return np.zeros(0, dtype=np.int64)
        rank = position - self.num_inner
        return self._order_I[rank : rank + int(self._group_size_D[group])].astype(np.int64)

    @cached_property
    def _tensor_cache(self) -> dict[str, TrieTensors]:
        return {}

    @cached_property
    def _max_degree(self) -> int:
        return int(np.diff(self.arrays.child_offsets).max(initial=0))

    @property
    def _order_I(self) -> np.ndarray:
        return self.arrays.node_item[self.num_inner :]

    @cached_property
    def _first_rank_D(self) -> np.ndarray:
        """Ranks at which a path differs from the one before: the D leaves."""
        return np.flatnonzero(self.arrays.node_depth[self.num_inner :])

    @cached_property
    def _group_size_D(self) -> np.ndarray:
        return np.diff(np.append(self._first_rank_D, self.num_items))


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` as int64, by an operation that leaves the other CPU threads asleep; so does ``_runs``.

    Waking them for a few thousand numbers (as indexing and ``repeat_interleave`` do) costs far more than the work
    whenever the cores are shared.
    """
    return table.index_select(0, index.reshape(-1)).view(index.shape).long()


def _runs(start_N: Tensor, count_N: Tensor) -> tuple[Tensor, Tensor]:
    """For the numbers ``start .. start + count - 1`` of N runs, joined: the run of each, and the numbers."""
    end_N = count_N.cumsum(0)
    total = int(count_N.sum())
    run_S = end_N.new_zeros(total + 1).index_add_(0, end_N, torch.ones_like(end_N)).cumsum(0)[:total]
    return run_S, _pick(start_N + count_N - end_N, run_S) + torch.arange(total, device=count_N.device)
