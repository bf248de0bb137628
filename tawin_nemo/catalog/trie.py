"""Prefix trie over the catalogue's token paths, as frozen CSR arrays.

Nodes are numbered breadth first and edges lie in node order, tokens ascending within a node, so that edge ``e`` leads
to node ``e + 1`` and an edge array needs no child column. A node without children is a leaf: one finished path, shared
by every item that is written with exactly these tokens. Layout after STATIC (arXiv 2602.22647), without its fixed
path length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.artefacts import atomic_directory, sha256, write_json
from tawin_nemo.errors import CatalogError
from tawin_nemo.types import TokenRows

_FORMAT = "tawin_nemo.token_trie/1"
_ARRAYS = ("child_offsets", "child_tokens", "item_offsets", "item_ids")


@dataclass(frozen=True)
class TrieTensors:
    """The trie on one device; ``n`` nodes, ``E = n - 1`` edges."""

    child_offsets: Tensor  # [n + 1] edges of node v are child_offsets[v] .. child_offsets[v + 1] - 1
    child_tokens: Tensor  # [E]
    edge_keys: Tensor  # [E] parent * (largest token + 1) + token, strictly ascending
    parent: Tensor  # [n] -1 for the root
    depth: Tensor  # [n] tokens before the node
    is_leaf: Tensor  # [n] bool
    is_settled: Tensor  # [n] bool: a single leaf lies below (or the node is that leaf), nothing is left to decide
    first_item: Tensor  # [n] first item of a leaf, -1 elsewhere


@dataclass(frozen=True, eq=False)
class TokenTrie:
    """Immutable trie; build with ``from_paths``, ``save`` to and ``load`` from a folder."""

    child_offsets: np.ndarray  # [n + 1] int64
    child_tokens: np.ndarray  # [E] int64
    item_offsets: np.ndarray  # [n + 1] int64: items of node v are item_ids[item_offsets[v]:item_offsets[v + 1]]
    item_ids: np.ndarray  # [I] int64

    root = 0

    @classmethod
    def from_paths(cls, paths: TokenRows | list[list[int]], names: Sequence[str] | None = None) -> TokenTrie:
        """Trie in which item ``i`` ends at the leaf of ``paths[i]``; items with equal paths share one leaf.

        ``names`` (one per item) only make messages readable. Raises CatalogError for an empty catalogue, an empty
        path, a negative token, or a path that is the beginning of another one (end every path with EOS).
        """
        rows = paths if isinstance(paths, TokenRows) else TokenRows.from_lists(paths)
        _check_paths(rows, names)
        tokens_NT, lengths_N = (tensor.numpy() for tensor in rows.padded())
        order_N = _lexicographic_order(tokens_NT, lengths_N)
        tokens_NT, lengths_N = tokens_NT[order_N], lengths_N[order_N]
        inside_NT = np.arange(tokens_NT.shape[1]) < lengths_N[:, None]
        # A row opens a new node at depth t + 1 when it differs from the row above anywhere in its first t + 1 tokens.
        differs_NT = np.ones_like(inside_NT)
        differs_NT[1:] = (tokens_NT[1:] != tokens_NT[:-1]) | ~inside_NT[:-1]
        is_new_NT = np.logical_or.accumulate(differs_NT, axis=1) & inside_NT

        node_N = np.zeros(len(rows), dtype=np.int64)
        leaf_N = np.zeros(len(rows), dtype=np.int64)
        parents, labels, num_nodes = [], [], 1
        for t in range(tokens_NT.shape[1]):
            is_new_N = is_new_NT[:, t]
            parents.append(node_N[is_new_N])
            labels.append(tokens_NT[is_new_N, t])
            node_N = num_nodes - 1 + np.cumsum(is_new_N)  # rows that ended earlier get garbage, and are not read again
            leaf_N = np.where(lengths_N == t + 1, node_N, leaf_N)
            num_nodes += int(is_new_N.sum())
        trie = cls(
            child_offsets=_offsets(np.concatenate(parents), num_nodes),
            child_tokens=np.concatenate(labels),
            item_offsets=_offsets(leaf_N, num_nodes),
            item_ids=order_N[np.argsort(leaf_N, kind="stable")],
        )
        _check_prefix_free(trie, rows, names)
        return trie

    @property
    def num_nodes(self) -> int:
        return len(self.child_offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @cached_property
    def num_leaves(self) -> int:
        """Distinct paths."""
        return int((np.diff(self.child_offsets) == 0).sum())

    @cached_property
    def max_depth(self) -> int:
        """Tokens of the longest path."""
        return int(self._depth.max())

    @cached_property
    def decision_depth(self) -> int:
        """Depth of the deepest node that has a choice; below it nothing is left to decide (0 also if there is none)."""
        return int(self._depth[np.diff(self.child_offsets) > 1].max(initial=0))

    @cached_property
    def leaf_I(self) -> np.ndarray:
        """Leaf of every item."""
        leaf_I = np.empty(self.num_items, dtype=np.int64)
        leaf_I[self.item_ids] = np.repeat(np.arange(self.num_nodes), np.diff(self.item_offsets))
        return leaf_I

    def children(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        """Admissible next tokens of a node, ascending, and the nodes they lead to (both empty at a leaf)."""
        start, end = int(self.child_offsets[node]), int(self.child_offsets[node + 1])
        return self.child_tokens[start:end], np.arange(start, end) + 1

    def step(self, node: int, token: int) -> int:
        """The child reached by ``token``, or -1."""
        tokens, nodes = self.children(node)
        place = int(np.searchsorted(tokens, token))
        return int(nodes[place]) if place < len(tokens) and tokens[place] == token else -1

    def items(self, leaf: int) -> np.ndarray:
        """Items whose path ends at this node, ascending; empty for an inner node."""
        return self.item_ids[self.item_offsets[leaf] : self.item_offsets[leaf + 1]]

    def tensors(self, device: torch.device | str = "cpu") -> TrieTensors:
        """The trie as tensors on ``device``, made once per device."""
        key = str(torch.device(device))
        if key not in self._tensor_cache:
            self._tensor_cache[key] = self._make_tensors(torch.device(device))
        return self._tensor_cache[key]

    def children_of(self, nodes_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All edges out of N nodes as flat ``position_E`` (ascending index into N), ``token_E``, ``child_E``.

        A node -1 (off the trie) has no edges.
        """
        t = self.tensors(nodes_N.device)
        start_N = t.child_offsets[nodes_N.clamp(min=0)]
        count_N = torch.where(nodes_N < 0, 0, t.child_offsets[nodes_N.clamp(min=0) + 1] - start_N)
        position_E = torch.repeat_interleave(count_N)
        shift_N = start_N - (torch.cumsum(count_N, 0) - count_N)
        edge_E = torch.arange(len(position_E), device=nodes_N.device) + shift_N[position_E]
        return position_E, t.child_tokens[edge_E], edge_E + 1

    def step_many(self, nodes_N: Tensor, tokens_N: Tensor) -> Tensor:
        """``step`` for N (node, token) pairs at once; -1 stays -1."""
        t = self.tensors(nodes_N.device)
        valid_N = (nodes_N >= 0) & (tokens_N >= 0) & (tokens_N < self._token_stride)
        key_N = torch.where(valid_N, nodes_N * self._token_stride + tokens_N, -1)
        edge_N = torch.searchsorted(t.edge_keys, key_N).clamp(max=len(t.edge_keys) - 1)
        return torch.where(t.edge_keys[edge_N] == key_N, edge_N + 1, -1)

    def walk(self, tokens_NT: Tensor, lengths_N: Tensor) -> Tensor:
        """``nodes_NT``: the node BEFORE each token; -1 once a row has left the trie, and at padding."""
        nodes = [torch.where(lengths_N > 0, self.root, -1)] if tokens_NT.shape[1] else []
        for t in range(1, tokens_NT.shape[1]):
            node_N = self.step_many(nodes[-1], tokens_NT[:, t - 1])
            nodes.append(torch.where(t < lengths_N, node_N, -1))
        return torch.stack(nodes, dim=1) if nodes else torch.full_like(tokens_NT, -1)

    def paths_of(self, nodes_N: Tensor) -> tuple[Tensor, Tensor]:
        """``tokens_NT`` (padded with 0) and ``lengths_N`` of the paths from the root to N nodes; -1 gives length 0."""
        t = self.tensors(nodes_N.device)
        lengths_N = torch.where(nodes_N < 0, 0, t.depth[nodes_N.clamp(min=0)])
        tokens_NT = nodes_N.new_zeros((len(nodes_N), int(lengths_N.max()) if len(nodes_N) else 0))
        node_N = nodes_N
        for column in reversed(range(tokens_NT.shape[1])):
            inside_N = column < lengths_N
            edge_N = (node_N - 1).clamp(min=0)
            tokens_NT[:, column] = torch.where(inside_N, t.child_tokens[edge_N], 0)
            node_N = torch.where(inside_N, t.parent[node_N.clamp(min=0)], node_N)
        return tokens_NT, lengths_N

    def save(self, folder: Path) -> None:
        """Write the arrays and a manifest with their SHA-256 to a folder, whole or not at all."""
        with atomic_directory(folder) as temporary:
            for name in _ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(self, name))
            checksums = {name: sha256(temporary / f"{name}.npy") for name in _ARRAYS}
            write_json(temporary / "manifest.json", {"format": _FORMAT, "sha256": checksums})

    @classmethod
    def load(cls, folder: Path) -> TokenTrie:
        """Memory-map a saved trie. Raises CatalogError if a file is missing, of another format or altered."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CatalogError(f"{folder} holds no readable trie ({error}); build it again") from error
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise CatalogError(f"{folder}/manifest.json is not of format {_FORMAT}; build the trie again")
        arrays = {}
        for name in _ARRAYS:
            file = folder / f"{name}.npy"
            if not file.is_file() or sha256(file) != manifest["sha256"].get(name):
                raise CatalogError(f"{file} is missing or does not match its checksum; build the trie again")
            # Copy-on-write: pages stay shared, and torch can wrap the array without a warning about read-only memory.
            arrays[name] = np.load(file, mmap_mode="c")
        return cls(**arrays)

    @cached_property
    def _tensor_cache(self) -> dict[str, TrieTensors]:
        return {}

    @cached_property
    def _token_stride(self) -> int:
        return int(self.child_tokens.max()) + 1

    @cached_property
    def _parent(self) -> np.ndarray:
        return np.concatenate([[-1], np.repeat(np.arange(self.num_nodes), np.diff(self.child_offsets))])

    @cached_property
    def _depth(self) -> np.ndarray:
        depth = np.zeros(self.num_nodes, dtype=np.int64)
        start, end = 0, 1  # nodes of one level are contiguous
        while start < end:
            start, end = int(self.child_offsets[start]) + 1, int(self.child_offsets[end]) + 1
            depth[start:end] = depth[start - 1] + 1
        return depth

    @cached_property
    def _is_settled(self) -> np.ndarray:
        # Bottom up, one level at a time: settled = leaf, or a single child that is settled.
        degree = np.diff(self.child_offsets)
        settled = degree == 0
        for level in reversed(range(self.max_depth)):
            single = np.flatnonzero((self._depth == level) & (degree == 1))
            settled[single] = settled[self.child_offsets[single] + 1]
        return settled

    def _make_tensors(self, device: torch.device) -> TrieTensors:
        leaf = np.diff(self.child_offsets) == 0
        first_item = np.full(self.num_nodes, -1, dtype=np.int64)
        first_item[leaf] = self.item_ids[self.item_offsets[:-1][leaf]]
        keys = self._parent[1:] * self._token_stride + self.child_tokens
        arrays = (self.child_offsets, self.child_tokens, keys, self._parent, self._depth, leaf, self._is_settled)
        return TrieTensors(*(torch.from_numpy(np.asarray(array)).to(device) for array in (*arrays, first_item)))


def _offsets(owner: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=count))]).astype(np.int64)


def _lexicographic_order(tokens_NT: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """Stable order of the rows as sequences; one sort of big-endian byte strings instead of one sort per column."""
    inside_NT = np.arange(tokens_NT.shape[1]) < lengths_N[:, None]
    keys_NT = np.where(inside_NT, tokens_NT + 1, 0).astype(">u4")
    return np.argsort(keys_NT.view(f"S{4 * keys_NT.shape[1]}").ravel(), kind="stable")


def _label(item: int, names: Sequence[str] | None) -> str:
    return f"item {item}" + (f" ({names[item]!r})" if names is not None else "")


def _check_paths(rows: TokenRows, names: Sequence[str] | None) -> None:
    if len(rows) == 0:
        raise CatalogError("the catalogue has no items")
    empty = np.flatnonzero(rows.lengths == 0)
    if len(empty):
        raise CatalogError(f"{_label(int(empty[0]), names)} has an empty token path; every path needs a token")
    bad = np.flatnonzero((rows.flat < 0) | (rows.flat >= 2**31))
    if len(bad):
        item = int(np.searchsorted(rows.offsets, bad[0], side="right")) - 1
        raise CatalogError(f"{_label(item, names)} has token {rows.flat[bad[0]]}; token ids lie in 0 .. 2^31 - 1")


def _check_prefix_free(trie: TokenTrie, rows: TokenRows, names: Sequence[str] | None) -> None:
    inner = np.flatnonzero((np.diff(trie.item_offsets) > 0) & (np.diff(trie.child_offsets) > 0))
    if not len(inner):
        return
    short = int(trie.items(int(inner[0]))[0])
    path = rows[short]
    longer = next(i for i in range(len(rows)) if len(rows[i]) > len(path) and (rows[i][: len(path)] == path).all())
    raise CatalogError(
        f"the token path of {_label(short, names)} is the beginning of that of {_label(longer, names)} "
        f"({len(inner)} such paths in all); end every path with the EOS token"
    )
