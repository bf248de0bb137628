"""Code of one's own, as users write it, for the tests of import paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from tawin_nemo.data.prompts import Template
from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.maths.grpo import grpo_loss
from tawin_nemo.maths.tawin import tawin_weights


# -- the built-in ones again -----------------------------------------------------------------------------------------
def rule(rollout):
    return rollout.is_target_BG  # bool, with whatever at padding


def group(rewards_BG, rollout):
    return group_advantages(rewards_BG, valid_BG=rollout.valid_BG)


def window(rollout):
    return tawin_weights(rollout.scores_BG, rollout.is_target_BG, k=4.0, tau=0.1, anchor=2.0, valid_BG=rollout.valid_BG)


def clipped(logp_N, terms, counts, objective):
    return grpo_loss(logp_N, terms, counts, objective)


# -- others ------------------------------------------------------------------------------------------------------------
class LongTitles:
    """1 for the target, and the share of the longest title's length for the others."""

    def __init__(self, world):
        lengths = torch.tensor([float(len(title)) for title in world.catalog.titles])
        self.share_I = lengths / lengths.max()

    def __call__(self, rollout):
        return torch.where(rollout.is_target_BG, 1.0, self.share_I[rollout.items_BG.clamp(min=0)])


def mrr(rank_B, k):
    return torch.where((rank_B >= 0) & (rank_B < k), 1.0 / (rank_B + 1.0), 0.0)


class Diary:
    """Writes down what it is told."""

    def __init__(self, world):
        self.file = world.run_dir / "diary.jsonl"

    def _write(self, *words: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(words) + "\n")

    def on_stage_start(self, stage, step):
        self._write("start", stage.name, step)

    def on_log(self, stage, step, metrics):
        self._write("log", stage.name, step, sorted(metrics)[0])

    def on_save(self, stage, step):
        assert (stage.checkpoints / f"step_{step}").is_dir()
        self._write("save", stage.name, step)

    def on_stage_end(self, stage, step):
        self._write("end", stage.name, step)


class Board:
    def __init__(self, world):
        self.file = world.run_dir / "board.jsonl"

    def __call__(self, stage, step, metrics):
        with self.file.open("a") as file:
            file.write(json.dumps([stage, step, metrics]) + "\n")


class Neighbours:
    """The items behind the target, as rejected ones."""

    def __init__(self, world):
        self.target_N, self.leaf_I = world.samples["train"].target_N, world.catalog.leaf_I

    def __call__(self, row_R, step, num):
        found = np.full((len(row_R), num), -1)
        for place, target in enumerate(self.target_N[row_R]):
            others = [(target + n + step) % len(self.leaf_I) for n in range(1, num + 3)]
            others = [item for item in others if self.leaf_I[item] != self.leaf_I[target]][:num]
            found[place, : len(others)] = others
        return found


class Spoken(Template):
    """Words around the history."""

    @property
    def head(self):
        return "Seen: "

    @property
    def separator(self):
        return "; "

    @property
    def tail(self):
        return " Next: "


def read_notes(root: Path, prepare: Any):
    """One line per purchase: user, item, day."""
    lines = [line.split() for line in (root / "notes.txt").read_text().splitlines()]
    log = pl.DataFrame(lines, schema=["user", "item", "day"], orient="row").with_columns(
        (1_500_000_000 + 86_400 * pl.col("day").cast(pl.Int64)).alias("time")
    )
    items = log.select(pl.col("item").alias("external_id"), (pl.lit("Title of ") + pl.col("item")).alias("title"))
    return log, items.unique(maintain_order=True)


# -- wrong ones --------------------------------------------------------------------------------------------------------
def one_each(rollout):
    return torch.ones(len(rollout.items_BG))


def not_numbers(rollout):
    return rollout.scores_BG / 0.0


def words(rollout):
    return "good"


def failing(rollout):
    return {}["price"]


def loss_alone(logp_N, terms, counts, objective):
    return -logp_N.sum()


def loss_without_gradient(logp_N, terms, counts, objective):
    return logp_N.detach().sum(), {}


def targets(row_R, step, num):
    return np.zeros((len(row_R), num + 1), dtype=np.int64)


def half(rank_B, k):
    return rank_B[:1]


def several(rollout, weight):
    return rollout.is_target_BG


def no_frames(root, prepare):
    return [1, 2]
