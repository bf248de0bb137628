"""Building the path-compressed trie: sort the paths, see what neighbours share, open a node where paths part.

A node is a maximal run of sorted paths that share more tokens with each other than with the paths outside the run
(an LCP interval: Abouelhoda, Kurtz, Ohlebusch 2004). Every step works on whole arrays; Python loops run over the
tokens that fit one sort word, and over depths. Ranks are positions in the sorted order.

I items, D distinct paths, A ranks under work, M marked ones of these, R runs, n inner nodes, E edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tawin_nemo.catalog.trie_arrays import TrieArrays
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError

# -- Lexicographic order of many token paths, and how many tokens each shares with the one before it.
# As many columns of tokens as fit are packed into the high bits of a 64-bit word, the row number into the low bits, and
# the words are sorted: one sort of plain integers (SIMD in numpy), stable, without an index array beside it. Rows that
# are still alike go another round with their next columns.

#: Numbers below this fit 32 bits; a name so that tests can lower it.
INT32_LIMIT = 2**31
WORD_BITS = 64


def narrow_index(limit: int) -> type[np.signedinteger]:
    """The narrowest integer type for indices below ``limit`` that torch can gather with."""
    return np.int32 if limit <= INT32_LIMIT else np.int64


@dataclass(frozen=True)
class SortedPaths:
    """I paths as a pool in item order, and their sorted order; equal paths stay in item order."""

    tokens: np.ndarray  # [sum of lengths] int32
    offsets: np.ndarray  # [I + 1]
    order_I: np.ndarray  # item at each rank of the sorted order
    length_I: np.ndarray  # by rank
    shared_I: np.ndarray  # by rank: leading tokens in common with the rank before; 0 at rank 0
    is_first_I: np.ndarray  # by rank: the path differs from that of the rank before


def sort_paths(rows: TokenRows) -> SortedPaths:
    """Sort non-empty paths of tokens in 0 .. 2^31 - 1."""
    longest = int(rows.lengths.max())
    depth_type = np.uint8 if longest < 2**8 else np.int16 if longest < 2**15 else np.int32
    sorter = _Sorter(
        rows.flat.astype(np.int32, copy=False),
        rows.offsets.astype(narrow_index(len(rows.flat) + 1), copy=False),
        rows.lengths.astype(depth_type),
    )
    stack: list[_Alike | None] = [None]
    while stack:
        stack.extend(sorter.sort_further(stack.pop()))
    order_I = sorter.order_I
    return SortedPaths(
        sorter.tokens, sorter.offsets, order_I, sorter.length_I[order_I], sorter.shared_I, sorter.is_first_I
    )


@dataclass(frozen=True)
class _Alike:
    """A ranks whose rows share their first ``column`` tokens within a group; groups are runs of neighbours."""

    ranks_A: np.ndarray
    rows_A: np.ndarray
    head_A: np.ndarray  # bool: first of its group
    column: int


class _Sorter:
    """The arrays that all rounds of one sort share; ``length_I`` by item, the others as in SortedPaths."""

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, length_I: np.ndarray) -> None:
        self.tokens, self.offsets, self.length_I = tokens, offsets, length_I
        self.order_I = np.empty(len(length_I), dtype=narrow_index(len(length_I)))
        self.shared_I = np.zeros(len(length_I), dtype=length_I.dtype)
        self.is_first_I = np.ones(len(length_I), dtype=bool)

    def sort_further(self, alike: _Alike | None) -> list[_Alike]:
        """Sort by as many further columns as fit a word; what is still alike, or did not fit at all, comes back.

        None: all rows in item order, as one group.
        """
        size = len(self.length_I) if alike is None else len(alike.rows_A)
        row_bits = (size - 1).bit_length()
        column = 0 if alike is None else alike.column
        word_A, bits = self._packed(alike, size, WORD_BITS - row_bits)
        if not bits:
            assert alike is not None  # one group needs at most 31 bits for its rows and 32 for a column
            return _halves(alike)
        word_A <<= np.uint64(row_bits)
        word_A |= np.arange(size, dtype=np.uint32)
        word_A.sort()
        differs_A = word_A[1:] ^ word_A[:-1]
        word_A &= np.uint64(2**row_bits - 1)
        if alike is None:
            rows_A = self.order_I
            rows_A[:] = word_A
        else:
            rows_A = alike.rows_A[word_A.view(np.int64)]
            self.order_I[alike.ranks_A] = rows_A
        del word_A

        shared_A = np.full(size - 1, column, dtype=self.shared_I.dtype)
        limit = row_bits + sum(bits)  # words of one group differ only below this bit
        for width in bits:
            limit -= width
            shared_A += differs_A <= np.uint64(2**limit - 1)
        same_A = np.concatenate([[False], differs_A <= np.uint64(2**row_bits - 1), [False]])
        del differs_A
        left_A = np.flatnonzero(same_A[1:] | same_A[:-1])
        if alike is None:
            self.shared_I[1:] = shared_A
            ranks_A = left_A
        else:
            inside_A = ~alike.head_A[1:]
            self.shared_I[alike.ranks_A[1:][inside_A]] = shared_A[inside_A]
            ranks_A = alike.ranks_A[left_A]
        if not len(left_A):
            return []
        return self._unfinished(_Alike(ranks_A, rows_A[left_A], ~same_A[left_A], column + len(bits)))

    def _packed(self, alike: _Alike | None, size: int, room: int) -> tuple[np.ndarray, list[int]]:
        """Words of group number and the next columns, and the bits of each column; no bits if none has room."""
        if alike is None:
            start_A, length_A, word_A = self.offsets[:-1], self.length_I, np.zeros(size, dtype=np.uint64)
        else:
            start_A, length_A = self.offsets[alike.rows_A], self.length_I[alike.rows_A]
            word_A = np.cumsum(alike.head_A, dtype=np.uint64)
            word_A -= np.uint64(1)
            room -= int(word_A[-1]).bit_length()
        shortest, longest, last = int(length_A.min()), int(length_A.max()), len(self.tokens) - 1
        bits: list[int] = []
        for column in range(0 if alike is None else alike.column, longest):
            if column < shortest:
                value_A = self.tokens[start_A + column]
            else:  # a path that has ended sorts before one that goes on
                value_A = np.where(length_A > column, self.tokens[np.minimum(start_A + column, last)], np.int32(-1))
            least = int(value_A.min())
            width = (int(value_A.max()) - least).bit_length()
            if width > room:
                break
            room -= width
            bits.append(width)
            if width:
                value_A -= np.int32(least)  # -1 .. 2^31 - 1 may wrap to 2^31, which is right once seen as unsigned
                word_A <<= np.uint64(width)
                word_A |= value_A.view(np.uint32)
        return word_A, bits

    def _unfinished(self, alike: _Alike) -> list[_Alike]:
        """Drop the groups of equal, complete paths, noting that they are equal."""
        length_A = self.length_I[alike.rows_A]
        head_G = np.flatnonzero(alike.head_A)
        ended_G = np.logical_and.reduceat(length_A <= alike.column, head_G)
        ended_A = np.repeat(ended_G, np.diff(np.append(head_G, len(length_A))))
        again_A = ended_A & ~alike.head_A
        self.shared_I[alike.ranks_A[again_A]] = length_A[again_A]
        self.is_first_I[alike.ranks_A[again_A]] = False
        return [] if ended_G.all() else [_part(alike, ~ended_A)]


def _halves(alike: _Alike) -> list[_Alike]:
    """Split ``alike`` between groups near the middle; fewer rows and groups leave more bits for tokens."""
    head_G = np.flatnonzero(alike.head_A)
    cut = int(head_G[min(int(np.searchsorted(head_G, len(alike.head_A) // 2)), len(head_G) - 1)])
    return [_part(alike, slice(0, cut)), _part(alike, slice(cut, None))]


def _part(alike: _Alike, which: np.ndarray | slice) -> _Alike:
    return _Alike(alike.ranks_A[which], alike.rows_A[which], alike.head_A[which], alike.column)


def build_arrays(rows: TokenRows, names: Sequence[str] | None) -> TrieArrays:
    """The trie in which item i ends at the leaf of ``rows[i]``; ``names`` (one per item) make messages readable.

    Raises CatalogError for no rows, an empty row, a token outside 0 .. 2^31 - 1, or a row that begins another one.
    """
    _check_paths(rows, names)
    paths = sort_paths(rows)
    _check_prefix_free(paths, names)
    first_D = None if paths.is_first_I.all() else np.flatnonzero(paths.is_first_I)
    nodes = _open_nodes(paths.shared_I if first_D is None else paths.shared_I[first_D])
    edge_rank_E = nodes.edge_rank_E if first_D is None else first_D[nodes.edge_rank_E]
    node_rank_n = nodes.node_rank_n if first_D is None else first_D[nodes.node_rank_n]
    num_inner, num_items = len(node_rank_n), len(paths.order_I)

    child_nodes_E = edge_rank_E.astype(narrow_index(num_inner + num_items)) + num_inner
    child_nodes_E[nodes.inner_edge_M] = nodes.inner_child_M
    length_I = paths.length_I * paths.is_first_I
    depth_E = np.repeat(nodes.node_depth_n, np.diff(nodes.offsets))
    start_E = paths.offsets[paths.order_I[edge_rank_E]]
    return TrieArrays(
        child_offsets=nodes.offsets.astype(narrow_index(len(edge_rank_E) + 1)),
        child_tokens=paths.tokens[start_E + depth_E],
        child_nodes=child_nodes_E,
        node_depth=np.concatenate([nodes.node_depth_n, length_I]),
        node_item=np.concatenate([paths.order_I[node_rank_n], paths.order_I]),
        pool_tokens=paths.tokens,
        pool_offsets=paths.offsets,
    )


@dataclass(frozen=True)
class _Nodes:
    """Inner nodes by (depth, first rank) and their edges; ranks count distinct paths."""

    offsets: np.ndarray  # [n + 1] into the edges
    edge_rank_E: np.ndarray  # first rank below the edge
    inner_edge_M: np.ndarray  # the M edges that lead to inner nodes; the others lead to the leaf at their rank
    inner_child_M: np.ndarray
    node_depth_n: np.ndarray
    node_rank_n: np.ndarray  # first rank below the node


def _open_nodes(shared_D: np.ndarray) -> _Nodes:
    """LCP intervals of D distinct sorted paths, depth by depth; ``shared_D[0]`` is 0."""
    index = narrow_index(2 * len(shared_D))
    pending_D = np.empty(len(shared_D), dtype=index)  # the edge whose first rank this is and that awaits its node
    num_nodes = num_edges = 0
    offsets, edge_ranks, inner_edges, depths, node_ranks = [], [], [], [], []
    # Ranks in runs that share at least the depth at hand; the first one always opens a run.
    rank_A, shared_A = np.arange(len(shared_D), dtype=index), shared_D
    for depth in np.flatnonzero(np.bincount(shared_D[1:])).tolist():
        parts_A, deeper_A = shared_A == depth, shared_A > depth
        parts_A[0] = False
        mark_M = np.flatnonzero(~deeper_A)  # where runs open, and where they part at this depth
        parts_M = parts_A[mark_M]
        opens_M = ~parts_M  # a run that parts at this depth is a node
        opens_M[:-1] &= parts_M[1:]
        opens_M[-1] = False
        edge_M = parts_M | opens_M
        edge_A = mark_M[edge_M]
        edge_rank_E, node_rank_R = rank_A[edge_A], rank_A[mark_M[opens_M]]
        if num_nodes:
            inner_edges.append(pending_D[node_rank_R])
        inner_E = np.flatnonzero(np.append(deeper_A[1:], False)[edge_A])
        pending_D[edge_rank_E[inner_E]] = num_edges + inner_E
        offsets.append(num_edges + np.flatnonzero(opens_M[edge_M]))
        edge_ranks.append(edge_rank_E)
        depths.append(np.full(len(node_rank_R), depth, dtype=shared_D.dtype))
        node_ranks.append(node_rank_R)
        num_nodes, num_edges = num_nodes + len(node_rank_R), num_edges + len(edge_rank_E)
        deeper_A[:-1] |= deeper_A[1:]
        if not deeper_A.all():
            rank_A, shared_A = rank_A[deeper_A], shared_A[deeper_A]
    nothing = np.zeros(0, dtype=index)
    return _Nodes(
        np.concatenate([*offsets, [num_edges]]),
        np.concatenate([nothing, *edge_ranks]),
        np.concatenate([nothing, *inner_edges]),
        np.arange(1, max(num_nodes, 1)),
        np.concatenate([nothing.astype(shared_D.dtype), *depths]),
        np.concatenate([nothing, *node_ranks]),
    )


def _label(item: int, names: Sequence[str] | None) -> str:
    return f"item {item}" + (f" ({names[item]!r})" if names is not None else "")


def _check_paths(rows: TokenRows, names: Sequence[str] | None) -> None:
    if len(rows) == 0:
        raise CatalogError("the catalog has no items")
    empty = np.flatnonzero(rows.lengths == 0)
    if len(empty):
        raise CatalogError(f"{_label(int(empty[0]), names)} has an empty token path; every path needs a token")
    if rows.flat.min() < 0 or rows.flat.max() >= 2**31:
        bad = int(np.flatnonzero((rows.flat < 0) | (rows.flat >= 2**31))[0])
        item = int(np.searchsorted(rows.offsets, bad, side="right")) - 1
        raise CatalogError(f"{_label(item, names)} has token {rows.flat[bad]}; token ids lie in 0 .. 2^31 - 1")


def _check_prefix_free(paths: SortedPaths, names: Sequence[str] | None) -> None:
    """A path that is the beginning of others is followed by one of them in the sorted order."""
    cut = 1 + np.flatnonzero(paths.is_first_I[1:] & (paths.shared_I[1:] == paths.length_I[:-1]))
    if not len(cut):
        return
    longer = int(cut[0])
    short = int(np.flatnonzero(paths.is_first_I[:longer])[-1])
    raise CatalogError(
        f"the token path of {_label(int(paths.order_I[short]), names)} is the beginning of that of "
        f"{_label(int(paths.order_I[longer]), names)} ({len(cut)} such paths in all); end every path with the EOS token"
    )
