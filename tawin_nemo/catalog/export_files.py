"""A catalog as files beside exported weights: a table, JSON lines for other serving systems, and the token trie.

N trie nodes, I items, R ranks of the sorted items, E entries of (depth, rank).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.types import EXTERNAL_ID, ITEM, TITLE, TokenRows
from tawin_nemo.util.errors import CatalogError

CATALOG_FILE, LINES_FILE, TRIE_FILE = "catalog.parquet", "catalog.jsonl", "trie.safetensors"
CODES, TOKEN_IDS = "codes", "token_ids"
_TRIE_FORMAT = "tawin_nemo.trie/1"  # layout: the docstring of tawin_trie.py


def write_catalog(folder: Path, catalog: Catalog, codes: Sequence[Sequence[str]]) -> None:
    """Write ``catalog.parquet``, ``catalog.jsonl`` and ``trie.safetensors`` into an existing folder.

    The table has the columns item, external_id, title, codes (list; empty for a catalog of titles) and token_ids
    (list; the end token last). Line i of the JSON lines is item i: ``item_id`` (the external id), ``token_ids``
    (without the end token), ``codes`` and ``title``, which is what NVIDIA's SID-GR reads as it stands.
    """
    _write_table(folder / CATALOG_FILE, catalog, codes)
    with (folder / LINES_FILE).open("w", encoding="utf-8") as lines:
        for item, (external, title) in enumerate(zip(catalog.external_ids, catalog.titles, strict=True)):
            path = catalog.paths[item].tolist()
            line = {"item_id": external, TOKEN_IDS: path[:-1], CODES: list(codes[item]), TITLE: title}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    about = {"format": _TRIE_FORMAT, "end_token": int(catalog.paths.flat[-1]), "catalog": catalog.fingerprint}
    # One entry: safetensors writes several in an order of its own, which would give equal exports unequal bytes.
    save_file(trie_rows(catalog), folder / TRIE_FILE, {"tawin_trie": json.dumps(about)})


def _write_table(path: Path, catalog: Catalog, codes: Sequence[Sequence[str]]) -> None:
    token_ids = pa.LargeListArray.from_arrays(
        pa.array(catalog.paths.offsets, pa.int64()), pa.array(catalog.paths.flat.astype(np.int32))
    )
    columns = {
        ITEM: pa.array(np.arange(len(catalog)), pa.int64()),
        EXTERNAL_ID: pa.array(catalog.external_ids, pa.string()),
        TITLE: pa.array(catalog.titles, pa.string()),
        CODES: pa.array([list(item) for item in codes], pa.list_(pa.string())),
        TOKEN_IDS: token_ids,
    }
    pq.write_table(pa.table(columns), path)


def read_catalog(folder: Path) -> tuple[Catalog, list[list[str]]]:
    """The catalog in the folder of an export, with the codes of its items (empty lists for a catalog of titles).

    Raises CatalogError for a file that is missing or cannot be read.
    """
    path = folder / CATALOG_FILE
    try:
        table = pq.read_table(path, columns=[EXTERNAL_ID, TITLE, CODES, TOKEN_IDS])
    except (pa.ArrowException, OSError) as error:
        raise CatalogError(f"{path} cannot be read ({error}); export the model again") from error
    external_ids, titles, codes, rows = (table[name].to_pylist() for name in table.column_names)
    paths = TokenRows.from_lists(rows)
    kind = "sid" if any(codes) else "title"
    return Catalog(titles, external_ids, kind, paths, TokenTrie.from_paths(paths, names=titles)), codes


def trie_rows(catalog: Catalog) -> dict[str, np.ndarray]:
    """The arrays of ``trie.safetensors``: a token trie in compressed rows, nodes in the order of (depth, path).

    A path makes a node of its own for every token behind those that it shares with the path before it in the sorted
    catalog. The parent of the node (depth, rank) is the last node of the depth above whose rank is not larger.
    """
    arrays = catalog.trie.arrays
    order_R = arrays.node_item[catalog.trie.num_inner :].astype(np.int64)
    paths = catalog.paths.take(order_R)
    shared_R = _shared_with_the_one_before(paths)
    new_R = paths.lengths - shared_R
    rank_E = np.repeat(np.arange(len(paths)), new_R)
    depth_E = np.arange(len(rank_E)) - np.repeat(np.cumsum(new_R) - new_R, new_R) + shared_R[rank_E] + 1
    token_E = paths.flat[paths.offsets[rank_E] + depth_E - 1]
    by_depth = np.lexsort((rank_E, depth_E))
    rank_E, depth_E, token_E = rank_E[by_depth], depth_E[by_depth], token_E[by_depth]
    key_E = depth_E * len(paths) + rank_E

    def node_of(depth: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """The node at this depth on the path of this rank; the root has depth 0."""
        return np.where(depth == 0, 0, np.searchsorted(key_E, depth * len(paths) + rank, side="right"))

    nodes = len(token_E) + 1
    parent_E = node_of(depth_E - 1, rank_E)
    leaf_R = node_of(paths.lengths, np.arange(len(paths)))
    by_leaf = np.argsort(leaf_R, kind="stable")
    return {
        "offsets": _offsets(parent_E, nodes),
        "tokens": token_E.astype(np.int32),
        "item_offsets": _offsets(leaf_R, nodes),
        "items": order_R[by_leaf],
    }


def _offsets(row_E: np.ndarray, rows: int) -> np.ndarray:
    counts = np.bincount(row_E, minlength=rows)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _shared_with_the_one_before(paths: TokenRows) -> np.ndarray:
    """For each of the sorted paths the number of tokens that it begins with like the one before it; 0 for the first."""
    lengths, first = paths.lengths, paths.offsets[:-1]
    shared_R = np.zeros(len(paths), dtype=np.int64)
    alive = np.arange(1, len(paths))
    depth = 0
    while len(alive):
        alive = alive[(lengths[alive] > depth) & (lengths[alive - 1] > depth)]
        alive = alive[paths.flat[first[alive] + depth] == paths.flat[first[alive - 1] + depth]]
        depth += 1
        shared_R[alive] = depth
    return shared_R
