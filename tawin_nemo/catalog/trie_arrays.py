"""The arrays of a path-compressed trie: in memory, on disk, and the spans of items below its nodes.

I items, E edges, n inner nodes, V = n + I node ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.util.errors import CatalogError
from tawin_nemo.util.files import atomic_directory, sha256, write_json

_FORMAT = "tawin_nemo.token_trie/2"


@dataclass(frozen=True)
class TrieArrays:
    """The arrays of a trie, the same in memory and on disk.

    Integers are as narrow as the sizes allow; only ``pool_tokens`` and ``child_tokens`` are always int32.
    """

    child_offsets: np.ndarray  # [n + 1] edges of inner node v are child_offsets[v] .. child_offsets[v + 1] - 1
    child_tokens: np.ndarray  # [E] first token of the edge's label, ascending within a node
    child_nodes: np.ndarray  # [E]
    node_depth: np.ndarray  # [V] tokens from the root; 0 for id n + p if rank p has the path of rank p - 1
    node_item: np.ndarray  # [V] the item at a leaf's rank; for an inner node the item of its first leaf
    pool_tokens: np.ndarray  # [sum of lengths] the paths in item order
    pool_offsets: np.ndarray  # [I + 1]


def save_arrays(arrays: TrieArrays, folder: Path, tokenizer: str) -> None:
    """Write the arrays and a manifest into ``folder``, atomically; ``tokenizer`` is the tokenizer's fingerprint."""
    names = [field.name for field in fields(TrieArrays)]
    with atomic_directory(folder) as temporary:
        for name in names:
            np.save(temporary / f"{name}.npy", getattr(arrays, name))
        checksums = {name: sha256(temporary / f"{name}.npy") for name in names}
        write_json(temporary / "manifest.json", {"format": _FORMAT, "tokenizer": tokenizer, "sha256": checksums})


def load_arrays(folder: Path, tokenizer: str) -> TrieArrays:
    """Memory-map the arrays in ``folder``.

    Raises CatalogError, naming file and remedy, for a missing or altered file, another format or another tokenizer.
    """
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogError(f"{folder} holds no readable trie ({error}); build it again") from error
    actual = manifest.get("format") if isinstance(manifest, dict) else None
    if actual != _FORMAT or not isinstance(manifest.get("sha256"), dict):
        raise CatalogError(f"{file} is of format {actual!r}, not {_FORMAT!r}; build the trie again")
    if manifest.get("tokenizer") != tokenizer:
        raise CatalogError(
            f"{file}: the trie was made with tokenizer {manifest.get('tokenizer')!r}, not {tokenizer!r}, so its token "
            "ids mean something else; build it again, or use the tokenizer it was made with"
        )
    return TrieArrays(**{field.name: _load(folder, field.name, manifest["sha256"]) for field in fields(TrieArrays)})


def _load(folder: Path, name: str, checksums: dict[str, str]) -> np.ndarray:
    file = folder / f"{name}.npy"
    if not file.is_file():
        raise CatalogError(f"{file} is missing; remove {folder} and build the trie again")
    if sha256(file) != checksums.get(name):
        raise CatalogError(f"{file} does not match its checksum; remove {folder} and build the trie again")
    # Copy-on-write: pages stay shared, and torch can wrap the array without a warning about read-only memory.
    try:
        array: np.ndarray = np.load(file, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CatalogError(f"{file} cannot be read ({error}); remove {folder} and build the trie again") from error
    return array


@dataclass(frozen=True)
class Spans:
    """Items below each node, as a range of ranks in the sorted catalog. Entries of unused node ids are meaningless.

    The items below a node are neighbours in the sorted catalog, so "is an allowed item below this node?" takes two
    binary searches in a sorted list of ranks, whatever the size of the catalog.
    """

    rank_I: np.ndarray  # rank of every item
    first_V: np.ndarray  # first rank below the node
    end_V: np.ndarray  # the rank behind the last one
    choices_V: np.ndarray  # nodes with a choice above the node

    @classmethod
    def of(cls, arrays: TrieArrays) -> Spans:
        """Compute the spans by pointer doubling, in O(V log depth)."""
        inner, order_I = len(arrays.child_offsets) - 1, arrays.node_item[len(arrays.child_offsets) - 1 :]
        items = len(order_I)
        rank_I = np.empty(items, dtype=np.int64)
        rank_I[order_I] = np.arange(items)
        starts_D = np.flatnonzero(arrays.node_depth[inner:])
        group_I = np.searchsorted(starts_D, np.arange(items), side="right")
        leaf_end_I = np.append(starts_D, items)[group_I]

        children_E = arrays.child_nodes.astype(np.int64)
        offsets = arrays.child_offsets.astype(np.int64)
        last_V = np.concatenate([children_E[offsets[1:] - 1], inner + np.arange(items)])
        while (last_V[:inner] < inner).any():
            last_V = last_V[last_V]
        above_V = np.zeros(inner + items, dtype=np.int64)  # the root, and ids that are not used, point to the root
        above_V[children_E] = np.repeat(np.arange(inner), np.diff(offsets))
        choices_V = np.zeros(inner + items, dtype=np.int64)
        choices_V[children_E] = 1
        while above_V.any():
            choices_V, above_V = choices_V + choices_V[above_V], above_V[above_V]
        first_n = rank_I[arrays.node_item[:inner]]
        return cls(rank_I, np.concatenate([first_n, np.arange(items)]), leaf_end_I[last_V - inner], choices_V)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The arrays as tensors on ``device``, by name; on the CPU they share memory with the arrays."""
        return {item.name: torch.from_numpy(getattr(self, item.name)).to(device) for item in fields(self)}
