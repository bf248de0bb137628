"""`tawin-nemo doctor checkpoint=DIR`: what a trained recommender does, and what is wrong with its catalog.

The figures are those that users of generative recommenders ask for: how often the model, left alone, writes something
that is no item; items that it cannot tell apart; codes that no item has; recall against the most popular items; and
recall of the items that few customers buy. The model may be a stage of a run, or somebody else's Hugging Face
directory; data and catalog come from the recipe.

Axes: N rows, I items, K cut-off.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tawin_nemo.commands.session import codes_path, started, trained_world
from tawin_nemo.config.schema import Recipe
from tawin_nemo.data.samples import Samples
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.eval.bias import sequence_counts, target_counts
from tawin_nemo.eval.evaluate import evaluate
from tawin_nemo.eval.intervals import Interval, normal_interval
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.greedy import free_beam_search, greedy_decode
from tawin_nemo.run.datasets import prepared_root
from tawin_nemo.run.world import World, build_world
from tawin_nemo.tools.doctor.check import Check, Status, lines, summary
from tawin_nemo.tools.doctor.model_checks import (
    FREE_BEAMS,
    RECALL_K,
    TAIL_K,
    UNPOPULAR_SHARE,
    collision_check,
    dead_code_check,
    free_check,
    recall_check,
    searched_check,
    share,
    tail_check,
)
from tawin_nemo.train.start import engine_of
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError, UserError

#: Rows of the split that are searched, and those that are decoded without the trie, greedily and by beams.
ROWS, GREEDY_ROWS, BEAM_ROWS = 1000, 256, 64
#: Prompts that are decoded at once: every beam needs the logits of the whole vocabulary.
CHUNK_ROWS = 16
_NUMBER = re.compile(r"(.*?)(\d+)(\D*)", re.DOTALL)


def run_doctor_of_model(recipe: Recipe) -> tuple[dict[str, Any], int]:
    """(result for the last line on stdout, exit code): 0, or 2 when something fails; the table goes to stderr.

    Raises ConfigError for a checkpoint, a model or data that are not there or do not fit each other.
    """
    with opened(recipe) as world:
        result, checks = examine(world, recipe.checkpoint)
    if runtime.world_rank() == 0:
        print("\n".join([*lines(checks), summary(checks)]), file=sys.stderr, flush=True)
    return result, UserError.exit_code if any(item.status == Status.FAILS for item in checks) else 0


@contextlib.contextmanager
def opened(recipe: Recipe) -> Iterator[World]:
    """The world of the recipe's ``checkpoint``; a Hugging Face directory gets a run directory that is removed again."""
    folder = Path(recipe.checkpoint)
    if not (folder / "config.json").is_file():
        with started(recipe):
            yield trained_world(recipe, weights_follow=False)
        return
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"checkpoint={folder} holds config.json but no *.safetensors files; download the whole model, or save it "
            "with save_pretrained(..., safe_serialization=True)"
        )
    model = replace(recipe.model, init=str(folder), revision="")
    recipe = replace(recipe, checkpoint="", start="", model=model, data=replace(recipe.data, tokenizer="auto"))
    with started(recipe), contextlib.ExitStack() as stack:
        here = stack.enter_context(tempfile.TemporaryDirectory(prefix="tawin-doctor-"))
        run_dir = Path(runtime.on_rank_0(lambda: here))
        data_root = runtime.on_rank_0(partial(prepared_root, recipe, run_dir=run_dir))
        yield build_world(recipe, run_dir, data_root, codes_path=codes_path(recipe))
        runtime.barrier()


def examine(world: World, checkpoint: str) -> tuple[dict[str, Any], list[Check]]:
    """The figures by name, and one line with a verdict for each. Raises ConfigError where others hold the model."""
    engine = engine_of(world)
    if not isinstance(engine, RolloutEngine):
        raise ConfigError(
            "doctor checkpoint= runs the model itself; set rollout.placement=colocated, rollout.devices=0"
        )
    split = world.recipe.eval.splits[-1]
    samples = spread(world.samples[split], len(world.samples[split]) if world.recipe.data.eval_limit else ROWS)
    greedy, beams = free_answers(world, engine, samples)
    cfg = world.recipe.eval
    cfg = replace(cfg, ks=sorted({*cfg.ks, RECALL_K, TAIL_K}), beams=max(cfg.beams, TAIL_K, *cfg.ks))
    train, items = world.samples["train"], len(world.catalog)
    searched = evaluate(
        engine, samples, world.catalog, cfg, dp=world.dp, label=f"doctor {split}",
        popularity_I=sequence_counts(train, items),
    )  # fmt: skip
    target_I = target_counts(train, items)
    popular = popular_recall(target_I, samples.target_N, RECALL_K)
    tail = tail_recall(searched, unpopular(target_I))
    levels = code_use(world) if world.recipe.catalog.kind == "sid" else []
    shared = float((world.catalog.sharing_I > 1).mean())
    checks = [
        free_check(greedy, beams, world.recipe.sft.loss_space),
        searched_check(searched),
        collision_check(shared, world.catalog.duplicates(), world.recipe.catalog.kind),
        *([dead_code_check(levels)] if levels else []),
        recall_check(searched, popular),
        tail_check(searched, tail),
    ]
    result = {
        "checkpoint": checkpoint,
        "split": split,
        "rows": len(samples),
        "invalid_greedy": share(greedy),
        "invalid_beams": share(beams),
        "invalid_rate": searched.invalid_rate,
        "items_on_shared_paths": shared,
        "codes": [{"used": used, "of": size} for used, size in levels],
        **searched.means,
        f"popular_recall@{RECALL_K}": popular,
        f"tail_recall@{TAIL_K}": None if tail is None else tail[0].mean,
        "tail_rows": 0 if tail is None else tail[1],
        "beyond": searched.beyond,
        "checks": [asdict(item) for item in checks],
    }
    return result, checks


