"""How much of a checkpoint's time the steps no longer wait when a thread writes it.

    python -m tests.benchmarks.async_save [--json recipes/results/bench_async_save.json]

What the call that saves takes, synchronous and asynchronous, in turn; fsync included. Beside it, whole loops: STEPS
optimizer steps without a checkpoint, with a synchronous one after the first step, and with an asynchronous one there,
until that one is whole. On a machine whose cores the steps need, those loops show what the thread takes from them.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.checkpoint.async_save import AsyncSaver
from tawin_nemo.models.megatron.checkpoint.checkpoint import save_checkpoint
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows
from tests.benchmarks import harness

GOAL = 0.5  # share of the synchronous save's time that steps no longer wait
UNFAIR = [
    "training and the writing thread share the cores of one machine (see the loops); a GPU run lends it an idle CPU",
    "a local disk; a network file system is slower, which favours the asynchronous side",
]


class Bench:
    """One trainable and a folder that every save writes to."""

    def __init__(self, shape: Backbone, folder: Path, steps: int, tokens: int) -> None:
        self.shape, self.folder, self.steps = shape, folder, steps
        self.trainable = Trainable(build_model(shape, ModelConfig(), seed=1), shape, TrainerConfig(), lr=1e-4)
        self.saver = AsyncSaver()
        rows = torch.randint(0, shape.vocab, (4, tokens // 4 + 1), generator=torch.Generator().manual_seed(1)).numpy()
        first, others = (TokenRows.from_lists(list(part)) for part in (rows[:, :1], rows[:, 1:]))
        self.batch, _ = tree_batch(first, others, np.arange(len(rows)), None)
        self.waits: dict[str, list[float]] = {"sync": [], "async": []}

    def step(self) -> None:
        self.trainable.update([MicroBatch(self.batch, lambda logp_N: (-logp_N.mean(), {}))], lr=1e-4)

    def run(self, kind: str) -> None:
        for step in range(self.steps):
            self.step()
            if step == 0 and kind in self.waits:
                how = save_checkpoint if kind == "sync" else self.saver.save
                self.waits[kind].append(harness.seconds_of(partial(self.save, how)))
        self.saver.wait()

    def save(self, how: object) -> None:
        assert callable(how)
        how(self.folder / "step_1", model=self.trainable.model, trainable=self.trainable, state={})

    @property
    def checkpoint_bytes(self) -> int:
        return sum(file.stat().st_size for file in (self.folder / "step_1").iterdir())


def main() -> None:
    parser = harness.parser(__doc__)
    parser.set_defaults(threads=max(1, torch.get_num_threads() - 1))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256)
    given: argparse.Namespace = parser.parse_args()
    runtime.initialize(ModelConfig(), seed=1)
    torch.set_num_threads(given.threads)
    shape = Backbone(
        "qwen2", given.hidden, given.layers, 6, 2, 4 * given.hidden, 8192, rope_theta=1e4, max_position=2048
    )
    runs = Path("runs")  # ignored by git: a benchmark that is killed leaves nothing to commit
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="async_save_", dir=runs) as name:
        bench = Bench(shape, Path(name), given.steps, given.tokens)
        sides = {kind: partial(bench.run, kind) for kind in ("none", "sync", "async")}
        timed = harness.in_turn(sides, repeats=given.repeats)
        size = bench.checkpoint_bytes
    waits = {kind: harness.Timed(samples[1:]) for kind, samples in bench.waits.items()}  # the first one warms up
    sync, asynchronous = waits["sync"].median, waits["async"].median
    machine = harness.this_machine()
    report = harness.Report(
        "async_save", machine,
        shapes={"layers": shape.layers, "hidden": shape.hidden, "vocab": shape.vocab, "checkpoint_mb": size / 1e6},
        settings={"steps": given.steps, "tokens_per_step": given.tokens, "threads": given.threads},
        unfair=UNFAIR,
    )  # fmt: skip
    report.rows = [{"side": f"wait for a save, {kind}", **result.facts()} for kind, result in waits.items()]
    report.rows += [{"side": f"loop of steps, {kind}", **result.facts()} for kind, result in timed.items()]
    report.targets["share of a save not waited for"] = harness.Target.at_least(GOAL, 1.0 - asynchronous / sync)
    floor = machine.floor_seconds(moved_bytes=2.0 * size)  # one copy in memory
    report.finish(ours=asynchronous, baseline=sync, floor=floor, json_file=given.json)


if __name__ == "__main__":
    main()
