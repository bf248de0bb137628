"""Seconds per epoch of SASRec on whole sequences against one row per window.

python -m tests.benchmarks.sequence_training [--json FILE]

Generated interactions, 20,000 users of 9, 12,101 items: 160,000 targets per epoch on both sides. Each side runs the
product's own training step, forward, backward and Adam; the sides alternate. A sample is the first ``1 / --part`` of
the steps of an epoch, whose batches are random, and is scaled to the epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tawin_nemo.baselines import train
from tawin_nemo.baselines.build import Blueprint, build_recommender
from tawin_nemo.baselines.load import ModelAndOptimizer
from tawin_nemo.baselines.protocol import left_padded
from tawin_nemo.baselines.sequences import user_sequences
from tawin_nemo.config.schema import BaselineConfig, DataConfig, ModelConfig, Recipe
from tawin_nemo.data.batches import BatchStream
from tawin_nemo.data.samples import Samples
from tawin_nemo.data_prep.pipeline import sliding_windows
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import NO_ITEM
from tests.benchmarks.harness import Report, Target, Timed, in_turn, parser, rounded, this_machine

USERS, PER_USER, ITEMS, MAX_HISTORY = 20_000, 9, 12_101, 10
LOSSES = {"softmax": {}, "sampled_softmax": {"negatives": 256}, "bce": {"negatives": 1}}
GOAL = 10.0


def interactions(users: int, per_user: int, items: int) -> Samples:
    """Windows of ``users``; an item's frequency falls with the square root of its rank."""
    draw = np.random.default_rng(1)
    weight_I = 1.0 / np.sqrt(np.arange(1, items + 1))
    item_N = draw.choice(items, size=users * per_user, p=weight_I / weight_I.sum())
    user_N = np.repeat(np.arange(users), per_user)
    rows = sliding_windows(user_N, item_N, draw.permutation(len(item_N)), MAX_HISTORY)
    return Samples(rows.history, rows.target_N, rows.user_N, rows.history)


@dataclass
class Side:
    """One form of training, ready to run epochs."""

    world: Any
    rows: Any
    batch_size: int
    trainable: ModelAndOptimizer
    sampler: Any
    epochs: int = 0

    @classmethod
    def of(cls, samples: Samples, items: int, *, training: str, loss: str, batch_size: int) -> Side:
        """SASRec with the settings of recipes/baselines/sasrec.yaml."""
        options: Any = {"training": training, "loss": loss, "batch_size": batch_size, **LOSSES[loss]}
        recipe = Recipe(baseline=BaselineConfig(model="sasrec", **options), data=DataConfig(max_history=MAX_HISTORY))
        world: Any = SimpleNamespace(recipe=recipe, samples={"train": samples}, catalog=range(items))
        torch.manual_seed(0)
        model = build_recommender(Blueprint(recipe.baseline, items, MAX_HISTORY))
        trainable = ModelAndOptimizer(model, train.adam(recipe.baseline, model))
        return cls(world, train.training_rows(world), batch_size, trainable, train.negative_sampler(world))

    @property
    def steps(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def begin_epoch(self, steps: int) -> None:
        """The first ``steps`` steps of the next epoch."""
        stream = BatchStream(len(self.rows), self.batch_size, seed=self.epochs)
        for step in range(steps):
            rows = self.rows.take(stream.batch(step))
            train.train_step(self.world, self.trainable, rows, lr=1e-3, sampler=self.sampler)
        self.epochs += 1


def disagreement(samples: Samples, items: int) -> float:
    """Relative difference of the summed losses of both forms: one model, full softmax, no dropout, 200 users."""
    rows = samples.take(np.flatnonzero(samples.user_N < 200))
    model: Any = Side.of(rows, items, training="sequences", loss="softmax", batch_size=1).trainable.model.eval()
    sequences = user_sequences(rows, MAX_HISTORY)
    parts = [part.padded(NO_ITEM)[0] for part in (sequences.inputs, sequences.targets)]
    with torch.no_grad():
        ours = model.sequence_loss(*parts).double().sum()
        theirs = model.loss(left_padded(rows.history), torch.from_numpy(rows.target_N)).double().sum()
    return float((ours - theirs).abs() / theirs)


def seconds_per_epoch(sides: dict[str, Side], part: int, repeats: int) -> dict[str, Timed]:
    """Samples of every side, in turn, after a few steps that do not count."""
    steps = {name: -(-side.steps // part) for name, side in sides.items()}
    for side in sides.values():
        side.begin_epoch(5)
    runs: dict[str, Callable[[], None]] = {
        name: partial(side.begin_epoch, steps[name]) for name, side in sides.items()
    }  # fmt: skip
    timed = in_turn(runs, repeats=repeats, warm=[*runs])
    return {
        name: Timed([seconds * sides[name].steps / steps[name] for seconds in samples.samples])
        for name, samples in timed.items()
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--users", type=int, default=USERS)
    options.add_argument("--part", type=int, default=4, help="a sample is this part of an epoch")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    runtime.initialize(ModelConfig(), seed=0)
    samples = interactions(given.users, PER_USER, ITEMS)
    shapes = {"users": given.users, "interactions of each": PER_USER, "items": ITEMS, "targets": len(samples)}
    settings = {"model": "sasrec, 2 layers, width 64", "rows per step": {"windows": 256, "sequences": 256},
                "negatives": {name: keys.get("negatives", ITEMS) for name, keys in LOSSES.items()}}  # fmt: skip
    report = Report("sequence_training", this_machine(), shapes, settings)
    report.checks["relative difference of the summed losses"] = rounded(disagreement(samples, ITEMS))
    medians: dict[tuple[str, str], float] = {}
    for loss in LOSSES:
        sides = {
            "windows": Side.of(samples, ITEMS, training="windows", loss=loss, batch_size=256),
            "sequences": Side.of(samples, ITEMS, training="sequences", loss=loss, batch_size=256),
            "sequences, 32 a step": Side.of(samples, ITEMS, training="sequences", loss=loss, batch_size=32),
        }
        for name, timed in seconds_per_epoch(sides, given.part, given.repeats).items():
            medians[loss, name] = timed.median
            report.rows.append({"loss": loss, "side": name, "steps": sides[name].steps, **timed.facts(),
                                "times": rounded(medians[loss, "windows"] / timed.median)})  # fmt: skip
        ratio = medians[loss, "windows"] / medians[loss, "sequences"]
        report.targets[f"times the windows, {loss}"] = Target.at_least(GOAL, ratio)
    report.unfair += [
        "with softmax both sides compute the same product of 160,000 states with the whole catalog, and its gradients",
        "256 rows per step on both sides: a step of sequences has 8 times the targets, so an epoch has an eighth of "
        "the steps. The rows with 32 sequences a step have as many steps and targets per step as the windows.",
        "the time of an epoch is compared, not the number of epochs that a model needs",
    ]
    flops = 3 * 2.0 * len(samples) * ITEMS * 64
    report.finish(
        ours=medians["softmax", "sequences"], baseline=medians["softmax", "windows"],
        floor=report.machine.floor_seconds(flops=flops), json_file=given.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
