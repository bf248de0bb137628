"""The verb generate: recommendations for some histories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tawin_nemo.rollout.assist import histories_for
from tawin_nemo.run.world import World
from tawin_nemo.train.start import engine_of
from tawin_nemo.types import NO_ITEM, TokenRows
from tawin_nemo.util.errors import ConfigError


def generate(world: World) -> dict[str, Any]:
    """Ranked recommendations for ``generate.history``, or for the first rows of ``generate.split``.

    Rows of a split come with the external id of their ``user`` where the data have one.
    """
    options = world.recipe.generate
    users: list[str | None] = []
    if options.history:
        histories = [items_of(options.history, world.catalog.external_ids)[-world.recipe.data.max_history :]]
        prompts = world.prompts_of(histories)
    else:
        if len(world.samples[options.split]) == 0:
            raise ConfigError(
                f"generate.history is empty and split {options.split} has no rows (an export holds no data); "
                "set generate.history=ID,ID or data.root=DIR"
            )
        samples = world.samples[options.split].take(np.arange(min(options.rows, len(world.samples[options.split]))))
        users = world.dataset.user_ids(samples.user_N)
        histories, prompts = [samples.history[i].tolist() for i in range(len(samples))], samples.prompts.in_memory()
    recommendations = recommend(world, histories, prompts, options.n)
    for entry, user in zip(recommendations, users, strict=False):
        entry |= {} if user is None else {"user": user}
    return {"recommendations": recommendations}


def items_of(names: Sequence[str], external_ids: Sequence[str]) -> list[int]:
    """Numbers of the items that ``names`` mean: an external id, or the number of an item (``3``, or ``#3`` where 3 is
    also an external id). Raises ConfigError that lists names which are neither."""
    known = {external: item for item, external in enumerate(external_ids)}
    numbers = {str(item): item for item in range(len(external_ids))}
    items = [known.get(name, numbers.get(name.removeprefix("#"))) for name in names]
    if unknown := [name for name, item in zip(names, items, strict=True) if item is None]:
        raise ConfigError(
            f"generate.history names {', '.join(unknown)}, which are neither external ids (such as {external_ids[0]}) "
            f"nor items 0..{len(external_ids) - 1}"
        )
    return [item for item in items if item is not None]


def recommend(world: World, histories: list[list[int]], prompts: TokenRows, n: int) -> list[dict[str, Any]]:
    """One entry per prompt: its history and the best ``n`` items with scores."""
    width = min(max(n, world.recipe.eval.beams), world.catalog.trie.num_leaves)
    engine = engine_of(world)
    candidates = engine.search(prompts, width, **histories_for(engine, TokenRows.from_lists(histories)))
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
