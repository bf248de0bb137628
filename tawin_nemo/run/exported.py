"""An exported model as the source of a verb: its weights, tokenizer, catalog and prompts, wherever the folder lies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.catalog.export_files import read_catalog
from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.backbones import with_vocab
from tawin_nemo.config.load import differences, to_yaml
from tawin_nemo.config.schema import Recipe
from tawin_nemo.data.interactions import Dataset, ItemFrame, Split
from tawin_nemo.data.jinja_prompts import Columns, JinjaTemplate
from tawin_nemo.data.prompt_encoder import PromptEncoder
from tawin_nemo.data.prompts import Template, build_template
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.node import open_dataset, open_samples
from tawin_nemo.run.world import World, check_lengths, deadline, limited
from tawin_nemo.types import SPLITS, TokenRows
from tawin_nemo.util.errors import CatalogError, ConfigError
from tawin_nemo.util.files import sha256

FORMAT = "tawin_nemo.export/1"
SETTINGS_FILE, RECIPE_FILE = "tawin.json", "recipe.yaml"
#: The items' further columns, where a Jinja template shows them.
COLUMNS_FILE = "columns.parquet"
#: Keys that an export fixes: what a prompt is, and how items are written.
BOUND = (
    "data.template",
    "data.chat",
    "data.max_history",
    "data.max_prompt_tokens",
    "data.show_candidates",
    "catalog.kind",
)


def is_export(path: str | Path) -> bool:
    """True for a folder that ``tawin-nemo convert`` wrote: a model with its tokenizer and catalog."""
    folder = Path(path).expanduser()
    return bool(str(path)) and all((folder / name).is_file() for name in (SETTINGS_FILE, "config.json"))


def from_export(recipe: Recipe) -> Recipe:
    """The recipe with ``model.init`` set where ``checkpoint`` names an export: its shape and weights are then used."""
    if not is_export(recipe.checkpoint):
        return recipe
    return replace(recipe, start="", model=replace(recipe.model, init=recipe.checkpoint))


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of tawin.json. Raises ConfigError for another format than this version reads."""
    path = folder / SETTINGS_FILE
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); export the model again") from error
    if settings.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {settings.get('format')!r}, this version reads {FORMAT!r}; export again")
    return settings


def check_bound(recipe: Recipe, folder: Path) -> None:
    """Raises ConfigError when ``recipe`` gives a key of ``BOUND`` another value than the export's training had."""
    stored = (folder / RECIPE_FILE).read_text(encoding="utf-8")
    changed = [line for line in differences(stored, to_yaml(recipe)) if line.startswith(BOUND)]
    if changed:
        raise ConfigError(
            f"{folder} was trained with other values: {'; '.join(changed)}. A model is used with the prompts and items "
            f"of its training: leave these keys out (checkpoint={folder} without --recipe reads its own recipe)"
        )


def exported_world(recipe: Recipe, folder: Path, run_dir: Path, data_root: Path | None) -> World:
    """The world of a verb on the export in ``folder``: its tokenizer and catalog; rows of ``data_root``, if given.

    ``run_dir`` is where the verb may write. Raises ConfigError for a recipe with other prompts than those of the
    export, CatalogError for a catalog that was changed and for data with items that it does not have.
    """
    settings = read_settings(folder)
    check_bound(recipe, folder)
    tokenizer = Tokenizer.load(folder)
    if sha256(folder / "tokenizer.json") != settings["tokenizer"]:
        raise ConfigError(f"{folder}/tokenizer.json is not the tokenizer of this export; export the model again")
    catalog, codes = read_catalog(folder)
    if catalog.fingerprint != settings["catalog"]["fingerprint"]:
        raise CatalogError(f"{folder}/catalog.parquet is not the catalog of this export; export the model again")
    template = _template(settings["prompt"], recipe, folder)
    texts = ["".join(item) for item in codes] if template.kind == "sid" else catalog.titles
    dataset = _dataset(catalog, data_root)
    splits = {name: limited(getattr(dataset, name), name, recipe) for name in SPLITS}
    samples = open_samples(splits, PromptEncoder(texts, tokenizer, template), recipe.data)
    shape = with_vocab(backbone_from_hf(folder), tokenizer.size)
    check_lengths(samples, catalog, shape)
    return World(
        recipe, run_dir, dataset, tokenizer, template, catalog, texts, samples, shape,
        runtime.data_parallel(), deadline(recipe.trainer.max_time), export=folder,
    )  # fmt: skip


def _template(prompt: dict[str, Any], recipe: Recipe, folder: Path) -> Template:
    """The template of the export's training, with the text that recipe keys do not fix."""
    template = build_template(recipe.data.template, recipe.catalog.kind) if not prompt["jinja"] else JinjaTemplate(
        kind=recipe.catalog.kind, source=prompt["jinja"], columns=_columns(folder / COLUMNS_FILE)
    )  # fmt: skip
    before, behind = prompt["chat"]
    return template.with_chat((before, behind)) if before or behind else template


def _columns(file: Path) -> Columns:
    return Columns.of(pl.read_parquet(file).to_dict(as_series=False)) if file.is_file() else Columns()


def _dataset(catalog: Catalog, data_root: Path | None) -> Dataset:
    """The rows of a prepared dataset over the items of ``catalog``; none where ``data_root`` is None."""
    items = ItemFrame(catalog.external_ids, catalog.titles, [""] * len(catalog))
    if data_root is None:
        none = np.zeros(0, dtype=np.int64)
        empty = Split(none, TokenRows.from_lists([]), none, none)
        return Dataset(items, empty, empty, empty, {})
    data = open_dataset(data_root)
    number_of = {name: item for item, name in enumerate(catalog.external_ids)}
    unknown = [name for name in data.items.external_ids if name not in number_of]
    if unknown:
        raise CatalogError(
            f"{data_root} has {len(unknown)} items that the exported catalog does not have ({', '.join(unknown[:5])}); "
            "use the data that the model was trained on"
        )
    numbers_I = np.array([number_of[name] for name in data.items.external_ids], dtype=np.int64)
    train, valid, test = (_renumbered(getattr(data, name), numbers_I) for name in SPLITS)
    return Dataset(items, train, valid, test, data.manifest, root=data.root)


def _renumbered(split: Split, numbers_I: np.ndarray) -> Split:
    """A split with the item numbers of another catalog; the split itself where these are the same."""
    if np.array_equal(numbers_I, np.arange(len(numbers_I))):
        return split

    def rows(old: TokenRows) -> TokenRows:
        return TokenRows(numbers_I[old.flat], old.offsets)

    candidates = None if split.candidates is None else rows(split.candidates)
    return replace(split, history=rows(split.history), target_N=numbers_I[split.target_N], candidates=candidates)
