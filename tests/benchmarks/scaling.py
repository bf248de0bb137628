"""How the time of a whole RL step grows with prompts, beams, items and history.

    python -m tests.benchmarks.scaling [--full] [--json FILE.json]    (also draws FILE.png)

Function timed: ``train.rl.rl_step`` (rollout, reference, update) over random four-code semantic IDs, Qwen2.5-0.5B's
width and vocabulary, one layer by default. One quantity moves at a time, the others stay at the base point. The
exponent is the slope of log(seconds) over log(quantity): 0 = does not grow, 1 = in proportion; ``last`` is that of the
two largest points, where fixed costs weigh least. There is no other side here: in the JSON line ``ours`` is the
smallest catalog and ``baseline`` the largest one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, RlConfig, RolloutConfig, TrainerConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.lm import MeteredLM
from tawin_nemo.run.timers import Timers
from tawin_nemo.train.actor import Actor
from tawin_nemo.train.reference import CopiedReference
from tawin_nemo.train.rewards import RuleReward
from tawin_nemo.train.rl import RlComponents, rl_step
from tawin_nemo.train.rollouts import PromptStream, Rollouts
from tawin_nemo.types import DataParallel, PromptBatch, TokenRows
from tests.benchmarks import harness
from tests.benchmarks.select_step import CHILDREN, LEVELS, random_codes
from tests.benchmarks.setting import model_parser, qwen_shape, start

PHASES = ("generate", "reference", "update")


@dataclass(frozen=True)
class Point:
    prompts: int = 8
    beams: int = 16
    items: int = 100_000
    history: int = 128  # tokens of a prompt


AXES = {
    "prompts": (1, 2, 4, 8, 16, 32, 64),
    "beams": (4, 8, 16, 32, 64),
    "items": (1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    "history": (32, 64, 128, 256, 512),
}


class System:
    """One model with its optimizer and reference, used with catalogs and batches of any size."""

    def __init__(self, shape: Backbone, precision: str) -> None:
        cfg = ModelConfig(precision=precision)
        runtime.initialize(cfg, seed=0)
        self.shape = shape
        self.trainable = Trainable(build_model(shape, cfg, seed=0), shape, TrainerConfig(), lr=1e-6)
        self.reference = CopiedReference(build_model(shape, cfg, seed=0))
        self.lm = MeteredLM(MegatronLM(self.trainable.model, shape))
        self.catalogs: dict[int, Catalog] = {}

    def catalog(self, items: int) -> Catalog:
        if items not in self.catalogs:
            codes = max(4, round((items / CHILDREN) ** 0.5))
            flat = random_codes(items, codes, self.shape.vocab).reshape(-1)
            paths = TokenRows(flat, np.arange(items + 1, dtype=np.int64) * LEVELS)
            names = [""] * items
            self.catalogs[items] = Catalog(names, names, "sid", paths, TokenTrie.from_paths(paths))
        return self.catalogs[items]

    def step(self, point: Point) -> tuple[Callable[[], None], Timers]:
        """A function that takes one step of this size, and its clock."""
        catalog, rng = self.catalog(point.items), np.random.default_rng(1)
        rl = RlConfig(beta=1e-3, group_size=point.beams, lr=1e-6)
        engine = RolloutEngine(self.lm, catalog, RolloutConfig(), seed=0)
        actor = Actor(self.trainable, catalog, rl, DataParallel())
        tokens = rng.choice(catalog.paths.flat, (point.prompts, point.history))
        batch = PromptBatch(
            torch.arange(point.prompts), TokenRows.from_lists(list(tokens)), torch.zeros(point.prompts).long()
        )
        timers = Timers(1.0, DataParallel())
        rollouts = Rollouts(rl, engine, catalog, DataParallel(), PromptStream(lambda _: batch), timers)
        components = RlComponents(rl, rollouts, actor, self.reference, RuleReward(), timers)

        def run() -> None:
            rl_step(components, step=engine.weight_version, lr=1e-6)

        return run, timers


def measure(
    system: System, base: Point, axis: str, values: list[int], repeats: int, peak_flops: float
) -> list[dict[str, Any]]:
    """One row per value: seconds of the step, and of each phase (in proportion to its mean over the same runs)."""
    steps = {str(value): system.step(replace(base, **{axis: value})) for value in values}
    for run, timers in steps.values():
        run()
        timers.report()
    timed = harness.in_turn({name: run for name, (run, _) in steps.items()}, repeats=repeats)
    rows = []
    for value in values:
        facts, result = steps[str(value)][1].report(), timed[str(value)]
        whole = sum(seconds for name, seconds in facts.items() if name.startswith("seconds/"))
        parts = {phase: harness.rounded(facts[f"seconds/{phase}"] / whole * result.median) for phase in PHASES}
        floor_ratio = harness.rounded(peak_flops / facts["mfu/step"])  # the clock's peak is 1
        rows.append({"axis": axis, "value": value, **result.facts(), **parts, "floor_ratio": floor_ratio})
    return rows


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Slopes in log-log, over all points and over the last two, for the step and its phases."""
    size = np.log([row["value"] for row in rows])
    slopes = {}
    for name in ("median_seconds", *PHASES):
        seconds = np.log([row[name] for row in rows])
        slopes[name.replace("median_seconds", "step")] = {
            "all": round(float(np.polyfit(size, seconds, 1)[0]), 3),
            "last": round(float(np.diff(seconds[-2:])[0] / np.diff(size[-2:])[0]), 3),
        }
    return slopes


