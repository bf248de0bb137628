"""The verb evaluate: Recall@K and NDCG@K of a checkpoint."""

from __future__ import annotations

from typing import Any

from tawin_nemo.run.world import World
from tawin_nemo.train.auc_eval import auc_metrics
from tawin_nemo.train.candidate_eval import candidate_metrics
from tawin_nemo.train.evaluation import evaluate_split
from tawin_nemo.train.grounding_eval import grounding_metrics
from tawin_nemo.train.start import engine_of
from tawin_nemo.util.errors import ConfigError


def evaluate(world: World) -> dict[str, Any]:
    """Recall@K and NDCG@K of ``checkpoint`` on ``eval.splits``, with 95 % intervals."""
    empty = [split for split in world.recipe.eval.splits if len(world.samples[split]) == 0]
    if empty:
        raise ConfigError(
            f"{', '.join(empty)}: no rows to evaluate (an export holds a catalog, no data); set data.root=DIR"
        )
    engine = engine_of(world)
    result: dict[str, Any] = {"checkpoint": world.recipe.checkpoint}
    for split in world.recipe.eval.splits:
        measured = evaluate_split(world, engine, split, label=f"evaluate {split}", popularity=True)
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
        grounded = grounding_metrics(world, engine, split, f"evaluate {split}")
        if grounded is not None:
            result[split]["grounding"] = grounded.means
        ranked = auc_metrics(world, engine, split, f"evaluate {split}")
        if ranked is not None:
            result[split]["auc"] = ranked.means
    return result
