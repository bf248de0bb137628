"""Combinations of keys with import paths that make no sense, each with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tawin_nemo.config.schema import EvalConfig, Recipe, TawinConfig
from tawin_nemo.config.seams import reward_names

#: Columns that every per-user table has besides its metrics; see eval/evaluate.py.
COLUMNS = ("row", "user", "target", "rank", "sharing", "candidates")
#: The metrics of every evaluation.
BUILT_IN = ("recall", "ndcg")


def metric_kinds(cfg: EvalConfig) -> tuple[str, ...]:
    """The metrics of an evaluation without their cut-offs: recall, ndcg, then the names of ``eval.metrics``."""
    return (*BUILT_IN, *map(metric_name, cfg.metrics))


def metric_name(path: str) -> str:
    """The name of the metric at an import path: that of its function.

    >>> metric_name("my.mod:mrr")
    'mrr'
    """
    return path.rpartition(":")[2].rpartition(".")[2]


def seam_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    """(is wrong, message) of every combination that makes no sense; the message names a remedy."""
    rl, kinds = r.rl, metric_kinds(r.eval)
    twice = [kind for n, kind in enumerate(kinds) if kind in (*kinds[:n], *COLUMNS)]
    yield (
        bool(twice),
        f"eval.metrics={list(r.eval.metrics)} names a metric {', '.join(twice)}, which is taken; give the function "
        "another name",
    )
    yield (
        rl.candidate_weights != "tawin" and replace(rl.tawin, enabled=True) != TawinConfig(),
        f"rl.tawin is not used by rl.candidate_weights={rl.candidate_weights}; leave its keys out, or set "
        "rl.candidate_weights=tawin",
    )
    yield (
        rl.advantage != "group" and rl.std != "population",
        f"rl.std={rl.std} is not used by rl.advantage={rl.advantage}; leave it out, or set rl.advantage=group",
    )
    yield (
        {"semantic", "collaborative"} <= {*reward_names(rl.reward)} and bool(rl.reward_source),
        f"rl.reward_source={rl.reward_source} cannot be the source of both semantic and collaborative in "
        f"rl.reward={rl.reward}; use one of them",
    )
