"""Building the path-compressed trie: sort the paths, see what neighbours share, open a node where paths part.

A node is a maximal run of sorted paths that share more tokens with each other than with the paths outside the run
(an LCP interval: Abouelhoda, Kurtz, Ohlebusch 2004). Every step works on whole arrays; Python loops run over the
tokens that fit one sort word, and over depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tawin_nemo.catalog.path_sort import SortedPaths, narrow_index, sort_paths
from tawin_nemo.errors import CatalogError
from tawin_nemo.types import TokenRows


@dataclass(frozen=True)
class TrieArrays:
    """The trie in memory and on disk: n inner nodes, E edges, I items, V = n + I node ids.

    Integers are as narrow as the sizes allow; only ``pool_tokens`` and ``child_tokens`` are always int32.
    """

    child_offsets: np.ndarray  # [n + 1] edges of inner node v are child_offsets[v] .. child_offsets[v + 1] - 1
    child_tokens: np.ndarray  # [E] first token of the edge's label, ascending within a node
    child_nodes: np.ndarray  # [E]
    node_depth: np.ndarray  # [V] tokens from the root; 0 for id n + p if place p has the path of place p - 1
    node_item: np.ndarray  # [V] the item at a leaf's place; for an inner node the item of its first leaf
    pool_tokens: np.ndarray  # [sum of lengths] the paths in item order
    pool_offsets: np.ndarray  # [I + 1]


def build_arrays(rows: TokenRows, names: Sequence[str] | None) -> TrieArrays:
    """The trie over ``rows``; raises what ``TokenTrie.from_paths`` names."""
    _check_paths(rows, names)
    paths = sort_paths(rows)
    _check_prefix_free(paths, names)
    first_D = None if paths.is_first_I.all() else np.flatnonzero(paths.is_first_I)
    nodes = _open_nodes(paths.shared_I if first_D is None else paths.shared_I[first_D])
    edge_place_E = nodes.edge_place_E if first_D is None else first_D[nodes.edge_place_E]
    node_place_n = nodes.node_place_n if first_D is None else first_D[nodes.node_place_n]
    num_inner, num_items = len(node_place_n), len(paths.order_I)

    child_nodes_E = edge_place_E.astype(narrow_index(num_inner + num_items)) + num_inner
    child_nodes_E[nodes.inner_edge_M] = nodes.inner_child_M
    length_I = paths.length_I * paths.is_first_I
    depth_E = np.repeat(nodes.node_depth_n, np.diff(nodes.offsets))
    start_E = paths.offsets[paths.order_I[edge_place_E]]
    return TrieArrays(
        child_offsets=nodes.offsets.astype(narrow_index(len(edge_place_E) + 1)),
        child_tokens=paths.tokens[start_E + depth_E],
        child_nodes=child_nodes_E,
        node_depth=np.concatenate([nodes.node_depth_n, length_I]),
        node_item=np.concatenate([paths.order_I[node_place_n], paths.order_I]),
        pool_tokens=paths.tokens,
        pool_offsets=paths.offsets,
    )


@dataclass(frozen=True)
class _Nodes:
    """Inner nodes by (depth, first place) and their edges; places count distinct paths."""

    offsets: np.ndarray  # [n + 1] into the edges
    edge_place_E: np.ndarray  # first place below the edge
    inner_edge_M: np.ndarray  # the M edges that lead to inner nodes; the others lead to the leaf at their place
    inner_child_M: np.ndarray
    node_depth_n: np.ndarray
    node_place_n: np.ndarray  # first place below the node


def _open_nodes(shared_D: np.ndarray) -> _Nodes:
    """LCP intervals of D distinct sorted paths, depth by depth; ``shared_D[0]`` is 0."""
    index = narrow_index(2 * len(shared_D))
    pending_D = np.empty(len(shared_D), dtype=index)  # the edge whose first place this is and that awaits its node
    num_nodes = num_edges = 0
    offsets, edge_places, inner_edges, depths, node_places = [], [], [], [], []
    # Places in runs that share at least the depth at hand; the first one always opens a run.
    place_A, shared_A = np.arange(len(shared_D), dtype=index), shared_D
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
        edge_place_E, node_place_R = place_A[edge_A], place_A[mark_M[opens_M]]
        if num_nodes:
            inner_edges.append(pending_D[node_place_R])
        inner_E = np.flatnonzero(np.append(deeper_A[1:], False)[edge_A])
        pending_D[edge_place_E[inner_E]] = num_edges + inner_E
        offsets.append(num_edges + np.flatnonzero(opens_M[edge_M]))
        edge_places.append(edge_place_E)
        depths.append(np.full(len(node_place_R), depth, dtype=shared_D.dtype))
        node_places.append(node_place_R)
        num_nodes, num_edges = num_nodes + len(node_place_R), num_edges + len(edge_place_E)
        deeper_A[:-1] |= deeper_A[1:]
        if not deeper_A.all():
            place_A, shared_A = place_A[deeper_A], shared_A[deeper_A]
    nothing = np.zeros(0, dtype=index)
    return _Nodes(
        np.concatenate([*offsets, [num_edges]]),
        np.concatenate([nothing, *edge_places]),
        np.concatenate([nothing, *inner_edges]),
        np.arange(1, max(num_nodes, 1)),
        np.concatenate([nothing.astype(shared_D.dtype), *depths]),
        np.concatenate([nothing, *node_places]),
    )


def _label(item: int, names: Sequence[str] | None) -> str:
    return f"item {item}" + (f" ({names[item]!r})" if names is not None else "")


def _check_paths(rows: TokenRows, names: Sequence[str] | None) -> None:
    if len(rows) == 0:
        raise CatalogError("the catalogue has no items")
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
