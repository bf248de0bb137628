"""A step of TRL's GRPOTrainer over a catalog: this package's search as its generation function, against transformers'.

    python -m tests.benchmarks.trl_step [--small | --full]

Both sides are the real GRPOTrainer with the same model, prompts, reward and update; only ``rollout_func`` differs. Ours
is ``tools.trl.CatalogRollouts``, with the copy of the weights before every rollout; the other one calls the model's own
``generate`` with as many beams and ``prefix_allowed_tokens_fn``, at the fastest number of prompts a call. The rewards
have to be the same. A third row replays one rollout: the step without generation.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from tawin_nemo.config.backbones import BACKBONES
from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.tokenizer import build_tokenizer
from tawin_nemo.tools.hf_search import CatalogSearch
from tawin_nemo.tools.trl import CatalogRollouts
from tawin_nemo.types import TokenRows
from tests.benchmarks import harness
from tests.benchmarks.baselines import PrefixTable, generate_beams
from tests.benchmarks.setting import SPREAD, industrial_titles, model_parser, qwen_shape, start, transformers_model

GOAL = 1.0  # less time than with the prefix function; the update is the same
LR = 1e-6
SMALL = replace(BACKBONES["small-1m"], init_std=SPREAD)
SPARE = 8  # tokens: cut text is not always encoded as it was
UNFAIR = [
    "the update, which is TRL's on both sides, is part of every step",
    "transformers' generation walks token by token to the longest living title, through forced tokens too",
    "with 4 of 24 layers the vocabulary-wide head weighs more than in the whole model (--full has all layers)",
]


class PrefixRollouts:
    """``rollout_func`` that calls transformers' ``generate`` with a prefix function: beams, as MiniOneRec trains."""

    def __init__(self, paths: TokenRows, tokenizer: Any, *, per_call: int = 1) -> None:
        self.tokenizer, self.eos, self.per_call = tokenizer, tokenizer.eos_token_id, per_call
        self.table, self.longest = PrefixTable(paths, self.eos), int(paths.lengths.max())

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        group = trainer.num_generations
        tokens = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        model = trainer.accelerator.unwrap_model(trainer.model)
        training = model.training
        model.eval()
        found: list[list[tuple[tuple[int, ...], float]]] = []
        for _, alike in itertools.groupby(tokens[::group], key=len):  # of one length: no padding
            found += generate_beams(
                model, TokenRows.from_lists(list(alike)), self.table, group,
                longest=self.longest, eos=self.eos, per_call=self.per_call,
            )  # fmt: skip
        model.train(training)
        completions = [list(path) for paths in found for path, _ in paths]
        return {"prompt_ids": tokens, "completion_ids": completions, "logprobs": None}


def trainer_of(
    model: PreTrainedModel, tokenizer: Any, rows: Sequence[dict[str, str]], folder: str, *, rollouts: Any,
    reward: Callable[..., list[float]], group: int, steps: int, lr: float = LR, **options: Any,
) -> Any:  # fmt: skip
    """TRL's GRPOTrainer over prompts ``rows``, all of them in every step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0, report_to=[],
        per_device_train_batch_size=group * len(rows), num_generations=group, max_steps=steps, learning_rate=lr,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
        **options,
    )  # fmt: skip
    return GRPOTrainer(
        model=model, args=config, reward_funcs=reward, train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer, rollout_func=rollouts,
    )  # fmt: skip


def hit(completions: list[str], target: list[str], **_: Any) -> list[float]:
    """1 for the target's title."""
    return [float(text.strip() == wanted.strip()) for text, wanted in zip(completions, target, strict=True)]


def small_tokenizer(titles: Sequence[str]) -> Any:
    """A BPE of 2,048 tokens, trained on the titles."""
    folder = Path(tempfile.mkdtemp())
    build_tokenizer(DataConfig(tokenizer="bpe"), CatalogConfig(), ModelConfig(), titles, None).save(folder)
    return AutoTokenizer.from_pretrained(folder)


def text_of(tokenizer: Any, tokens: list[int], count: int) -> str:
    """The end of a prompt as text that is encoded as ``count`` tokens."""
    ends = (tokenizer.decode(tokens[start:]) for start in range(2 * SPARE))
    return next(text for text in ends if len(tokenizer(text)["input_ids"]) == count)


