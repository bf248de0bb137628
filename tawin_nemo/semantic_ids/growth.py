"""New items under frozen codebooks: existing items keep their codes, new ones get codes that nobody has."""

from __future__ import annotations

import numpy as np

from tawin_nemo.semantic_ids.coder import ItemCoder, random_codes
from tawin_nemo.semantic_ids.collisions import NO_TOKEN, Places, groups_of


def grow(codes_IL: np.ndarray, coder: ItemCoder, x_ND: np.ndarray, how: str, *, seed: int = 0) -> np.ndarray:
    """Codes of N new items, with as many columns as ``codes_IL`` (existing items) has.

    ``how`` is ``semantic_ids.collisions`` of the existing index. assign, sinkhorn: nobody shares codes; items of one
    family get its free last codes as in ``collisions.assigned``. dedup: shared codes get the next numbers of the last
    column. keep: codes may be shared. Raises DataError naming an item (of ``x_ND``) for which no code is left,
    ConfigError as ``random_codes``.
    """
    if not len(x_ND):
        return codes_IL[:0]
    books = coder.books
    if coder.method == "random":
        new_NL = random_codes(len(x_ND), levels=books.levels, codes=books.codes, seed=seed, taken=codes_IL)
    else:
        new_NL = coder.encode(x_ND)
        if how == "dedup":
            new_NL = _numbered(codes_IL, new_NL)
        elif how != "keep":
            new_NL = Places(codes_IL, books).give(new_NL, coder.latents(x_ND), np.arange(len(x_ND)))
    return np.pad(new_NL, ((0, 0), (0, codes_IL.shape[1] - new_NL.shape[1])), constant_values=NO_TOKEN)


def _numbered(codes_IL: np.ndarray, new_NL: np.ndarray) -> np.ndarray:
    """Dedup tokens behind those in use; a first item that has none keeps its shorter ID."""
    levels = new_NL.shape[1]
    following: dict[tuple[int, ...], int] = {}
    for row in codes_IL.tolist():
        key = tuple(row[:levels])
        following[key] = max(following.get(key, 0), row[levels] + 1)
    token_N = np.full(len(new_NL), NO_TOKEN, dtype=codes_IL.dtype)
    counts = {tuple(new_NL[group[0]].tolist()): len(group) for group in groups_of(new_NL)}
    for item, row in enumerate(new_NL.tolist()):
        key = tuple(row)
        if key in following or counts[key] > 1:
            token_N[item] = following.get(key, 0)
            following[key] = int(token_N[item]) + 1
    return np.column_stack([new_NL, token_N]).astype(codes_IL.dtype)
