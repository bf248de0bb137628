"""The verb convert: a checkpoint as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tawin_nemo.commands.session import writing
from tawin_nemo.models.megatron.hf.io import save_hf
from tawin_nemo.run.export import special_ids, write_companions
from tawin_nemo.run.world import World
from tawin_nemo.train.item_tokens import check_no_item_tokens
from tawin_nemo.train.start import starting_model
from tawin_nemo.util.errors import ConfigError


def convert(world: World) -> dict[str, Any]:
    """Write ``checkpoint`` as a Hugging Face directory with its tokenizer, catalog and trie."""
    options = world.recipe.convert
    if not options.output:
        raise ConfigError("convert.output is empty; name the folder for the Hugging Face export")
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"convert.output={output} is no folder; name one, which may exist or not")
    with writing(output.parent, "convert", outputs=[output.name]):
        export(world, world.recipe.checkpoint, output)
    return {"exported": options.output, "checkpoint": world.recipe.checkpoint}


def export(
    world: World, checkpoint: str, output: Path, *, complete: Callable[[Path], None] = lambda folder: None
) -> None:
    """Write the model of ``checkpoint`` (empty: where a run would start) with tokenizer and catalog to ``output``.

    ``complete`` adds further files, on rank 0, before the folder gets its name.
    Raises ConfigError for a model with item tokens, which an ordinary model directory cannot hold.
    """
    check_no_item_tokens(world.recipe, "an export is an ordinary model, without the projection that makes item tokens")

    def finish(folder: Path) -> None:
        write_companions(world, folder)
        complete(folder)

    save_hf(
        starting_model(world, None, checkpoint_path=checkpoint), world.shape, output,
        max_shard_bytes=world.recipe.convert.shard_mb * 1_000_000, tokenizer_dir=world.tokenizer_dir,
        special=special_ids(world), finish=finish,
    )  # fmt: skip
