"""The item vectors of ``model.item_tokens``: taken from a finished baseline once, then kept in the run directory.

Axes beyond ``types``: E dimensions of a vector.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.baselines.load import load_baseline
from tawin_nemo.baselines.protocol import EmbeddingRecommender
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.world import ITEM_VECTORS, World
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.files import atomic_path

if TYPE_CHECKING:
    from tawin_nemo.models.megatron.model.build import HiddenGPT


def keep_item_vectors(world: World) -> None:
    """Write ``RUN_DIR/item_vectors.npy`` where the recipe has ``model.item_tokens``, unless it is there. Collective.

    Raises ConfigError as ``item_vectors_of``.
    """
    if world.recipe.model.item_tokens:
        runtime.on_rank_0(lambda: _keep(world))


def _keep(world: World) -> None:
    path = world.run_dir / ITEM_VECTORS
    if not path.is_file():
        vectors_IE = item_vectors_of(world)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, vectors_IE)


def item_vectors_of(world: World) -> np.ndarray:
    """The vectors [I, E] float32 by which the baseline stage ``model.item_tokens`` reads items.

    Raises ConfigError when it is no finished baseline, is of another catalog, or has no vectors (tiger).
    """
    stage = world.recipe.model.item_tokens
    try:
        model = load_baseline(Path(stage), external_ids=world.catalog.external_ids)
    except ConfigError as error:
        raise ConfigError(f"model.item_tokens={stage}: {error}") from error
    if not isinstance(model, EmbeddingRecommender):
        raise ConfigError(f"model.item_tokens={stage} has no vectors of items; name a gru4rec, caser or sasrec stage")
    return np.asarray(model.items.weight[1:].detach().float().cpu().numpy())


def check_no_item_tokens(recipe: Recipe, reason: str) -> None:
    """Raises ConfigError that gives ``reason`` where the recipe has ``model.item_tokens``."""
    if recipe.model.item_tokens:
        raise ConfigError(
            f"model.item_tokens={recipe.model.item_tokens} is not supported here: {reason}; use evaluate and generate, "
            "or a model without item tokens"
        )


def with_item_tokens(world: World, model: HiddenGPT) -> None:
    """Give ``model`` the projection of the run's item vectors, where the recipe has ``model.item_tokens``.

    Raises ConfigError when the run's file of vectors is missing or of another catalog.
    """
    if not world.recipe.model.item_tokens:
        return
    from tawin_nemo.models.megatron.model.item_tokens import add_item_tokens

    add_item_tokens(model, _kept(world), seed=world.recipe.seed, std=world.shape.init_std)


def _kept(world: World) -> Tensor:
    path = world.run_dir / ITEM_VECTORS
    try:
        vectors_IE = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{path} holds the item vectors of model.item_tokens and cannot be read ({error}); bring it back, or start "
            "a new run"
        ) from error
    if vectors_IE.ndim != 2 or len(vectors_IE) != len(world.catalog):
        raise ConfigError(f"{path} has the shape {vectors_IE.shape}, but the catalog has {len(world.catalog)} items")
    return torch.from_numpy(vectors_IE)
