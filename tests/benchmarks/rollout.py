"""End-to-end constrained beam search: the best 16 titles for prompts of 128 and of 256 tokens.

    python -m tests.benchmarks.rollout [--full]

Ours is ``RolloutEngine.search`` over ``MegatronLM``, as RL rollouts and evaluation call it. The baseline is
transformers' ``generate(num_beams=16, prefix_allowed_tokens_fn=..., renormalize_logits=True)`` with
``max_new_tokens`` = tokens of the longest title, and a dictionary of all prefixes as the constraint. Same weights, same
prompts, same catalog (all 3,686 Industrial titles, Qwen tokens); both must return the same items and scores. Prompts:
test histories, cut or continued at the front to the exact length (``setting.Titles.prompts``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import RolloutConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.lm import MeteredLM
from tawin_nemo.types import Candidates, TokenRows
from tests.benchmarks import harness
from tests.benchmarks.baselines import PrefixTable, generate_beams
from tests.benchmarks.setting import (
    Titles,
    industrial_titles,
    megatron_model,
    model_parser,
    qwen_shape,
    start,
    transformers_model,
)

GOAL = 12.0
SCORE_TOLERANCE = 2e-4  # sums of some ten float32 log-probs, computed in another order
UNFAIR = [
    "transformers runs every prompt once per beam; `without repeated prefill` subtracts what that costs "
    "(a forward pass over prompts x beams rows minus one over prompts rows)",
    "transformers decodes token by token up to the longest living title, ours stops where nothing is left to decide: "
    "this is the method, but a baseline with jump-forward decoding would be faster than this one",
    "with 4 of 24 layers the vocabulary-wide head, which ours never multiplies, weighs more than in the whole model "
    "(--full has all layers)",
]


@dataclass(frozen=True)
class Sides:
    """Both systems over one set of weights."""

    titles: Titles
    shape: Backbone
    theirs: Qwen2ForCausalLM
    engine: RolloutEngine
    meter: MeteredLM
    table: PrefixTable
    width: int

    def ours(self, prompts: TokenRows) -> Candidates:
        return self.engine.search(prompts, self.width)

    def baseline(self, prompts: TokenRows, per_call: int) -> list[list[tuple[tuple[int, ...], float]]]:
        return generate_beams(
            self.theirs, prompts, self.table, self.width,
            longest=self.titles.longest, eos=self.titles.eos, per_call=per_call,
        )  # fmt: skip

    @torch.no_grad()
    def prefill(self, prompts: TokenRows, copies: int) -> None:
        """transformers' forward pass over the prompts, each ``copies`` times, one prompt after the other."""
        for row in range(len(prompts)):
            ids_BT = torch.from_numpy(prompts[row]).expand(copies, -1)
            self.theirs(ids_BT, use_cache=True, logits_to_keep=1)


def make_sides(shape: Backbone, precision: str, width: int) -> Sides:
    titles = industrial_titles()
    theirs = transformers_model(shape, precision)
    meter = MeteredLM(MegatronLM(megatron_model(shape, theirs, precision), shape))
    engine = RolloutEngine(meter, titles.catalog, RolloutConfig(), seed=0)
    table = PrefixTable(titles.catalog.paths, titles.eos)
    return Sides(titles, shape, theirs, engine, meter, table, width)


def agreement(found: Candidates, expected: list[list[tuple[tuple[int, ...], float]]]) -> dict[str, Any]:
    """Share of ranks with the same path, and the largest difference of scores rank by rank."""
    same, total, apart = 0, 0, 0.0
    for row, ranking in enumerate(expected):
        for rank, (path, score) in enumerate(ranking):
            length = int(found.lengths_BW[row, rank])
            same += tuple(found.tokens_BWT[row, rank, :length].tolist()) == path
            apart = max(apart, abs(float(found.scores_BW[row, rank]) - score))
            total += 1
    return {"ranks": total, "same path": round(same / total, 6), "largest score difference": harness.rounded(apart)}