class Replayed:
    """The last rollout of another function again: a step without generation, which no generation can undercut."""

    def __init__(self, rollouts: Any) -> None:
        self.rollouts, self.kept = rollouts, None

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        self.kept = self.kept or self.rollouts(prompts, trainer)
        return dict(self.kept)


class Side:
    """One trainer; a call is one whole step of its own loop."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.rewards: list[float] = []

    def __call__(self) -> None:
        self.trainer.train()
        self.rewards += [line["reward"] for line in self.trainer.state.log_history if "reward" in line]


def main() -> None:
    options = model_parser(__doc__)
    options.add_argument("--prompts", type=int, default=2)
    options.add_argument("--tokens", type=int, default=128, help="of a prompt")
    options.add_argument("--group", type=int, default=16, help="candidates of a prompt = beams")
    options.add_argument("--small", action="store_true", help="a model of 1M parameters with a small vocabulary")
    given = options.parse_args()
    start(given.threads)
    machine, titles = harness.this_machine(), industrial_titles()
    tokenizer = small_tokenizer(titles.catalog.titles) if given.small else titles.tokenizer.fast
    shape = SMALL if given.small else qwen_shape(given.layers, full=given.full)
    shape = replace(shape, vocab=len(tokenizer)) if given.small else shape
    model = transformers_model(shape, given.precision)
    tokenizer.pad_token = tokenizer.eos_token
    search = CatalogSearch(model, tokenizer, titles.catalog.titles)
    long_texts = titles.tokenizer.fast.batch_decode(titles.prompts(given.prompts, 4 * given.tokens).padded()[0])
    encoded = [tokenizer(text)["input_ids"][-given.tokens - SPARE :] for text in long_texts]
    texts = [text_of(tokenizer, tokens, given.tokens) for tokens in encoded]
    best = search.beams([tokenizer(text)["input_ids"] for text in texts], given.group)
    wanted = [search.catalog.titles[int(items[given.group // 3])] for items in best.items_BW]
    rows = [{"prompt": text, "target": title} for text, title in zip(texts, wanted, strict=True)]
    ours, prefix = CatalogRollouts(search), PrefixRollouts(search.catalog.paths, tokenizer)
    functions = {"ours": ours, "TRL, prefix function": prefix, "no generation": Replayed(ours)}
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            name: Side(trainer_of(copy.deepcopy(model), tokenizer, rows, folder, rollouts=rollouts, reward=hit,
                                  group=given.group, steps=1))
            for name, rollouts in functions.items()
        }  # fmt: skip
        tuned = tune(prefix, sides["TRL, prefix function"], given.prompts)
        timed = harness.in_turn(sides, repeats=given.repeats, warm=["TRL, prefix function"])
    report = harness.Report(
        "trl_step", machine,
        shapes={"prompts": given.prompts, "prompt_tokens": given.tokens, "group": given.group, "layers": shape.layers,
                "hidden": shape.hidden, "vocab": shape.vocab, "items": len(search.catalog)},
        settings={"dtype": given.precision, "prompts_per_call": tuned}, unfair=UNFAIR,
    )  # fmt: skip
    base, mine = timed["TRL, prefix function"].median, timed["ours"].median
    for name, side in sides.items():
        report.rows.append({"side": name, **timed[name].facts(), "ratio": harness.rounded(base / timed[name].median),
                            "reward": side.rewards[-1]})  # fmt: skip
    report.checks["rewards"] = {name: side.rewards[-given.repeats :] for name, side in sides.items()}
    report.targets["step"] = harness.Target.at_least(GOAL, base / mine)
    report.finish(ours=mine, baseline=base, floor=timed["no generation"].median, json_file=given.json)


def tune(prefix: PrefixRollouts, side: Side, prompts: int) -> dict[str, Any]:
    """Choose the prompts per call of ``generate``; returns what was measured."""

    def stepping(per_call: int) -> Callable[[], None]:
        def run() -> None:
            prefix.per_call = per_call
            side()

        return run

    best, seconds = harness.best_of({str(n): stepping(n) for n in (1, 2, 4) if n <= prompts})
    prefix.per_call = int(best)
    return {"best": prefix.per_call, "seconds": seconds}


if __name__ == "__main__":
    main()
