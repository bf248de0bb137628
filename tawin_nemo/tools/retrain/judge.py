"""Evaluates the candidate of a nightly run and the published version on the same rows, and writes ``gate.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tawin_nemo.config.schema import Recipe
from tawin_nemo.data.interactions import load_dataset
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.published import GATE_FILE, POPULARITY_FILE
from tawin_nemo.run.world import World, build_world, open_run_dir
from tawin_nemo.tools.retrain.freshness import DataFigures, figures
from tawin_nemo.tools.retrain.gate import Check, Decision, decide
from tawin_nemo.tools.retrain.index import make_codes
from tawin_nemo.tools.retrain.night import CODES_FOLDER, run_recipe
from tawin_nemo.tools.retrain.publish_root import EXPORT, NightlyRun, PublishRoot
from tawin_nemo.train.pipeline import evaluate_stage
from tawin_nemo.train.start import engine_of
from tawin_nemo.util.files import write_json

SPLIT = "valid"
LATENCY_FILE = "latency.json"
#: Searches whose time is measured, after so many that are not.
TIMED, WARM_UP = 64, 3


def gated_metrics(recipe: Recipe) -> list[str]:
    """``retrain.metrics`` and Recall at ``retrain.tail_k``, of the lists that ``eval.beams`` allows."""
    tail = min(recipe.retrain.tail_k, recipe.eval.beams)
    return list(dict.fromkeys([*recipe.retrain.metrics, *([f"recall@{tail}"] if tail else [])]))


def gate(recipe: Recipe, run: NightlyRun, root: PublishRoot, codes: Path | None) -> Decision:
    """Judge the export against what is published now; the decision is written to ``RUN_DIR/gate.json``. Collective."""
    published = runtime.on_rank_0(root.published)
    version, settings = root.version(run.date), recipe.retrain
    export = version if version.is_dir() else root.run_dir(run.date) / EXPORT
    candidate = evaluate_export(recipe, run, root, export, "candidate", codes, timed=settings.max_latency_ms > 0)
    rival = None
    if published is not None:
        name = f"published_{published.name}"
        rival = evaluate_export(recipe, run, root, published, name, codes_of_rival(recipe, run, root, published, codes))
    checks = (
        Check("coverage@10", candidate.coverage, settings.min_coverage, rival.coverage if rival else None),
        Check("latency_ms", latency_of(root, run), settings.max_latency_ms, at_most=True),
    )
    decision = decide(
        candidate, rival, gated_metrics(recipe), date=run.date, against=published.name if published else "",
        margin=settings.margin, checks=checks, seed=recipe.seed,
    )  # fmt: skip
    if runtime.world_rank() == 0:
        write_decision(root, run, export, decision, data_figures(root, run, published))
    runtime.barrier()
    return decision


def write_decision(root: PublishRoot, run: NightlyRun, export: Path, decision: Decision, data: DataFigures) -> None:
    """Write ``gate.json`` into the nightly run and beside the weights, unless those are published already."""
    checks = [asdict(check) | {"passed": check.passed} for check in decision.checks]
    result: dict[str, Any] = {
        **asdict(decision), "checks": checks, "passed": decision.passed, "reasons": decision.reasons,
        "data": asdict(data),
    }  # fmt: skip
    write_json(root.run_dir(run.date) / GATE_FILE, result)
    if export != root.version(run.date):  # a version is sealed
        write_json(export / GATE_FILE, result)


def data_figures(root: PublishRoot, run: NightlyRun, published: Path | None) -> DataFigures:
    """Freshness and drift of the run's data against those of the published version."""
    earlier = root.recorded_run(published.name) if published else None
    elsewhere = Path(earlier.data) if earlier is not None and earlier.data != run.data else None
    before = published / POPULARITY_FILE if published else None
    return figures(load_dataset(Path(run.data)), run.date, before=before, data_before=elsewhere)


def codes_of_rival(
    recipe: Recipe, run: NightlyRun, root: PublishRoot, published: Path, codes: Path | None
) -> Path | None:
    """The index file with which the published version is evaluated on the run's rows. Collective.

    A version has codes for new items, by its own codebooks, before it is trained on them. They are those of the run
    where the run grew this version's index.
    """
    if codes is None or (run.start and Path(run.start).resolve() == published):
        return codes
    out = root.run_dir(run.date) / "gate" / f"published_{published.name}.{CODES_FOLDER}"
    return runtime.on_rank_0(lambda: make_codes(recipe, Path(run.data), str(published), out))


def evaluate_export(
    recipe: Recipe, run: NightlyRun, root: PublishRoot, export: Path, name: str, codes: Path | None, *,
    timed: bool = False,
) -> EvalResult:  # fmt: skip
    """Evaluate an exported model, as it will be served, on the run's valid rows (once), and time it if asked."""
    directory = root.run_dir(run.date) / "gate" / name
    evaluated = runtime.on_rank_0(lambda: (directory / "eval" / f"{SPLIT}.json").is_file())
    clocked = not timed or runtime.on_rank_0(lambda: (directory / LATENCY_FILE).is_file())
    if not (evaluated and clocked):
        own_recipe = run_recipe(recipe, replace(run, start=str(export)), root, codes)
        tail = {int(metric.partition("@")[2]) for metric in gated_metrics(recipe)}
        measured = replace(recipe.eval, splits=[SPLIT], ks=sorted({*recipe.eval.ks, *tail}))
        gate_recipe = replace(own_recipe, run_dir=str(directory), eval=measured)
        open_run_dir(gate_recipe, same_recipe=False)
        world = build_world(gate_recipe, directory, Path(run.data), codes_path=codes)
        engine = engine_of(world)
        if not evaluated:
            evaluate_stage(world, directory, engine)
        if not clocked:
            measure_latency(world, engine, directory / LATENCY_FILE)
    return EvalResult.read(directory / "eval", SPLIT)


def measure_latency(world: World, engine: Engine, file: Path) -> None:
    """Write the 50th and 95th percentile, in milliseconds, of searches for single valid prompts. Collective."""
    prompts = world.samples[SPLIT].prompts
    engine.receive_weights()
    beams = min(world.recipe.eval.beams, world.catalog.trie.num_leaves)
    rows: Sequence[int] = np.linspace(0, len(prompts) - 1, min(TIMED, len(prompts))).astype(int).tolist()
    seconds = []
    for row in [*rows[:WARM_UP], *rows]:
        begun = time.perf_counter()
        engine.search(prompts.take(np.array([row])), beams)
        seconds.append(time.perf_counter() - begun)
    p50, p95 = np.percentile(np.array(seconds[min(WARM_UP, len(rows)) :]) * 1000, [50, 95])
    if runtime.world_rank() == 0:
        write_json(file, {"p50_ms": float(p50), "p95_ms": float(p95), "searches": len(rows), "beams": beams})
    runtime.barrier()


def latency_of(root: PublishRoot, run: NightlyRun) -> float | None:
    """The candidate's 95th percentile in milliseconds; None where it was not measured."""
    file = root.run_dir(run.date) / "gate" / "candidate" / LATENCY_FILE
    return float(json.loads(file.read_text(encoding="utf-8"))["p95_ms"]) if file.is_file() else None
