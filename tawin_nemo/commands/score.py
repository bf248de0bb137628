"""The verb score: recommendation lists that another program made, measured by this project's evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tawin_nemo.config.schema import Recipe
from tawin_nemo.data.interactions import load_dataset
from tawin_nemo.eval.foreign_lists import measure, read_lists
from tawin_nemo.eval.result import EvalResult, compare, headline_metrics, results_table
from tawin_nemo.run.datasets import run_dir_of
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


def score(recipe: Recipe, data_root: Path) -> dict[str, Any]:
    """Measure ``score.lists`` on the last split of ``eval.splits`` and write the result below ``score.output``.

    ``data_root`` is the folder of the prepared data. With ``score.against``, differences are paired on its rows. Raises
    ConfigError without lists, and DataError for lists that do not belong to the rows of the split.
    """
    options, split = recipe.score, recipe.eval.splits[-1]
    path = Path(options.lists)
    if not options.lists or not (path.is_file() or path.is_dir()):
        raise ConfigError(
            f"score.lists={options.lists or chr(39) * 2} is no file and no folder; name the one that holds the lists"
        )
    theirs = EvalResult.read(_evaluation(Path(options.against)), split) if options.against else None
    output = Path(options.output) if options.output else run_dir_of(recipe) / path.stem
    dataset = load_dataset(data_root)
    rows = {"valid": dataset.valid, "test": dataset.test}[split]
    if len(rows) == 0:
        raise ConfigError(f"eval.splits={split}: the data have no rows of it to measure lists on")
    lists = read_lists(path, rows, dataset)
    for count, what in (
        (lists.unknown, f"entries of {path} name no item of the catalog; they take their place and never hit"),
        (lists.without_list, f"of {len(rows)} rows have no list; they count as misses"),
        (lists.unused, f"users of {path} have no row in {split}"),
    ):
        if count:
            log.warning("%d %s", count, what)
    ours = measure(lists, dataset, rows, recipe.eval)
    results = {path.stem: ours} | ({options.against: theirs} if theirs else {})
    log.info("%s\n%s", path, results_table(results, recipe.eval.ks, split))
    minus = _minus(ours, theirs, recipe.eval.ks) if theirs else {}
    ours.named(dataset).write(output / "eval", split)
    return {
        "scored": str(output),
        split: {**ours.means, "intervals": {name: list(pair) for name, pair in ours.intervals.items()}},
        "rows": ours.rows,
        "rows_without_list": lists.without_list,
        "unknown_items": lists.unknown,
        "beyond": ours.beyond,
        "minus": minus,
    }


def _minus(ours: EvalResult, theirs: EvalResult, ks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Paired differences of the metrics that papers print, on the rows that the other evaluation has."""
    shared = replace(ours, per_user=ours.per_user.filter(ours.per_user["row"].is_in(theirs.per_user["row"].implode())))
    found = {name: compare(shared, theirs, name) for name in headline_metrics(ks)}
    for name, pair in found.items():
        mean, low, high = pair.difference.mean, pair.difference.low, pair.difference.high
        log.info("%s, paired difference: %+.4f [%+.4f, %+.4f]", name, mean, low, high)
    return {name: asdict(pair) for name, pair in found.items()}


def _evaluation(stage: Path) -> Path:
    """The folder of a stage's evaluation. Raises ConfigError when there is none."""
    if not (stage / "eval").is_dir():
        raise ConfigError(f"score.against={stage} has no folder eval; name a finished stage, such as RUN_DIR/rl")
    return stage / "eval"