def run_length(
    sides: Sides, prompts: TokenRows, machine: harness.Machine, precision: str, repeats: int
) -> dict[str, Any]:
    """Everything that is measured for one prompt length; seconds are per prompt."""
    count = len(prompts)
    sizes = [size for size in (1, 2, 4, 8) if size <= count]
    best, searched = harness.best_of({str(n): partial(sides.baseline, prompts, n) for n in sizes})
    sides.meter.pop_flops()
    ours = sides.ours(prompts)
    work = sides.meter.pop_flops()
    theirs = []
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: sides.ours(prompts),
        "transformers": lambda: theirs.append(sides.baseline(prompts, int(best))),
        "prefill x beams": lambda: sides.prefill(prompts, sides.width),
        "prefill x 1": lambda: sides.prefill(prompts, 1),
    }
    timed = harness.in_turn(runs, repeats=repeats, warm=["transformers"])
    checks = agreement(ours, theirs[-1])
    each = {name: result.median / count for name, result in timed.items()}
    each["without repeated prefill"] = each["transformers"] - (each["prefill x beams"] - each["prefill x 1"])
    floor = machine.floor_seconds(flops=work.forward_flops(sides.shape), dtype=precision) / count
    length = int(prompts.lengths[0])
    rows = [
        {"prompt tokens": length, "side": name, "seconds per prompt": harness.rounded(seconds),
         "quartiles": [harness.rounded(q / count) for q in timed[name].quartiles] if name in timed else None,
         "ratio to ours": harness.rounded(seconds / each["ours"]),
         "rows run": round(work.tokens / count, 1) if name == "ours" else None,
         "floor_ratio": harness.rounded(each["ours"] / floor) if name == "ours" else None}
        for name, seconds in each.items()
    ]  # fmt: skip
    return {"rows": rows, "checks": checks, "each": each, "floor": floor, "searched": searched}


def main() -> None:
    options = model_parser(__doc__)
    options.add_argument("--prompts", type=int, default=2, help="prompts of both sides, per length")
    options.add_argument("--many", type=int, default=32, help="prompts of one more run of ours, nearer to an RL step")
    options.add_argument("--lengths", type=int, nargs="+", default=[128, 256])
    options.add_argument("--beams", type=int, default=16)
    given = options.parse_args()
    start(given.threads)
    machine = harness.this_machine()
    sides = make_sides(qwen_shape(given.layers, full=given.full), given.precision, given.beams)
    report = harness.Report(
        "rollout", machine,
        shapes={"prompts": given.prompts, "prompt_tokens": given.lengths, "beams": given.beams,
                "layers": sides.shape.layers, "hidden": sides.shape.hidden, "vocab": sides.shape.vocab,
                "items": len(sides.titles.catalog), "longest_title": sides.titles.longest},
        settings={"dtype": given.precision, "baseline_prompts_per_call": {}}, unfair=UNFAIR,
    )  # fmt: skip
    results = {}
    for length in given.lengths:
        prompts = sides.titles.prompts(given.prompts, length)
        found = results[length] = run_length(sides, prompts, machine, given.precision, given.repeats)
        report.rows += found["rows"]
        report.checks[f"{length} tokens"] = found["checks"]
        report.settings["baseline_prompts_per_call"][str(length)] = found["searched"]
        ratio = found["each"]["transformers"] / found["each"]["ours"]
        report.targets[f"{length} tokens"] = harness.Target.at_least(GOAL, ratio)
    if given.many:
        prompts = sides.titles.prompts(given.many, given.lengths[0])
        timed = harness.in_turn({"ours": lambda: sides.ours(prompts)}, repeats=given.repeats)["ours"]
        report.rows.append({
            "prompt tokens": given.lengths[0], "side": f"ours, {given.many} prompts",
            "seconds per prompt": harness.rounded(timed.median / given.many),
            "quartiles": [harness.rounded(q / given.many) for q in timed.quartiles],
        })  # fmt: skip
    first = results[given.lengths[0]]
    report.checks["identical"] = all(
        found["checks"]["same path"] == 1.0 and found["checks"]["largest score difference"] <= SCORE_TOLERANCE
        for found in results.values()
    )
    each = first["each"]
    report.finish(ours=each["ours"], baseline=each["transformers"], floor=first["floor"], json_file=given.json)


if __name__ == "__main__":
    main()
