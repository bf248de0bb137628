"""Published versions in a server (``serve.follow``): the one it starts with, and how the next one is made ready."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from tawin_nemo.data.interactions import read_item_table
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.exported import COLUMNS_FILE, exported_world, is_export
from tawin_nemo.run.published import ITEMS_FILE, LATEST, VERSIONS, check_version
from tawin_nemo.run.world import World
from tawin_nemo.serve.engine.catalog import NewItem, PromptFormat, ServedCatalog
from tawin_nemo.serve.engine.item_fields import ItemFields
from tawin_nemo.serve.engine.items_file import read_items
from tawin_nemo.serve.engine.numbering import known_items, numbered
from tawin_nemo.serve.engine.weight_sources import FromVersion
from tawin_nemo.serve.http.follower import Follower
from tawin_nemo.serve.http.server import Server
from tawin_nemo.util.errors import CheckpointError, ConfigError

#: Makes errors of any kind into TawinErrors that name the path, and confines what is opened (``commands.serve``).
Reading = Callable[[str, list[Path]], AbstractContextManager[None]]


def check_start(world: World) -> None:
    """Raises ConfigError when the ranks start with different versions, CheckpointError for a broken one. Collective."""
    folders = runtime.gather_objects(world.recipe.checkpoint)
    if len(set(folders)) > 1:
        raise ConfigError(f"{LATEST} moved while the ranks started ({', '.join(sorted(set(folders)))}); start again")
    runtime.on_rank_0(lambda: check_version(Path(world.recipe.checkpoint)))


def version_world(world: World, folder: Path) -> World:
    """The world of a published version, for the server whose own world is ``world``.

    Raises ConfigError for a version with other prompts, CatalogError for one whose catalog was changed, CheckpointError
    for a folder that is no export.
    """
    if not is_export(folder):
        raise CheckpointError(f"{folder} is no export; publish it again")
    model = replace(world.recipe.model, init=str(folder))
    recipe = replace(world.recipe, checkpoint=str(folder), start="", model=model)
    return exported_world(recipe, folder, world.run_dir, None)


def known_numbers(folder: Path | None) -> list[NewItem]:
    """The items in the order of their numbers, of a published version; empty for other exports and for checkpoints."""
    file = folder / ITEMS_FILE if folder else None
    return read_items(file) if file and file.is_file() else []


def follower_of(world: World, server: Server, reading: Reading) -> Follower:
    """What puts newer versions of ``serve.follow`` into use in ``server``, which started with that of ``world``."""
    settings = world.recipe.serve
    root, context, changes = Path(settings.follow), server.context, server.control.changes
    generations = iter(range(1, 1 << 62))
    template, data = world.template, world.recipe.data

    def put(folder: Path) -> None:
        with reading(str(folder), [root / VERSIONS]):
            new, published = version_world(world, folder), known_numbers(folder)
            columns = folder / COLUMNS_FILE
            table = read_item_table(columns) if columns.is_file() else None
        if new.template.kind != template.kind:
            raise ConfigError(f"{folder} has a catalog of kind {new.template.kind}, the server one of {template.kind}")
        prompt_format = PromptFormat(
            new.tokenizer, new.template, data.max_history, data.max_prompt_tokens, next(generations), new.shape.vocab,
            new.shape.positions,
        )  # fmt: skip

        def make(current: ServedCatalog, version: int) -> ServedCatalog:
            known = known_items(current, published)
            made = numbered(
                new.catalog, new.item_texts, prompt_format, known, version=version, recommender=current.recommender
            )
            if table is not None:  # numbers are the same in both catalogs, so that older requests can read it as well
                context.filters.fields = ItemFields.of(table, made.external_ids)
            return made

        changes.follow(make, FromVersion.at(folder))

    return Follower(root, Path(world.recipe.checkpoint), poll_s=settings.follow_s, put=put)
