"""The item text vectors that ``baseline.items=text`` projects: made by ``semantic_ids.text``, kept in the stage.

Axes beyond ``types``: E dimensions of a text vector.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.data.text_vectors import load_item_vectors
from tawin_nemo.run.world import World
from tawin_nemo.semantic_ids.encoders import VECTORS, embed, item_texts
from tawin_nemo.semantic_ids.hf_encoder import encoder_folder
from tawin_nemo.util.errors import CheckpointError, DataError

#: The folder of the vectors in a stage directory.
TEXT_VECTORS = "text_vectors"


def item_text_vectors(world: World, folder: Path) -> Tensor:
    """Vectors [I, E] float32 of all items of the catalog, made or reused in ``folder`` with their manifest.

    Raises ConfigError for an encoder that is absent; DataError for data without item texts, for items without text, and
    for a vector file (``semantic_ids.text.encoder=file``) that is absent, damaged or of other items.
    """
    items, cfg = world.dataset.items, world.recipe.semantic_ids.text
    made = embed(_texts(world), cfg, folder, seed=world.recipe.seed, external_ids=items.external_ids)
    return torch.from_numpy(made.vectors_ID)


def check_item_texts(world: World) -> None:
    """Raises what ``item_text_vectors`` would raise for the texts, the encoder's files and the vector file."""
    cfg = world.recipe.semantic_ids.text
    _texts(world)
    if cfg.encoder == "file":
        load_item_vectors(Path(cfg.source), world.catalog.external_ids, key="semantic_ids.text.source")
    elif cfg.encoder != "tfidf":
        encoder_folder(cfg)


def vectors_fingerprint(text_IE: Tensor) -> str:
    """SHA-256 of the vectors' shape and bytes."""
    array = np.ascontiguousarray(text_IE.cpu().numpy())
    return hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()


def stored_vectors(folder: Path, fingerprint: str) -> Tensor:
    """The vectors of a finished stage. Raises CheckpointError when they are missing, unreadable or others."""
    path = folder / VECTORS
    try:
        text_IE = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise CheckpointError(
            f"{path} holds the text vectors of this baseline and cannot be read ({error}); bring the folder back, or "
            "train the baseline again"
        ) from error
    if vectors_fingerprint(text_IE) != fingerprint:
        raise CheckpointError(
            f"{path} are not the text vectors that this baseline was trained with; bring the folder back, or train the "
            "baseline again"
        )
    return text_IE


def _texts(world: World) -> list[str]:
    items, cfg = world.dataset.items, world.recipe.semantic_ids.text
    if cfg.encoder == "file":
        return list(items.titles)
    if not world.dataset.has_titles:
        raise DataError(
            "baseline.items=text embeds the texts of the items, but the data have no item file; name one with "
            "prepare.metadata=FILE, or set semantic_ids.text.encoder=file"
        )
    return item_texts(items.titles, items.descriptions, cfg.fields, needs_words=cfg.encoder == "tfidf")
