"""Cost of one preference update against the number of rejected items, with and without sharing them (NAPO).

    python -m tests.benchmarks.preference [--full] [--plot recipes/results/bench_preference.png]

Ours is ``pack_rows`` and forward and backward of ``preference_loss``: each prompt of 200 tokens once, its target and
its rejected items as a tree. With sharing, each of the 16 rows of a group is compared with the rejected items of the 10
most similar rows as well (rho 0.7); states of users are given, since those of an auxiliary recommender cost nothing
beside a language model. The baseline is what TRL does: every answer behind its own copy of the prompt, log-probs over
the whole vocabulary, whole rows in micro-batches of the fastest size. Objective of both: NAPO without margin and length
norm (S-DPO without a reference). Losses and gradients in vocabulary space must agree. Peak memory is that of a process
of its own, above weights and gradients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import PreferenceConfig, TrainerConfig
from tawin_nemo.data.samples import Samples
from tawin_nemo.maths.negative_sharing import num_similar, similar_rows
from tawin_nemo.maths.preference_loss import napo_loss
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.run.mfu import training_flops
from tawin_nemo.train.preference_batch import PreferenceRows, StepTerms, pack_rows, preference_loss
from tawin_nemo.types import TokenRows
from tests.benchmarks import harness
from tests.benchmarks.baselines import allocate_gradients, completion_logps, repeated_batches
from tests.benchmarks.setting import (
    Titles,
    industrial_titles,
    megatron_model,
    model_parser,
    qwen_shape,
    start,
    transformers_model,
)
from tests.benchmarks.update import GradientsOnly, gradient_check

RHO = 0.7
COMPARED = 3  # rejected items at which both sides run
SIZES = (1, 2, 4)
GOALS = {"tree-packed": 5.0, "sharing": 1.10}
UNFAIR = [
    "rejected items are drawn uniformly from the catalog, so their paths share few tokens",
    "trie space is another distribution than the baseline's; vocabulary space is the same one (checked)",
    "with 4 of 24 layers the vocabulary-wide head weighs more than in the whole model (--full has all layers)",
    "neither side has a reference; with one, both pay one more forward pass",
]


@dataclass(frozen=True)
class Scene:
    """R rows with prompts of one length, their targets and N rejected items, all on different paths."""

    titles: Titles
    samples: Samples
    items_RA: np.ndarray  # target first

    @classmethod
    def of(cls, titles: Titles, rows: int, tokens: int, negatives: int) -> Scene:
        items_RA = titles.random_groups(rows, 1 + negatives)
        none = TokenRows.from_lists([[]] * rows)
        return cls(titles, Samples(titles.prompts(rows, tokens), items_RA[:, 0], np.arange(rows), none), items_RA)

    def rows(self, *, share: bool) -> PreferenceRows:
        """One sharing group; a row's similar rows are those of random states."""
        count = len(self.items_RA)
        source_RK = np.arange(count)[:, None]
        if share:
            state_RD = torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
            source_RK = similar_rows(state_RD, num_similar(count, RHO)).numpy()
        rejected_RN = self.items_RA[:, 1:]
        return PreferenceRows(
            np.arange(count), np.zeros(count, np.int64), rejected_RN, source_RK, np.zeros(rejected_RN.shape, np.float32)
        )


class Ours:
    """Packing, forward and backward of one step; ``loss`` and ``effective`` negatives a row of the last one."""

    def __init__(self, trainable: Trainable, scene: Scene, *, space: str, share: bool) -> None:
        self.trainable, self.scene = trainable, scene
        self.cfg = PreferenceConfig(
            enabled=True, algorithm="napo", margin="fixed", beta=1.0, length_norm="off", policy_space=space,
            rho=RHO if share else 0.0, num_negatives=scene.items_RA.shape[1] - 1,
        )  # fmt: skip
        self.rows = scene.rows(share=share)
        self.flops = training_flops([part.batch for part in self._packed()], trainable.shape)
        self.loss = self.effective = 0.0

    def _packed(self) -> list[Any]:
        return pack_rows(self.rows, self.scene.samples, self.scene.titles.catalog, self.cfg)

    def __call__(self) -> None:
        terms, count = StepTerms(rows=len(self.rows.row_R), gamma=0.0), len(self.rows.row_R)
        work = [
            MicroBatch(part.batch, partial(preference_loss, part=part, cfg=self.cfg, terms=terms, ref_logp_N=None))
            for part in self._packed()
        ]
        stats = self.trainable.accumulate(work)
        self.loss, self.effective = stats["loss"], stats["negatives_sum"] / count


def baseline(model: Qwen2ForCausalLM, scene: Scene, rows_per_batch: int) -> float:
    """Gradients into ``.grad`` (set to zero first); returns the mean loss over the rows."""
    model.zero_grad(set_to_none=False)
    count, each = scene.items_RA.shape
    total = 0.0
    for first in range(0, count, rows_per_batch):
        places = np.arange(first, min(first + rows_per_batch, count))
        answers = scene.titles.catalog.paths.take(scene.items_RA[places].reshape(-1))
        (batch,) = repeated_batches(
            scene.samples.prompts.take(places), answers, np.repeat(np.arange(len(places)), each), len(places) * each
        )
        logp_A: Tensor = (completion_logps(model, batch) * batch.completion_RK).sum(dim=1)
        logp_RA = torch.empty_like(logp_A).index_copy(0, batch.row_R, logp_A).view(-1, each)
        loss = napo_loss(logp_RA[:, 0], logp_RA[:, 1:], torch.ones_like(logp_RA[:, 1:], dtype=torch.bool), 0.0).sum()
        loss = loss / count
        loss.backward()
        total += float(loss.detach())
    return total


