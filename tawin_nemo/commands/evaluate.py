"""The verb evaluate: Recall@K and NDCG@K of a checkpoint."""

from __future__ import annotations

from typing import Any

from tawin_nemo.commands.from_checkpoint import engine_of
from tawin_nemo.eval.bias import item_counts
from tawin_nemo.eval.evaluate import evaluate as run_evaluation
from tawin_nemo.run.world import World
from tawin_nemo.train.candidate_eval import candidate_metrics


def evaluate(world: World) -> dict[str, Any]:
    """Recall@K and NDCG@K of ``checkpoint`` on ``eval.splits``, with 95 % intervals."""
    engine = engine_of(world)
    result: dict[str, Any] = {"checkpoint": world.recipe.checkpoint}
    for split in world.recipe.eval.splits:
        measured = run_evaluation(
            engine, world.samples[split], world.catalog, world.recipe.eval,
            dp=world.dp, label=f"evaluate {split}",
            popularity_I=item_counts(world.samples["train"], len(world.catalog)),
        )  # fmt: skip
        result[split] = {
            **measured.means,
            "intervals": {name: list(pair) for name, pair in measured.intervals.items()},
            "rows": measured.rows,
            "invalid_rate": measured.invalid_rate,
            "beyond": measured.beyond,
        }
        among = candidate_metrics(world, engine, split, f"evaluate {split}")
        if among is not None:
            result[split]["candidates"] = among.means
    return result