def spread(samples: Samples, rows: int) -> Samples:
    """At most ``rows`` samples, evenly spaced over the split, which is ordered by time."""
    return samples.take(np.unique(np.linspace(0, len(samples) - 1, min(rows, len(samples))).astype(np.int64)))


# -- Free answers: decoding without the trie.


def free_answers(world: World, engine: RolloutEngine, samples: Samples) -> tuple[tuple[int, int], tuple[int, int]]:
    """(answers that name no item, answers) of greedy decoding and of beam search over the whole vocabulary."""
    catalog, eos = world.catalog, world.tokenizer.eos_id
    known = {catalog.paths[item].tobytes() for item in range(len(catalog))}
    longest = int(catalog.paths.lengths.max())
    dp = engine.dp or world.dp

    def wrong(answers: Sequence[Sequence[int]]) -> int:
        return sum(np.asarray(answer, dtype=np.int64).tobytes() not in known for answer in answers)

    counts = np.zeros(4, dtype=np.int64)
    for place, rows in ((0, GREEDY_ROWS), (2, BEAM_ROWS)):
        prompts = spread(samples, rows).prompts
        mine = np.arange(len(prompts))[dp.rank :: dp.size]
        for start in range(0, len(mine), CHUNK_ROWS):
            chunk = prompts.take(mine[start : start + CHUNK_ROWS])
            answers = _greedy(engine, chunk, longest, eos) if place == 0 else _beams(engine, chunk, longest, eos)
            counts[place : place + 2] += wrong(answers), len(answers)
    counts = np.sum(dp.gather(counts), axis=0)
    return (int(counts[0]), int(counts[1])), (int(counts[2]), int(counts[3]))


def _greedy(engine: RolloutEngine, prompts: TokenRows, longest: int, eos: int) -> list[list[int]]:
    written = greedy_decode(engine.lm, prompts, max_tokens=longest, eos=eos)
    return [[*written[row].tolist(), eos] for row in range(len(written))]


def _beams(engine: RolloutEngine, prompts: TokenRows, longest: int, eos: int) -> list[list[int]]:
    found = free_beam_search(engine.lm, prompts, width=FREE_BEAMS, max_tokens=longest, eos=eos)
    return [answer for answers in found for answer in answers]


# -- Codes and items.


def code_use(world: World) -> list[tuple[int, int]]:
    """For each level of the semantic IDs: codes that some item has, and codes that there are.

    There are as many as the largest number of a code says, or as many as the tokenizer has of that form. Levels that
    are the same for all items (marks around the codes) are not counted.
    """
    paths = world.catalog.paths
    starts, levels = paths.offsets[:-1], int(paths.lengths.min()) - 1  # without end of text
    columns = [np.unique(paths.flat[starts + level]).tolist() for level in range(levels)]
    return [found for tokens in columns if (found := _used_of(tokens, world.tokenizer)) is not None]


def _used_of(tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[int, int] | None:
    words = [str(tokenizer.backend.id_to_token(token)) for token in tokens]
    parsed = [match for word in words if (match := _NUMBER.fullmatch(word))]
    if len(parsed) < len(words):
        return (len(words), len(words)) if len(words) > 1 else None
    forms = {(match[1], match[3]) for match in parsed}
    others = map(_NUMBER.fullmatch, tokenizer.backend.get_vocab(with_added_tokens=True))
    there = sum(match is not None and (match[1], match[3]) in forms for match in others) if all(map(any, forms)) else 0
    return len(words), max(there, 1 + max(int(match[2]) for match in parsed))


def unpopular(popularity_I: np.ndarray) -> np.ndarray:
    """The items with the fewest rows of train: ``UNPOPULAR_SHARE`` of all, as bool [I].

    >>> unpopular(np.array([9, 0, 5, 1, 2])).tolist()
    [False, True, True, True, True]
    """
    tail_I = np.zeros(len(popularity_I), dtype=bool)
    tail_I[np.argsort(popularity_I, kind="stable")[: int(UNPOPULAR_SHARE * len(popularity_I))]] = True
    return tail_I


def tail_recall(searched: EvalResult, tail_I: np.ndarray) -> tuple[Interval, int] | None:
    """Recall@TAIL_K of the rows whose target is unpopular, and their number; None where there are none."""
    inside_N = tail_I[searched.per_user["target"].to_numpy()]
    if not inside_N.any():
        return None
    return normal_interval(searched.per_user[f"recall@{TAIL_K}"].to_numpy()[inside_N]), int(inside_N.sum())


def popular_recall(popularity_I: np.ndarray, target_N: np.ndarray, k: int) -> float:
    """Recall of answering everybody with the ``k`` items that have the most rows of train.

    >>> popular_recall(np.array([3, 0, 5]), np.array([2, 2, 1, 0]), 1)
    0.5
    """
    return float(np.isin(target_N, np.argsort(-popularity_I, kind="stable")[:k]).mean())
