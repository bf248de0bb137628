"""What a nightly run trains and exports: its recipe, its codes, and what a version has beside its weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from tawin_nemo.commands.convert import export as write_export
from tawin_nemo.config.schema import Recipe, RetrainConfig
from tawin_nemo.data.interactions import ITEMS_FILE as DATA_ITEMS
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.export import codes_of
from tawin_nemo.run.exported import COLUMNS_FILE
from tawin_nemo.run.published import INDEX_FOLDER, ITEMS_FILE, POPULARITY_FILE
from tawin_nemo.run.world import World, build_world, open_run_dir
from tawin_nemo.tools.retrain.freshness import write_popularity
from tawin_nemo.tools.retrain.index import codes_of_index, make_codes
from tawin_nemo.tools.retrain.publish_root import EXPORT, NightlyRun, PublishRoot
from tawin_nemo.train.pipeline import run_pipeline
from tawin_nemo.types import EXTERNAL_ID, TITLE
from tawin_nemo.util.files import atomic_path

CODES_FOLDER = "semantic_ids"


def night_codes(recipe: Recipe, run: NightlyRun, root: PublishRoot) -> Path | None:
    """The index file of a nightly run, made on rank 0; None for a catalog of titles. Collective.

    A run that starts from a published version grows the version's index; any other one begins an index of its own.
    """
    if recipe.catalog.kind != "sid":
        return None
    out = root.run_dir(run.date) / CODES_FOLDER
    return runtime.on_rank_0(lambda: make_codes(recipe, Path(run.data), run.start, out))


def run_recipe(recipe: Recipe, run: NightlyRun, root: PublishRoot, codes: Path | None) -> Recipe:
    """The recipe as the nightly run reads it."""
    model, data = recipe.model, replace(recipe.data, root=run.data, dataset="prepared")
    if run.start:  # the tokenizer lies beside the weights
        model, data = replace(model, init=run.start), replace(data, tokenizer="auto")
    catalog = recipe.catalog if codes is None else replace(recipe.catalog, index=str(codes.resolve()))
    return replace(
        recipe, run_dir=str(root.run_dir(run.date)), model=model, data=data, catalog=catalog, retrain=RetrainConfig()
    )  # fmt: skip


def train_and_export(recipe: Recipe, run: NightlyRun, root: PublishRoot, codes: Path | None) -> None:
    """Train what the recipe asks for; export the RL stage, or SFT where there is no RL.

    A token of ``codes`` that the published version does not have gets a row as ``model.new_tokens`` says; all other
    rows are the published ones.
    """
    run_dir = root.run_dir(run.date)
    export = run_dir / EXPORT
    if export.is_dir() or root.version(run.date).is_dir():
        return
    own_recipe = run_recipe(recipe, run, root, codes)
    open_run_dir(own_recipe, same_recipe=True)
    world = build_world(own_recipe, run_dir, Path(run.data), codes_path=codes)
    run_pipeline(world)
    trained = "preference" if recipe.preference.enabled else "sft"
    stage = run_dir / ("rl" if recipe.rl.enabled else trained)
    write_export(world, str(stage), export, complete=partial(complete, world, root, codes))
    runtime.barrier()


def complete(world: World, root: PublishRoot, codes: Path | None, folder: Path) -> None:
    """Add to an export what makes it a version: item numbers, popularity, the items' columns and the index."""
    if codes is not None and codes.parent == world.run_dir / CODES_FOLDER:
        shutil.copytree(codes.parent, folder / INDEX_FOLDER)
    write_popularity(folder / POPULARITY_FILE, world.dataset)
    if not (folder / COLUMNS_FILE).is_file() and world.dataset.root is not None:
        shutil.copyfile(world.dataset.root / DATA_ITEMS, folder / COLUMNS_FILE)
    number_items(world, root.folder / ITEMS_FILE, folder)


def number_items(world: World, register: Path, folder: Path) -> None:
    """Give items that ``register`` does not have the next numbers there, and write them all into the version.

    Line n of both files is item number n. In that of the version, items that are not in its catalog have the codes that
    its index keeps for them, or none.
    """
    lines = register.read_text(encoding="utf-8").splitlines() if register.is_file() else []
    known = {item[EXTERNAL_ID]: item for item in map(json.loads, lines)}
    catalog = world.catalog
    for name, title in zip(catalog.external_ids, catalog.titles, strict=True):
        known[name] = {EXTERNAL_ID: name, TITLE: title}  # an old item keeps its place
    _write_lines(register, list(known.values()))
    index = folder / INDEX_FOLDER
    code_of = codes_of_index(index) if index.is_dir() else {}
    code_of |= dict(zip(catalog.external_ids, codes_of(catalog, world.tokenizer), strict=True))
    _write_lines(folder / ITEMS_FILE, [item | {"codes": code_of.get(name, [])} for name, item in known.items()])


def _write_lines(path: Path, items: list[dict[str, object]]) -> None:
    with atomic_path(path) as temporary:
        text = "".join(json.dumps(item) + "\n" for item in items)
        temporary.write_text(text, encoding="utf-8")
