"""The full ranking (``eval.auc``) with what a run knows: TAWin's window and the widths of its searches."""

from __future__ import annotations

import math

from tawin_nemo.config.schema import TawinConfig
from tawin_nemo.eval.full_ranking import rank_everything
from tawin_nemo.eval.measured import Measured
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.world import World
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


def auc_metrics(world: World, engine: Engine, split: str, label: str) -> Measured | None:
    """AUC, partial and windowed AUC on a split (``eval.auc``), logged; None where it is off."""
    cfg, rl = world.recipe.eval, world.recipe.rl
    if not cfg.auc:
        return None
    found = rank_everything(
        engine, world.samples[split], world.catalog, cfg, window=tawin_window(rl.tawin),
        widths=(4, rl.group_size, cfg.beams), dp=world.dp, label=label,
    )  # fmt: skip
    log.info("%s full ranking: %s", label, ", ".join(f"{name} {value:.4f}" for name, value in found.means.items()))
    return found


def tawin_window(tawin: TawinConfig) -> tuple[int, int]:
    """The ranks of negatives, first and end, that the hard window of section ``rl.tawin`` covers.

    >>> tawin_window(TawinConfig(k=4.0, anchor=2.0)), tawin_window(TawinConfig(k=4.0, anchor=2.0, window="start"))
    ((0, 4), (2, 6))
    """
    anchor = float(tawin.target_k - 1) if tawin.target_k else tawin.anchor
    first = anchor - (tawin.k - 1) / 2 if tawin.window == "centred" else anchor
    start = max(0, math.floor(first))
    return start, start + max(1, round(tawin.k))