def draw(rows: list[dict[str, Any]], slopes: dict[str, Any], title: str, path: Path) -> None:
    """One panel per quantity; seconds of the step and its phases, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = [axis for axis in AXES if axis in slopes]
    figure, grid = plt.subplots(
        1, len(axes), figsize=(0.6 + 3.1 * len(axes), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    panels = grid[0]
    styles = {"median_seconds": ("step", "black", 2.2), "generate": ("generate", "tab:blue", 1.3),
              "reference": ("reference", "tab:green", 1.3), "update": ("update", "tab:orange", 1.3)}  # fmt: skip
    for panel, axis in zip(panels, axes, strict=True):
        mine = [row for row in rows if row["axis"] == axis]
        values = [row["value"] for row in mine]
        for name, (label, colour, width) in styles.items():
            panel.loglog(values, [row[name] for row in mine], "o-", color=colour, lw=width, ms=3.5, label=label)
        slope = slopes[axis]["step"]
        panel.set_xlabel(f"{axis}{' (prompt tokens)' if axis == 'history' else ''}")
        panel.set_title(f"exponent {slope['all']:.2f}, last two {slope['last']:.2f}", fontsize=9)
        panel.set_xticks(values, [f"{value:,}" if value < 1000 else f"1e{len(str(value)) - 1}" for value in values])
        panel.set_xticks([], minor=True)
        panel.grid(which="major", alpha=0.3)
    panels[0].set_ylabel("seconds")
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    options = model_parser(__doc__)
    options.set_defaults(layers=1)
    options.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    options.add_argument("--largest", type=int, default=10_000_000, help="no value above this; for a quick look")
    options.add_argument("--base", type=int, nargs=4, default=None, metavar=("PROMPTS", "BEAMS", "ITEMS", "HISTORY"))
    given = options.parse_args()
    start(given.threads)
    machine = harness.this_machine()
    shape, base = qwen_shape(given.layers, full=given.full), Point(*(given.base or ()))
    system = System(shape, given.precision)
    report = harness.Report(
        "scaling", machine,
        shapes={"base": vars(base), "layers": shape.layers, "hidden": shape.hidden, "vocab": shape.vocab,
                "axes": {axis: list(AXES[axis]) for axis in given.axes}},
        settings={"dtype": given.precision}, unfair=["one layer of 24 by default: the search's own costs weigh more"],
    )  # fmt: skip
    slopes = {}
    for axis in given.axes:
        values = [value for value in AXES[axis] if value <= given.largest]
        rows = measure(system, base, axis, values, given.repeats, 1e12 * machine.tflops[given.precision])
        slopes[axis] = exponents(rows)
        report.rows += rows
    report.checks["exponents"] = slopes
    if given.json:
        title = f"One RL step: {base.prompts} prompts, {base.beams} beams, {base.items:,} items, {base.history} tokens"
        model = f"{shape.layers} layer(s) of Qwen2.5-0.5B, {machine.threads} CPU threads"
        draw(report.rows, slopes, f"{title}; {model}", Path(given.json).with_suffix(".png"))
    along = [row for row in report.rows if row["axis"] == ("items" if "items" in given.axes else given.axes[0])]
    ours, baseline = along[0]["median_seconds"], along[-1]["median_seconds"]
    report.finish(ours=ours, baseline=baseline, floor=ours / along[0]["floor_ratio"], json_file=given.json)


if __name__ == "__main__":
    main()
