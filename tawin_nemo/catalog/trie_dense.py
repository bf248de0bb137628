"""The trie as a GPU reads it: what a search step needs of a node in one lookup, and bounds of a step's shapes.

A step over tensors of fixed shapes needs no answer from the device while it runs: nothing in it depends on how many
children the nodes of the moment have. The bounds say how large those tensors have to be.

Axes: n inner nodes (``N`` = n + 1 rows), V node ids, E edges, W beams.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie

#: Depth of "no inner node" in ``DenseTrie.span_N3``: never reached.
_NEVER = 2**40


@dataclass(frozen=True)
class DenseTrie:
    """The trie's tables on one device, int64 where they are used as indices.

    A node beyond the inner ones is looked up at row n of ``span_N3``; so is node -1, which indexing takes from the end.
    """

    span_N3: Tensor  # per inner node: what is behind its edges, how many these are, its depth; row n: 1, 1, never
    end_depth_V: Tensor  # depth of a leaf, -1 for an inner node
    child_tokens: Tensor  # [E], at least one
    child_nodes: Tensor  # [E], at least one

    @classmethod
    def of(cls, trie: TokenTrie, device: torch.device) -> DenseTrie:
        """The tables of ``trie``, made once per device."""
        tables = _TABLES.setdefault(trie, {})
        if device not in tables:
            tables[device] = _tables(trie, device)
        return tables[device]


_TABLES: WeakKeyDictionary[TokenTrie, dict[torch.device, DenseTrie]] = WeakKeyDictionary()


def _tables(trie: TokenTrie, device: torch.device) -> DenseTrie:
    arrays, inner = trie.arrays, trie.num_inner
    span_N3 = np.empty((inner + 1, 3), dtype=np.int64)
    span_N3[:inner, 0] = arrays.child_offsets[1:]
    span_N3[:inner, 1] = np.diff(arrays.child_offsets)
    span_N3[:inner, 2] = arrays.node_depth[:inner]
    span_N3[inner] = 1, 1, _NEVER
    end_depth_V = arrays.node_depth.astype(np.int32)
    end_depth_V[:inner] = -1
    edges = [a if len(a) else np.zeros(1, dtype=np.int64) for a in (arrays.child_tokens, arrays.child_nodes)]
    tokens, nodes = (torch.from_numpy(a).to(device).long() for a in edges)
    return DenseTrie(torch.from_numpy(span_N3).to(device), torch.from_numpy(end_depth_V).to(device), tokens, nodes)


@dataclass(frozen=True)
class StepLimits:
    """Upper bounds for one prompt's step of a search with W beams, which all stand at the same depth."""

    columns: int  # continuations, at least W
    ranked: int  # continuations among which the W best that do not end a path are, and the best one that is dropped

    @classmethod
    def of(cls, trie: TokenTrie, width: int) -> StepLimits:
        """The bounds of ``trie``: the W largest numbers of children, and of children that end a path, at any depth.

        A beam without a choice has one continuation, which may end its path. Beams of a prompt are distinct nodes.
        """
        limits = _LIMITS.setdefault(trie, {})
        if width not in limits:
            limits[width] = _limits(trie, width)
        return limits[width]


_LIMITS: WeakKeyDictionary[TokenTrie, dict[int, StepLimits]] = WeakKeyDictionary()


def _limits(trie: TokenTrie, width: int) -> StepLimits:
    arrays, inner = trie.arrays, trie.num_inner
    offsets = arrays.child_offsets.astype(np.int64)
    depth_N, children_N = arrays.node_depth[:inner].astype(np.int64), np.diff(offsets)
    child_depth_E = arrays.node_depth[arrays.child_nodes].astype(np.int64)
    ends_E = (arrays.child_nodes >= inner) & (child_depth_E == np.repeat(depth_N + 1, children_N))
    ends_N = np.diff(np.concatenate([[0], ends_E.cumsum()])[offsets])
    columns = ends = width
    borders = np.flatnonzero(np.diff(depth_N)) + 1  # inner nodes are ordered by depth
    for at_depth in np.split(np.arange(inner), borders):
        columns = max(columns, _largest(children_N[at_depth], width))
        ends = max(ends, _largest(ends_N[at_depth], width))
    # up to one end per beam: 2 W hold W others, and a bound for what is behind them (``select.step``)
    return StepLimits(columns, min(columns, 2 * width if ends <= width else width + 1 + ends))


def _largest(count_N: np.ndarray, width: int) -> int:
    """Sum over W beams: the largest counts, and one for each beam without a choice (or whose count is 0)."""
    top = np.partition(count_N, len(count_N) - width)[-width:] if len(count_N) > width else count_N
    return int(np.maximum(top, 1).sum()) + width - len(top)
