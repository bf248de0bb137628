"""The verb convert: a checkpoint as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tawin_nemo.commands.from_checkpoint import checkpoint_model
from tawin_nemo.models.megatron.hf.io import save_hf
from tawin_nemo.run.world import World
from tawin_nemo.util.errors import ConfigError


def convert(world: World) -> dict[str, Any]:
    """Write ``checkpoint`` as a Hugging Face directory with its tokenizer."""
    options = world.recipe.convert
    if not options.output:
        raise ConfigError("convert.output is empty; name the folder for the Hugging Face export")
    model = checkpoint_model(world)
    save_hf(
        model, world.shape, Path(options.output),
        max_shard_bytes=options.shard_mb * 1_000_000, tokenizer_dir=world.run_dir / "tokenizer",
    )  # fmt: skip
    return {"exported": options.output, "checkpoint": world.recipe.checkpoint}
