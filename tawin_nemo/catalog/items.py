"""The catalog: what can be recommended, and how each item is written as tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError


@dataclass(frozen=True, eq=False)
class Catalog:
    """Items 0 .. I - 1 with their token paths (EOS included) and the trie over those paths.

    Items with equal paths (duplicate titles, colliding semantic IDs) share one leaf; the model cannot distinguish them.
    Raises CatalogError if the parts do not have one entry per item.
    """

    titles: list[str]
    external_ids: list[str]
    kind: str  # title | sid
    paths: TokenRows
    trie: TokenTrie

    def __post_init__(self) -> None:
        sizes = {
            "titles": len(self.titles),
            "external_ids": len(self.external_ids),
            "paths": len(self.paths),
            "trie": self.trie.num_items,
        }
        if len(set(sizes.values())) != 1:
            raise CatalogError(f"the parts of the catalog differ in their number of items: {sizes}")

    def __len__(self) -> int:
        return len(self.titles)

    @property
    def leaf_I(self) -> np.ndarray:
        """Trie leaf of every item, int64 [I]."""
        return self.trie.leaf_I

    @property
    def sharing_I(self) -> np.ndarray:
        """Number of items on each item's token path, itself included (1 = unique). int64 [I]."""
        return self.trie.sharing_I

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over external ids, titles and token paths of all items, see the function ``fingerprint``."""
        return fingerprint(self.external_ids, self.titles, self.paths)

    def duplicates(self) -> list[tuple[int, ...]]:
        """Groups of items that share a token path, in order of their first item."""
        return sorted(tuple(self.trie.items(int(leaf)).tolist()) for leaf in self.trie.shared_leaves())

    def summary(self) -> str:
        """One line for the log: size, collisions, path lengths, trie."""
        lengths = self.paths.lengths
        return (
            f"{len(self)} items ({self.kind}), {self.trie.num_leaves} distinct token paths, "
            f"{int((self.sharing_I > 1).sum())} items share theirs, "
            f"{lengths.mean():.1f} tokens per path (max {int(lengths.max())}), "
            f"{self.trie.num_inner} trie nodes with a choice"
        )


def fingerprint(external_ids: Sequence[str], titles: Sequence[str], paths: TokenRows) -> str:
    """SHA-256 over ids, titles and token paths of items in order: equal only if two processes number items alike."""
    digest = hashlib.sha256()
    for names in zip(external_ids, titles, strict=True):
        digest.update(json.dumps(names).encode())
    digest.update(paths.flat.tobytes())
    return digest.hexdigest()