def measure_memory(side: str, shape: Backbone, given: argparse.Namespace) -> None:
    """In a process of its own: print the peak of one side, ``SPACE/SHARE/NEGATIVES`` or ``repeated/ROWS/NEGATIVES``."""
    kind, option, negatives = side.split("/")
    titles = industrial_titles()
    model = transformers_model(shape, given.precision)
    scene, small = Scene.of(titles, given.rows, given.tokens, int(negatives)), Scene.of(titles, 1, 8, 1)
    run: Callable[[], Any]
    if kind == "repeated":
        allocate_gradients(model)
        baseline(model, small, 1)
        run = partial(baseline, model, scene, int(option))
    else:
        ours = megatron_model(shape, model, given.precision)
        del model
        trainable = GradientsOnly(ours, shape, TrainerConfig(), lr=1e-5)
        trainable.ddp.zero_grad_buffer()  # touched, so that it is resident before
        Ours(trainable, small, space=kind, share=False)()
        run = Ours(trainable, scene, space=kind, share=option == "shared")
    print(json.dumps({"peak_mib": round(harness.peak_above(run), 1)}))


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Seconds and peak memory against the rejected items of a row."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, label in (
        (time_axes, "median_seconds", "seconds per update"), (memory_axes, "peak MiB", "peak memory in MiB"),
    ):  # fmt: skip
        for side in dict.fromkeys(row["side"] for row in rows):
            mine = [row for row in rows if row["side"] == side and row.get(key) is not None]
            style = {"marker": "o"} if len(mine) > 1 else {"marker": "x", "linestyle": "none"}
            axes.plot([row["negatives"] for row in mine], [row[key] for row in mine], label=side, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("rejected items of a row")
        axes.set_ylabel(label)
    time_axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    options = model_parser(__doc__)
    options.add_argument("--rows", type=int, default=16, help="rows of the step: one sharing group")
    options.add_argument("--tokens", type=int, default=200, help="of a prompt")
    options.add_argument("--negatives", type=int, nargs="+", default=(1, 3, 7, 15, 31), help="rejected items of a row")
    options.add_argument("--plot", default="", help="picture to write")
    options.add_argument("--memory-of", default="", help="only print the peak memory of one side")
    return options.parse_args()


def main() -> None:
    given = arguments()
    start(given.threads)
    shape = qwen_shape(given.layers, full=given.full)
    if given.memory_of:
        measure_memory(given.memory_of, shape, given)
        return
    machine, titles = harness.this_machine(), industrial_titles()
    model = transformers_model(shape, given.precision)
    trainable = GradientsOnly(megatron_model(shape, model, given.precision), shape, TrainerConfig(), lr=1e-5)
    allocate_gradients(model)
    scenes = {count: Scene.of(titles, given.rows, given.tokens, count) for count in {*given.negatives, COMPARED}}
    compared = scenes[COMPARED]
    best, searched = harness.best_of({str(n): partial(baseline, model, compared, n) for n in SIZES})

    vocab = Ours(trainable, compared, space="vocab", share=False)
    vocab()
    losses = {"ours": vocab.loss, "baseline": baseline(model, compared, int(best))}
    checks = {"loss": losses, "relative gradient difference": gradient_check(trainable, model)}
    passed_on = [f"--{name}={getattr(given, name)}" for name in ("threads", "layers", "rows", "tokens", "precision")]

    def peak(side: str) -> float:
        return float(harness.in_child("tests.benchmarks.preference", [*passed_on, "--memory-of", side])["peak_mib"])

    rows: list[dict[str, Any]] = []
    medians: dict[tuple[str, int], float] = {}
    for count in sorted(scenes):
        own = Ours(trainable, scenes[count], space="trie", share=False)
        shared = Ours(trainable, scenes[count], space="trie", share=True)
        sides: dict[str, Callable[[], Any]] = {"ours, trie": own, "ours, trie, shared": shared}
        names = {"ours, trie": f"trie/own/{count}", "ours, trie, shared": f"trie/shared/{count}"}
        if count == COMPARED:
            sides |= {"ours, vocab": vocab, "repeated prompts": partial(baseline, model, compared, int(best))}
            names |= {"ours, vocab": f"vocab/own/{count}", "repeated prompts": f"repeated/{best}/{count}"}
        timed = harness.in_turn(sides, repeats=given.repeats)
        for name, result in timed.items():
            medians[name, count] = result.median
            side = sides[name]
            mine = {"effective negatives": round(side.effective, 1)} if isinstance(side, Ours) else {}
            rows.append({"side": name, "negatives": count, **result.facts(), **mine, "peak MiB": peak(names[name])})

    ours, theirs = medians["ours, trie", COMPARED], medians["repeated prompts", COMPARED]
    floor_of = Ours(trainable, compared, space="trie", share=False).flops
    report = harness.Report(
        "preference", machine,
        shapes={"rows": given.rows, "prompt_tokens": given.tokens, "negatives": sorted(scenes), "layers": shape.layers,
                "hidden": shape.hidden, "vocab": shape.vocab},
        settings={"dtype": given.precision, "rho": RHO, "baseline_rows_per_micro_batch": searched},
        rows=rows, unfair=UNFAIR, checks=checks,
    )  # fmt: skip
    report.targets["tree-packed"] = harness.Target.at_least(GOALS["tree-packed"], theirs / ours)
    sharing = medians["ours, trie, shared", COMPARED] / ours
    report.targets["sharing"] = harness.Target.at_most(GOALS["sharing"], sharing)
    if given.plot:
        plot(rows, given.plot)
    floor = machine.floor_seconds(flops=floor_of, dtype=given.precision)
    report.finish(ours=ours, baseline=theirs, floor=floor, json_file=given.json)


if __name__ == "__main__":
    main()
