"""The models that stages and verbs start from: random, pretrained, or those of a checkpoint.

Pretrained weights have no rows for the tokens that were added to their tokenizer; the rows of those tokens are
initialised by ``model.new_tokens``.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import AS_MODEL, LoraConfig, Recipe
from tawin_nemo.data.tokenizer import read_vocabulary
from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.checkpoint.adapters import BASE, LORA
from tawin_nemo.models.megatron.checkpoint.files import read_record
from tawin_nemo.models.megatron.hf.io import load_hf
from tawin_nemo.models.megatron.hf.new_tokens import NewTokens
from tawin_nemo.models.megatron.model.adapters import add_adapters, merge
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.model.precision import in_precision
from tawin_nemo.placement.weight_sync import build_engine
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.exported import is_export
from tawin_nemo.run.trained import check_item_vectors, check_tokenizer, chosen_checkpoint, resolve_checkpoint
from tawin_nemo.run.world import World
from tawin_nemo.train.assist import add_assistant
from tawin_nemo.train.base import Base, origin, own_base
from tawin_nemo.train.item_tokens import with_item_tokens
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.hub import local_folder
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def starting_model(
    world: World, stage: str | None, *, checkpoint_path: str = "", dropout: float = 0.0, precision: str = AS_MODEL
) -> GPTModel:
    """A model with the weights of a finished ``stage`` of this run, on this rank's device.

    Without a stage (None) they are those of ``checkpoint_path``, else of ``start``, else of ``model.init``. Adapters
    (``model.lora``) are merged into the weights that they belong to. Only SFT uses dropout: with it the policy ratio of
    an unchanged policy would be noise around 1, which the loss would clip.
    ``precision`` may differ from the recipe's (``reference.precision``, ``eval.precision``). Raises ConfigError for a
    path that is no checkpoint, for one that was trained with another tokenizer or other item vectors, and for adapters
    whose frozen weights are gone or have changed.
    """
    recipe = world.recipe
    cfg = in_precision(replace(recipe.model, dropout=dropout), precision)  # build_model reads both from the section
    path = starting_checkpoint(world, stage, checkpoint_path)
    if path is not None:
        check_tokenizer(path, world.tokenizer.fingerprint)
        check_item_vectors(path, world.item_vectors_fingerprint)
    parts = origin(world, path)
    base = parts.base
    model = build_model(
        world.shape, cfg, seed=base.seed, rollout_tp=recipe.rollout_layout[0], to_be_loaded=base.kind != "random"
    )  # fmt: skip
    if parts.whole is None and base.kind == "pretrained":
        load_hf(model, world.shape, local_folder(base.source, base.revision), new_tokens(world, base))
    with_item_tokens(world, model)
    if parts.whole is not None:
        checkpoint.load_checkpoint(parts.whole, model=model)
    for adapters in parts.adapters:
        merge_checkpoint(model, world.shape, adapters)
    return model


def starting_checkpoint(world: World, stage: str | None, checkpoint_path: str = "") -> Path | None:
    """The checkpoint that ``starting_model`` loads; None where the weights are those of ``model.init``."""
    if stage is not None:
        return chosen_checkpoint(world.run_dir / stage)
    if checkpoint_path and not is_export(checkpoint_path):  # the weights of an export are those of ``model.init``
        return resolve_checkpoint(checkpoint_path, "checkpoint")
    return resolve_checkpoint(world.recipe.start, "start") if world.recipe.start else None


def merge_checkpoint(model: GPTModel, shape: Backbone, path: Path) -> None:
    """Add the adapters of the checkpoint ``path`` to the weights of ``model``. Raises CheckpointError."""
    record = read_record(path)
    add_adapters(model, shape, LoraConfig(**record[LORA]), seed=0, base=record[BASE])
    checkpoint.load_checkpoint(path, model=model)
    merge(model)
    model.requires_grad_(True)


def adapt(world: World, model: GPTModel, stage: str | None, *, dropout: bool) -> None:
    """Freeze the model that a training stage starts from (``starting_model``) and give it the adapters of
    ``model.lora``; nothing with rank 0. Collective.

    SFT (``dropout``) also trains the projection of ``model.item_tokens``; in later stages it is frozen, so that the
    model without its adapters is the one that they started from.
    """
    lora = world.recipe.model.lora
    if lora.rank == 0:
        return
    base = own_base(world, starting_checkpoint(world, stage))
    add_adapters(
        model, world.shape, lora, seed=world.recipe.seed, base=asdict(base), dropout=lora.dropout if dropout else 0.0
    )  # fmt: skip
    if dropout and model.item_tokens is not None:
        model.item_tokens.requires_grad_(True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log.info("LoRA of rank %d: %d parameters of this rank are trained, all others frozen", lora.rank, trained)


def merged(recipe: Recipe) -> Recipe:
    """``recipe`` for a model of ``starting_model``, which has no adapters."""
    return replace(recipe, model=replace(recipe.model, lora=LoraConfig()))


def engine_of(world: World) -> Engine:
    """An engine with the weights of ``checkpoint``, in ``eval.precision``, and the assistant of ``rollout.assist``.

    Raises ConfigError for a wrong path, of either.
    """
    precision, tokenizer = world.recipe.eval_precision, world.tokenizer.fingerprint
    model = checkpoint_model(world, precision)
    engine = build_engine(
        merged(world.recipe), model, world.shape, world.catalog, tokenizer=tokenizer, precision=precision
    )  # fmt: skip
    engine.receive_weights()
    add_assistant(world, engine)
    return engine


def checkpoint_model(world: World, precision: str = AS_MODEL) -> GPTModel:
    """The model of ``checkpoint``, a stage directory (its chosen step) or one step_N directory; where that key is
    empty, the model that a run would start from. Raises ConfigError when the path is neither."""
    return starting_model(world, None, checkpoint_path=world.recipe.checkpoint, precision=precision)


def new_tokens(world: World, base: Base | None = None) -> NewTokens:
    """The tokens that were added to the tokenizer of ``model.init`` (of ``data.tokenizer`` where that has none).

    ``base``: the pretrained weights below adapters, and how the rows of new tokens began there, where given.
    """
    recipe, model = world.recipe, world.recipe.model
    source, revision = (model.init, model.revision) if base is None else (base.source, base.revision)
    folder = local_folder(source, revision)
    if not (folder / "tokenizer.json").is_file():
        folder = Path(recipe.data.tokenizer)
    known = read_vocabulary(folder)
    own = world.tokenizer.backend.get_vocab(with_added_tokens=True)
    ids = np.sort(np.array([token for word, token in own.items() if word not in known], dtype=np.int64))
    if (model.new_tokens if base is None else base.new_tokens) == "mean":
        return NewTokens(ids)
    return NewTokens(ids, words_of_codes(ids, world.catalog, world.tokenizer.encode_batch(world.dataset.items.titles)))


def words_of_codes(ids: np.ndarray, catalog: Catalog, title_I: TokenRows) -> TokenRows:
    """For each of the tokens ``ids`` (ascending) the title tokens of all items whose paths contain it.

    The titles of several items follow each other; the row is empty where no item has the token.
    """
    item_E = np.repeat(np.arange(len(catalog)), catalog.paths.lengths)
    index_E = np.minimum(np.searchsorted(ids, catalog.paths.flat), max(len(ids) - 1, 0))
    used = np.flatnonzero(ids[index_E] == catalog.paths.flat) if len(ids) else np.zeros(0, dtype=np.int64)
    used = used[np.argsort(index_E[used], kind="stable")]
    words = title_I.take(item_E[used])
    lengths = np.bincount(index_E[used], weights=words.lengths, minlength=len(ids)).astype(np.int64)
    return TokenRows(words.flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def only_new_tokens(world: World) -> NewTokens:
    """The new tokens, whose rows alone ``model.freeze_backbone`` trains. Raises ConfigError when there are none."""
    new = new_tokens(world)
    if len(new.ids) == 0:
        raise ConfigError(
            f"model.freeze_backbone=true trains what model.init={world.recipe.model.init} does not know, but it knows "
            "all tokens of this catalog; set freeze_backbone=false"
        )
    return new
