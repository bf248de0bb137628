"""The verb recommend: the best items of many users, written as Parquet in parts, by any number of processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tawin_nemo.commands.recommend_job import (
    allowed_items,
    check_counts,
    counts_of,
    histories_of,
    job_of,
    shard_of,
)
from tawin_nemo.data.histories import Histories, HistoryRows
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.samples import Samples, encode_split
from tawin_nemo.eval.top_lists import Allowed, TopLists, list_chunks, search_lists
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run import signals
from tawin_nemo.run.parts import Parts, divided
from tawin_nemo.run.run_lock import run_lock
from tawin_nemo.run.world import World
from tawin_nemo.types import NO_ITEM, DataParallel, TokenRows
from tawin_nemo.util.errors import ConfigError, Preempted
from tawin_nemo.util.log import get_logger, progress

log = get_logger(__name__)


def recommend(world: World, *, dry_run: bool = False) -> dict[str, Any]:
    """Lists for all rows of ``recommend.histories`` (or of the prepared data) in ``recommend.output``.

    Parts that an earlier call of the same job has finished are kept; ``dry_run``: says what there is and is to do.
    Raises ConfigError and DataError for what the user can correct, before anything is computed; Preempted after a
    signal and at ``trainer.max_time``, and then the same command goes on.
    """
    options = world.recipe.recommend
    check_recipe(world)
    index, count = shard_of(options)
    source, allowed = histories_of(world), allowed_items(world)
    folder = Path(options.output) if options.output else world.run_dir / "recommend"
    parts = Parts(folder, source.rows, options.part_rows, "recommend.output")
    with contextlib.ExitStack() as stack:
        if not dry_run:
            shard = [f"shard-{index}-of-{count}"] if count > 1 else []
            runtime.on_rank_0(lambda: stack.enter_context(run_lock(folder, "recommend", outputs=shard)))
        catalog = world.catalog.fingerprint
        counts = runtime.on_rank_0(lambda: counts_of(source, folder, catalog, keep=not dry_run))
        check_counts(counts, options)
        job = job_of(world, source, allowed)
        result = {
            "output": str(folder), "rows": source.rows, "parts": len(parts), "shard": f"{index}/{count}",
            "unknown_items": counts.unknown, "empty_histories": counts.empty + counts.emptied,
        }  # fmt: skip
        if dry_run:
            runtime.on_rank_0(lambda: parts.check_job(job))
            todo = unfinished(parts, parts.share(index, count), source, DataParallel())
            return {"dry_run": True, **result, "parts_to_do": len(todo)}
        runtime.on_rank_0(lambda: parts.start(job))
        stack.enter_context(signals.listening())
        from tawin_nemo.train.start import engine_of  # megatron, which a dry run does not need

        return result | compute(world, engine_of(world), source, parts, allowed, parts.share(index, count))


def check_recipe(world: World) -> None:
    """Raises ConfigError for recipes whose searches cannot be made for arbitrary histories, or cannot be filtered."""
    options, recipe = world.recipe.recommend, world.recipe
    if recipe.data.show_candidates:
        raise ConfigError("data.show_candidates=true: such a model chooses among shown candidates; use evaluate")
    filters = options.exclude_history or options.allow or options.deny or options.filter
    if filters and recipe.rollout.placement != "colocated":
        raise ConfigError(
            f"rollout.placement={recipe.rollout.placement} searches without filters; leave out recommend.allow, deny, "
            "filter and exclude_history, or set rollout.placement=colocated"
        )


def compute(
    world: World, engine: Engine, source: Histories, parts: Parts, allowed: Allowed, share: range
) -> dict[str, Any]:  # fmt: skip
    """Make the parts of ``share`` that are not finished, divided among the replicas; figures of this job."""
    dp = engine.dp or world.dp
    todo = unfinished(parts, share, source, dp)
    mine = divided(todo, dp.rank, dp.size)
    rows = sum(end - begin for begin, end in map(parts.bounds, mine))
    log.info(
        "%d of %d parts of this job are to do: %s, %d rows per part", len(todo), len(share), parts.folder,
        parts.part_rows,
    )  # fmt: skip
    writer = Writer(world, engine, source, parts, allowed, writes=is_first_of_replica(dp))
    begun = time.monotonic()
    for _ in progress(writer.steps(mine), what="recommend", total=rows, size=lambda done: done, unit="rows"):
        stop_if_asked(world.deadline)
    seconds = time.monotonic() - begun
    runtime.barrier()
    done = runtime.gather_objects((rows if writer.writes else 0, seconds))
    total, slowest = sum(number for number, _ in done), max(each for _, each in done)
    complete = runtime.on_rank_0(lambda: parts.complete() is not None)
    return {
        "parts_made": len(todo), "rows_made": total, "seconds": round(slowest, 3),
        "rows_per_s": round(total / slowest, 1) if total else 0.0, "complete": complete,
    }  # fmt: skip


def is_first_of_replica(dp: DataParallel) -> bool:
    """Whether this process is the first of those that search the same rows. Collective."""
    return runtime.gather_objects(dp.rank).index(dp.rank) == runtime.world_rank()


def stop_if_asked(deadline: float | None) -> None:
    """Raises Preempted after a signal, and when ``deadline`` (of the monotonic clock) is over."""
    reason = signals.received() or ("trainer.max_time" if deadline and time.monotonic() >= deadline else "")
    if reason:
        raise Preempted(f"{reason}: finished parts are kept; run the same command again for the others")


def unfinished(parts: Parts, share: range, source: Histories, dp: DataParallel) -> list[int]:
    """The parts of ``share`` without a whole file, the same on every process; the replicas divide the reading.

    Raises ConfigError when the rows of a finished part have changed since it was made.
    """
    todo: list[int] = []
    problem = ""
    for part in divided(share, dp.rank, dp.size):
        record = parts.record(part)
        if record is None:
            todo.append(part)
        elif source.read(*parts.bounds(part)).digest != record["input"]:
            begin, end = parts.bounds(part)
            problem = problem or (
                f"recommend.histories: rows {begin} .. {end - 1} are not those that {parts.file(part)} was made of; "
                f"name another recommend.output, or remove {parts.folder}"
            )
    gathered = dp.gather((todo, problem))
    for _, found in gathered:
        if found:
            raise ConfigError(found)
    return sorted(part for each, _ in gathered for part in each)


@dataclass(frozen=True, eq=False)
class Writer:
    """Searches the rows of one part after the other; with ``writes`` it also writes them."""

    world: World
    engine: Engine
    source: Histories
    parts: Parts
    allowed: Allowed
    writes: bool

    def steps(self, todo: Sequence[int]) -> Iterator[int]:
        """Make the parts ``todo``; yields the rows that have just been done, those at the end once they are written."""
        for part in todo:
            rows = self.source.read(*self.parts.bounds(part))
            item_NK, score_NK = self._empty(len(rows))
            done = int((rows.items.lengths == 0).sum())
            more = {"empty_histories": done, "unknown_items": int(rows.unknown_N.sum())}
            for place, found in self._searches(rows):
                if done:
                    yield done
                item_NK[place], score_NK[place] = found.item_NK, found.score_NK
                done = len(place)
            if self.writes:
                table = lists_table(rows, item_NK, score_NK, self.world.catalog.external_ids)
                self.parts.write(part, table, digest=rows.digest, more=more)
            yield done

    def _searches(self, rows: HistoryRows) -> Iterator[tuple[np.ndarray, TopLists]]:
        """Places of some rows that have a history, and their lists, until all are searched."""
        filled = np.flatnonzero(rows.items.lengths > 0)
        if not len(filled):
            return
        recipe, seen = self.world.recipe, rows.items.take(filled)
        samples = encoded(self.world, seen)
        for chunk in list_chunks(samples, self.engine, self.allowed):
            yield (
                filled[chunk],
                search_lists(
                    self.engine, samples, chunk, n=recipe.recommend.n, width=self._width,
                    min_score=recipe.recommend.min_score, token_budget=recipe.eval.token_budget, allowed=self.allowed,
                    seen=seen,
                ),
            )  # fmt: skip

    @property
    def _width(self) -> int:
        recipe = self.world.recipe
        return min(max(recipe.recommend.n, recipe.eval.beams), self.world.catalog.trie.num_leaves)

    def _empty(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        shape = (rows, min(self.world.recipe.recommend.n, self._width))
        return np.full(shape, NO_ITEM, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32)


def encoded(world: World, histories: TokenRows) -> Samples:
    """The prompts of histories of item indices, exactly as those of a split are made.

    Only the items that occur are tokenised, where a prompt is joined from its items' texts.
    """
    texts, flat = world.item_texts, histories.flat
    marks = bool(world.recipe.model.item_tokens)
    joins = world.template.joins and type(world.template).prompt_of is Template.prompt_of and not marks
    used = np.unique(flat) if joins else np.arange(len(texts))
    local = TokenRows(np.searchsorted(used, flat), histories.offsets)
    none = np.zeros(len(histories), dtype=np.int64)
    samples = encode_split(
        Split(none, local, none, none), [texts[item] for item in used], world.tokenizer, world.template,
        world.recipe.data, item_tokens=marks,
    )  # fmt: skip
    shown = samples.history.take(np.arange(len(histories)))
    return replace(samples, history=TokenRows(used[shown.flat], shown.offsets))


def lists_table(rows: HistoryRows, item_NK: np.ndarray, score_NK: np.ndarray, external_ids: list[str]) -> pa.Table:
    """One line per row: its keys, ``item_ids`` (external ids, best first) and ``scores``."""
    there_NK = item_NK != NO_ITEM
    offsets = pa.array(np.concatenate([[0], np.cumsum(there_NK.sum(axis=1))]), type=pa.int32())
    names = pa.array(external_ids, type=pa.string()).take(pa.array(item_NK[there_NK]))
    lists = pa.ListArray.from_arrays(offsets, names)
    scores = pa.ListArray.from_arrays(offsets, pa.array(score_NK[there_NK], type=pa.float32()))
    return pa.table({**rows.keys, "item_ids": lists, "scores": scores})
