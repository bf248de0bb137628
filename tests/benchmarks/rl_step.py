"""One whole RL step: rollout of 16 candidates per prompt, reference log-probs, update with AdamW.

    python -m tests.benchmarks.rl_step [--full]

Ours is ``train.rl.rl_step``, the function that training calls, with trie-space policy, KL to a copied reference and
TAWin weights. The baseline does what TRL's trainer does with a constrained transformers model: ``generate`` with 16
beams and ``prefix_allowed_tokens_fn``, log-probs of a second model, GRPO update of repeated prompts over the whole
vocabulary, fused AdamW; prompts per call and rows per micro-batch are the fastest tried. Real titles, Qwen tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import RlConfig, RolloutConfig, TrainerConfig
from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.lm import MeteredLM
from tawin_nemo.run.mfu import forward_flop_count
from tawin_nemo.run.timers import Timers
from tawin_nemo.train.actor import Actor
from tawin_nemo.train.reference import CopiedReference
from tawin_nemo.train.rewards import RuleReward
from tawin_nemo.train.rl import RlComponents, rl_step
from tawin_nemo.train.rollouts import PromptStream, Rollouts
from tawin_nemo.types import DataParallel, PromptBatch, TokenRows
from tests.benchmarks import harness
from tests.benchmarks.baselines import PrefixTable, adamw, backward, generate_beams, reference_logps, repeated_batches
from tests.benchmarks.setting import (
    Titles,
    industrial_titles,
    megatron_model,
    model_parser,
    qwen_shape,
    start,
    transformers_model,
)

GOAL = 10.0
LR, BETA = 1e-6, 1e-3  # a step this small leaves rankings and times alike from run to run
UNFAIR = [
    "the baseline's generation repeats the prompt per beam and walks token by token to the longest living title",
    "trie space and vocabulary space are different objectives; benchmark `update` has ours in both",
    "with 4 of 24 layers the vocabulary-wide head weighs more than in the whole model (--full has all layers)",
]


class Ours:
    """A system of this package, ready to step; ``targets`` lie within what its first search finds."""

    def __init__(self, titles: Titles, shape: Backbone, theirs: Qwen2ForCausalLM, precision: str, group: int) -> None:
        self.rl = RlConfig(beta=BETA, group_size=group, lr=LR)
        trainable = Trainable(megatron_model(shape, theirs, precision), shape, TrainerConfig(), lr=LR)
        self.meter = MeteredLM(MegatronLM(trainable.model, shape))
        engine = RolloutEngine(self.meter, titles.catalog, RolloutConfig(), seed=0)
        actor = Actor(trainable, titles.catalog, self.rl, DataParallel())
        reference = CopiedReference(megatron_model(shape, theirs, precision))
        self.timers = Timers(1.0, DataParallel())
        stream = PromptStream(lambda _: self.prompts)
        rollouts = Rollouts(self.rl, engine, titles.catalog, DataParallel(), stream, self.timers)
        self.components = RlComponents(self.rl, rollouts, actor, reference, RuleReward(), self.timers)
        self.steps = 0

    def set_prompts(self, prompts: TokenRows) -> None:
        found = self.components.rollouts.engine.search(prompts, self.rl.group_size)
        target_B = found.items_BW[:, self.rl.group_size // 3]
        self.prompts = PromptBatch(torch.arange(len(prompts)), prompts, target_B)

    def __call__(self) -> None:
        rl_step(self.components, step=self.steps, lr=LR)
        self.steps += 1

    def flops(self) -> float:
        """Of one step: search, reference, update."""
        engine, actor, shape = (
            self.components.rollouts.engine,
            self.components.actor,
            self.components.actor.trainable.shape,
        )
        self.meter.pop_flops()
        rollout = engine.generate(
            self.prompts, self.rl.group_size, negatives="beam", policy_space="trie", step=self.steps
        )
        searched = self.meter.pop_flops()
        ones_BG = torch.ones_like(rollout.scores_BG)
        scored = forward_flop_count([part.batch for part in actor.pack(rollout, ones_BG, ones_BG)], shape.vocab)
        return (searched + scored + scored + scored + scored).forward_flops(shape)  # update = three forward passes


@dataclass
class Baseline:
    """transformers and the update of TRL."""

    titles: Titles
    model: Qwen2ForCausalLM
    group: int
    prompts: TokenRows
    target_B: np.ndarray
    per_call: int = 1
    rows: int = 4

    def __post_init__(self) -> None:
        self.reference = copy.deepcopy(self.model).eval()
        self.optimizer = adamw(self.model, LR)
        self.table = PrefixTable(self.titles.catalog.paths, self.titles.eos)
        self.timers = Timers(1.0, DataParallel())
        self.target_paths = [tuple(path.tolist()) for path in map(self.titles.catalog.paths.__getitem__, self.target_B)]

    def generate(self) -> list[list[tuple[tuple[int, ...], float]]]:
        return generate_beams(
            self.model, self.prompts, self.table, self.group,
            longest=self.titles.longest, eos=self.titles.eos, per_call=self.per_call,
        )  # fmt: skip

    def learn(self, found: list[list[tuple[tuple[int, ...], float]]]) -> None:
        with self.timers("reward"):
            reward_BG = torch.tensor(
                [[float(path == target) for path, _ in group]
                 for group, target in zip(found, self.target_paths, strict=True)]
            )  # fmt: skip
            advantage_A = group_advantages(reward_BG).flatten()
            answers = TokenRows.from_lists([list(path) for group in found for path, _ in group])
            prompt_A = np.repeat(np.arange(len(found)), self.group)
            batches = repeated_batches(self.prompts, answers, prompt_A, self.rows)
        with self.timers("reference"):
            reference = reference_logps(self.reference, batches)
        with self.timers("update"):
            backward(self.model, batches, advantage_A, reference, beta=BETA)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

    def __call__(self) -> None:
        with self.timers("generate"):
            found = self.generate()
        self.learn(found)

    def tune(self, sizes: tuple[int, ...]) -> dict[str, Any]:
        """Choose prompts per call and rows per micro-batch; returns what was measured."""

        def generating(per_call: int) -> Callable[[], Any]:
            def run() -> None:
                self.per_call = per_call
                self.generate()

            return run

        best, calls = harness.best_of({str(n): generating(n) for n in (1, 2, 4) if n <= len(self.prompts)})
        self.per_call = int(best)
        found = self.generate()

        def learning(rows: int) -> Callable[[], Any]:
            def run() -> None:
                self.rows = rows
                self.learn(found)

            return run

        best, rows = harness.best_of({str(n): learning(n) for n in sizes})
        self.rows = int(best)
        return {"prompts_per_call": {"best": self.per_call, "seconds": calls},
                "rows_per_micro_batch": {"best": self.rows, "seconds": rows}}  # fmt: skip


def phases(timers: Timers, step_seconds: float) -> dict[str, float]:
    """Seconds of every phase in a step of ``step_seconds``, by its share since the last report."""
    facts = timers.report()
    seconds = {name.removeprefix("seconds/"): value for name, value in facts.items() if name.startswith("seconds/")}
    share = step_seconds / sum(seconds.values())
    return {name: harness.rounded(value * share) for name, value in seconds.items()}


def main() -> None:
    options = model_parser(__doc__)
    options.add_argument("--prompts", type=int, default=2)
    options.add_argument("--tokens", type=int, default=128, help="of a prompt")
    options.add_argument("--group", type=int, default=16, help="candidates of a prompt = beams")
    options.add_argument("--sizes", type=int, nargs="+", default=(4, 16), help="micro-batches that the baseline tries")
    given = options.parse_args()
    start(given.threads)
    machine, titles = harness.this_machine(), industrial_titles()
    shape = qwen_shape(given.layers, full=given.full)
    model = transformers_model(shape, given.precision)
    prompts = titles.prompts(given.prompts, given.tokens)
    ours = Ours(titles, shape, model, given.precision, given.group)
    ours.set_prompts(prompts)
    baseline = Baseline(titles, model, given.group, prompts, ours.prompts.target_B.numpy())
    tuned = baseline.tune(tuple(given.sizes))
    floor = machine.floor_seconds(flops=ours.flops(), dtype=given.precision)

    ours.timers.report(), baseline.timers.report()
    timed = harness.in_turn({"ours": ours, "TRL-style": baseline}, repeats=given.repeats, warm=["TRL-style"])
    report = harness.Report(
        "rl_step", machine,
        shapes={"prompts": given.prompts, "prompt_tokens": given.tokens, "group": given.group, "layers": shape.layers,
                "hidden": shape.hidden, "vocab": shape.vocab, "items": len(titles.catalog)},
        settings={"dtype": given.precision, "beta": BETA, "baseline": tuned}, unfair=UNFAIR,
    )  # fmt: skip
    base = timed["TRL-style"].median
    for name, side in (("ours", ours), ("TRL-style", baseline)):
        result = timed[name]
        extra = {"floor_ratio": harness.rounded(result.median / floor)} if name == "ours" else {}
        report.rows.append({"side": name, **result.facts(), "ratio": harness.rounded(base / result.median),
                            **phases(side.timers, result.median), **extra})  # fmt: skip
    report.targets["step"] = harness.Target.at_least(GOAL, base / timed["ours"].median)
    report.finish(ours=timed["ours"].median, baseline=base, floor=floor, json_file=given.json)


if __name__ == "__main__":
    main()
