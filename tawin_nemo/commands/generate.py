"""The verb generate: recommendations for some histories."""

from __future__ import annotations

from typing import Any

import numpy as np

from tawin_nemo.run.world import World
from tawin_nemo.train.start import engine_of
from tawin_nemo.types import NO_ITEM, TokenRows
from tawin_nemo.util.errors import ConfigError


def generate(world: World) -> dict[str, Any]:
    """Ranked recommendations for ``generate.history``, or for the first rows of ``generate.split``."""
    options = world.recipe.generate
    if options.history:
        unknown = [item for item in options.history if not 0 <= item < len(world.catalog.titles)]
        if unknown:
            raise ConfigError(f"generate.history names items {unknown}; items are 0..{len(world.catalog.titles) - 1}")
        histories = [list(options.history)[-world.recipe.data.max_history :]]
        texts = [world.template.prompt([world.item_texts[item] for item in history]) for history in histories]
        prompts = world.tokenizer.encode_batch(texts)
    else:
        samples = world.samples[options.split].take(np.arange(min(options.rows, len(world.samples[options.split]))))
        histories, prompts = [samples.history[i].tolist() for i in range(len(samples))], samples.prompts
    return {"recommendations": recommend(world, histories, prompts, options.n)}


def recommend(world: World, histories: list[list[int]], prompts: TokenRows, n: int) -> list[dict[str, Any]]:
    """One entry per prompt: its history and the best ``n`` items with scores."""
    width = min(max(n, world.recipe.eval.beams), world.catalog.trie.num_leaves)
    candidates = engine_of(world).search(prompts, width)
    titles = world.catalog.titles
    return [
        {
            "history": [titles[item] for item in history],
            "items": [
                {"item": item, "external_id": world.catalog.external_ids[item], "title": titles[item], "score": score}
                for item, score in zip(
                    candidates.items_BW[row].tolist()[:n], candidates.scores_BW[row].tolist()[:n], strict=True
                )
                if item != NO_ITEM
            ],
        }
        for row, history in enumerate(histories)
    ]
