"""Which items lie below a trie node, and how many choices lie above it: what filters and token counts ask.

The items below a node are neighbours in the sorted catalog, so that "is anything below this node allowed?" is two
binary searches in a sorted list of places, whatever the size of the catalog.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie_build import TrieArrays


@dataclass(frozen=True)
class Spans:
    """Places are positions in the sorted catalog; V node ids as in TokenTrie, entries of unused ids mean nothing."""

    place_I: np.ndarray  # place of every item
    first_V: np.ndarray  # first place below the node
    end_V: np.ndarray  # the place behind the last one
    choices_V: np.ndarray  # nodes with a choice above the node

    @classmethod
    def of(cls, arrays: TrieArrays) -> Spans:
        """O(V log depth): every step doubles how far each node's pointer reaches."""
        inner, order_I = len(arrays.child_offsets) - 1, arrays.node_item[len(arrays.child_offsets) - 1 :]
        items = len(order_I)
        place_I = np.empty(items, dtype=np.int64)
        place_I[order_I] = np.arange(items)
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
        first_n = place_I[arrays.node_item[:inner]]
        return cls(place_I, np.concatenate([first_n, np.arange(items)]), leaf_end_I[last_V - inner], choices_V)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The arrays by name on ``device``; on the CPU they share memory."""
        return {item.name: torch.from_numpy(getattr(self, item.name)).to(device) for item in fields(self)}
