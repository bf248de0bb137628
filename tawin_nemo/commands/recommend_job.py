"""What a job of the verb recommend reads before it computes: histories, filters, its share, and its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tawin_nemo.catalog.item_names import shorten
from tawin_nemo.config.fields import value_of
from tawin_nemo.config.schema import RecommendConfig
from tawin_nemo.data.histories import Histories, PreparedHistories
from tawin_nemo.data.history_checks import HistoryCounts, count_histories
from tawin_nemo.data.history_files import HistoryFiles
from tawin_nemo.eval.top_lists import Allowed
from tawin_nemo.run.exported import is_export
from tawin_nemo.run.trained import resolve_checkpoint
from tawin_nemo.run.world import World, limited
from tawin_nemo.serve.engine.catalog import PromptFormat, ServedCatalog
from tawin_nemo.serve.engine.item_fields import MatchCache, UnknownFilter, fields_of
from tawin_nemo.util.errors import ConfigError, DataError
from tawin_nemo.util.files import write_json
from tawin_nemo.util.launch import ArrayTask, read_array_task

ITEM_ID = "item_id"
#: Counts of a pass over the histories, kept so that other tasks and later attempts need none.
CHECKED_FILE = "_checked.json"
#: Recipe keys beside those of section ``recommend`` that decide lists.
DECIDING = (
    "data.max_history", "data.max_prompt_tokens", "data.template", "data.chat", "eval.beams", "rollout.score_space",
    "rollout.length_penalty", "rollout.assist.stage", "rollout.assist.weight",
)  # fmt: skip
#: Keys of section ``recommend`` that decide lists; ``allow`` and ``deny`` by the items that they leave.
OWN = ("split", "n", "exclude_history", "min_score", "part_rows")


def shard_of(options: RecommendConfig, task: ArrayTask | None = None) -> tuple[int, int]:
    """Share of this job and number of shares: as the recipe says, else those of a Slurm array, else 0 of 1.

    Raises ConfigError for a share that there is not, and for an array whose numbers do not say which share is meant.
    """
    task = task or read_array_task()
    count, index = options.shard_count, options.shard_index
    if task is not None and not count and task.place is None:
        raise ConfigError(
            f"this Slurm array has {task.count} tasks with irregular numbers {task.first} .. {task.last}; set "
            "recommend.shard_count to the number of shares, of which a task computes that of its number"
        )
    if index < 0 and task is not None:
        index = task.task if count else int(task.place or 0)
    count = count or (task.count if task is not None else 1)
    if index < 0 and count > 1:
        raise ConfigError(f"recommend.shard_count={count} needs recommend.shard_index=0 .. {count - 1}")
    index = max(index, 0)
    if index >= count:
        source = "" if options.shard_index >= 0 else " (SLURM_ARRAY_TASK_ID)"
        raise ConfigError(
            f"recommend.shard_index={index}{source} is no share of recommend.shard_count={count or 1}; shares are "
            f"0 .. {count - 1}, so sbatch --array=0-{count - 1}"
        )
    return index, count


def histories_of(world: World) -> Histories:
    """The histories that the recipe names. Raises DataError for none, and as ``HistoryFiles``."""
    options = world.recipe.recommend
    source: Histories
    if options.histories:
        source = HistoryFiles(Path(options.histories), world.catalog.external_ids, key="recommend.histories")
        if not source.rows:
            raise DataError(f"recommend.histories={options.histories} holds no rows")
        return source
    if options.split == "users":
        source = PreparedHistories.of_users(world.dataset)
    else:
        split = limited(getattr(world.dataset, options.split), options.split, world.recipe)
        source = PreparedHistories(world.dataset, split, users=False)
    if not source.rows:
        raise ConfigError(
            "recommend.histories is empty and there are no prepared rows (an export holds no data); set "
            "recommend.histories=FILE or data.root=DIR"
        )
    return source


def counts_of(source: Histories, folder: Path, catalog: str, *, keep: bool) -> HistoryCounts:
    """What one pass over the histories finds; with ``keep`` written to ``folder``, where later calls find it.

    Raises DataError as ``count_histories``.
    """
    if not isinstance(source, HistoryFiles):
        return HistoryCounts(source.rows)
    known = {"catalog": catalog, "files": [list(entry) for entry in source.listing]}
    path = folder / CHECKED_FILE
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if {name: stored.get(name) for name in known} == known:
            return HistoryCounts(**stored["counts"])
    counts = count_histories(source)
    if keep:
        write_json(path, {**known, "counts": asdict(counts)})
    return counts


def check_counts(counts: HistoryCounts, options: RecommendConfig) -> None:
    """Raises DataError for unknown items and empty histories that the recipe does not skip."""
    key = "recommend.histories"
    if counts.unknown and options.unknown_items == "error":
        raise DataError(
            f"{key}: {counts.unknown} entries in {counts.with_unknown} of {counts.rows} histories name no item of the "
            f"catalog ({shorten(counts.unknown_names)}): are they of another data set, or is the checkpoint of another "
            "catalog? recommend.unknown_items=skip leaves them out"
        )
    if (counts.empty or counts.emptied) and options.empty_histories == "error":
        first = f" (the first: {counts.first_empty})" if counts.first_empty else ""
        emptied = f", {counts.emptied} have no item of the catalog" if counts.emptied else ""
        raise DataError(
            f"{key}: {counts.empty} of {counts.rows} histories are empty{first}{emptied}; remove these users, or set "
            "recommend.empty_histories=skip, which gives them an empty list"
        )


def allowed_items(world: World) -> Allowed:
    """What ``recommend.allow``, ``deny``, ``filter`` and ``exclude_history`` leave. Raises ConfigError for nothing."""
    options, catalog = world.recipe.recommend, world.catalog
    allowed_I = np.ones(len(catalog), dtype=bool)
    if options.allow:
        allowed_I[:] = False
        allowed_I[listed_items(Path(options.allow), "recommend.allow", world)] = True
    if options.filter:
        allowed_I &= filtered_items(world)
    if options.deny:
        allowed_I[listed_items(Path(options.deny), "recommend.deny", world)] = False
    if not allowed_I.any():
        raise ConfigError("recommend.allow, recommend.deny and recommend.filter together leave no item; widen them")
    return Allowed(catalog, None if allowed_I.all() else allowed_I, unseen=options.exclude_history)


def listed_items(path: Path, key: str, world: World) -> np.ndarray:
    """Indices of the items in a file: Parquet with ``item_id``, else an external id per line.

    Raises DataError for a file that cannot be read, and for unknown items where the recipe does not skip them.
    """
    try:
        if path.suffix == ".parquet":
            column = pl.read_parquet(path, columns=[ITEM_ID])[ITEM_ID].drop_nulls().cast(pl.String)
            names = column.unique(maintain_order=True).to_list()
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    except (OSError, UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{key}={path} cannot be read ({str(error).splitlines()[0]}); needed is a text file with an external id "
            f"per line, or Parquet with {ITEM_ID}"
        ) from error
    known = pa.array(world.catalog.external_ids, type=pa.string())
    items = pc.index_in(pa.array(names, type=pa.string()), value_set=known).to_pylist()
    unknown = [name for name, item in zip(names, items, strict=True) if item is None]
    if unknown and world.recipe.recommend.unknown_items == "error":
        raise DataError(
            f"{key}={path}: {len(unknown)} of {len(names)} ids name no item of the catalog ({shorten(unknown)}); "
            "recommend.unknown_items=skip leaves them out"
        )
    return np.array([item for item in items if item is not None], dtype=np.int64)


def filtered_items(world: World) -> np.ndarray:
    """Bool [I]: the items that ``recommend.filter`` allows. Raises ConfigError for unknown fields and values."""
    fields, data = fields_of(world, world.catalog.external_ids), world.recipe.data
    wanted: dict[str, list[Any]] = {}
    for word in world.recipe.recommend.filter:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"recommend.filter={word} is not FIELD=VALUE; fields: {', '.join(fields.names)}")
        wanted.setdefault(name, []).append(fields.parsed(name, value))
    prompt_format = PromptFormat(world.tokenizer, world.template, data.max_history, data.max_prompt_tokens)
    served = ServedCatalog.of(world.catalog, world.item_texts, prompt_format)
    try:
        match = MatchCache(fields).match(served, wanted)
    except UnknownFilter as error:
        raise ConfigError(f"recommend.{error}") from error
    allowed_I = np.zeros(len(world.catalog), dtype=bool)
    allowed_I[match.trie_item_M] = True
    return allowed_I


def job_of(world: World, source: Histories, allowed: Allowed) -> dict[str, Any]:
    """What decides the lists, by recipe key: two jobs with the same values write the same files. Collective."""
    recipe = world.recipe
    kept = np.arange(len(world.catalog)) if allowed.allowed_I is None else np.flatnonzero(allowed.allowed_I)
    rows = "recommend.histories" if recipe.recommend.histories else f"recommend.split={recipe.recommend.split}"
    return {
        "checkpoint": weights_fingerprint(world),
        **world.identity,
        **{key: value_of(recipe, key) for key in DECIDING},
        "eval.precision": recipe.eval_precision,
        **{f"recommend.{name}": getattr(recipe.recommend, name) for name in OWN},
        "recommend.allow, deny and filter": hashlib.sha256(kept.tobytes()).hexdigest(),
        f"rows of {rows}": source.rows,
    }


def weights_fingerprint(world: World) -> str:
    """SHA-256 of the weights that are used: of the checkpoint's record, or of pretrained files. Collective."""
    from tawin_nemo.models.megatron.checkpoint import adapters
    from tawin_nemo.train.base import pretrained_fingerprint
    from tawin_nemo.util.hub import local_folder

    recipe = world.recipe
    named: Sequence[tuple[str, str]] = (("checkpoint", recipe.checkpoint), ("start", recipe.start))
    for key, path in named:
        if path and not is_export(path):
            return adapters.fingerprint(resolve_checkpoint(path, key))
    return pretrained_fingerprint(local_folder(recipe.model.init, recipe.model.revision))
