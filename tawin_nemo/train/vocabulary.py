"""Which tokens of a run its pretrained weights do not know, and what their rows begin with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.data.tokenizer import words_of
from tawin_nemo.models.megatron.hf.new_tokens import NewTokens
from tawin_nemo.run.world import World
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError


def new_tokens(world: World) -> NewTokens:
    """The tokens that were added to the tokenizer of ``model.init`` (of ``data.tokenizer`` where that has none)."""
    recipe = world.recipe
    folder = Path(recipe.model.init)
    if not (folder / "tokenizer.json").is_file():
        folder = Path(recipe.data.tokenizer)
    known = words_of(folder)
    own = world.tokenizer.backend.get_vocab(with_added_tokens=True)
    ids = np.sort(np.array([token for word, token in own.items() if word not in known], dtype=np.int64))
    if recipe.model.new_tokens == "mean":
        return NewTokens(ids)
    return NewTokens(ids, words_of_codes(ids, world.catalog, world.tokenizer.encode_batch(world.dataset.items.titles)))


def words_of_codes(ids: np.ndarray, catalog: Catalog, title_I: TokenRows) -> TokenRows:
    """For each token the title tokens of all items that are written with it, item by item; none for other tokens."""
    item_E = np.repeat(np.arange(len(catalog)), catalog.paths.lengths)
    place_E = np.minimum(np.searchsorted(ids, catalog.paths.flat), max(len(ids) - 1, 0))
    used = np.flatnonzero(ids[place_E] == catalog.paths.flat) if len(ids) else np.zeros(0, dtype=np.int64)
    used = used[np.argsort(place_E[used], kind="stable")]
    words = title_I.take(item_E[used])
    lengths = np.bincount(place_E[used], weights=words.lengths, minlength=len(ids)).astype(np.int64)
    return TokenRows(words.flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def only_new_tokens(world: World) -> NewTokens:
    """What ``model.freeze_backbone`` leaves to train. Raises ConfigError when that is nothing."""
    new = new_tokens(world)
    if len(new.ids) == 0:
        raise ConfigError(
            f"model.freeze_backbone=true trains what model.init={world.recipe.model.init} does not know, but it knows "
            "all tokens of this catalog; set freeze_backbone=false"
        )
    return new
