"""The verbs of the command line: one sentence each, and a page for ``tawin-nemo VERB --help``. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """What ``--help`` says of one verb."""

    summary: str  # one line of the list of verbs
    detail: str = ""  # what a user has to know beyond it
    sections: tuple[str, ...] = ()  # sections of the recipe that it reads; ("",) = the keys without a section
    examples: tuple[str, ...] = ()
    result: str = ""  # the JSON object on the last line of stdout


_DATA = ("data", "prepare", "catalog")
_MODEL = ("model", "trainer")
_TRAINED = (
    "It uses checkpoint=RUN_DIR/STAGE or one step_N; without that key the newest finished stage of the recipe's run,\n"
    "else the model of start= or model.init=. Tokenizer, catalog and data are those of the checkpoint's own run.\n"
    "Without --recipe, RUN_DIR/recipe.yaml is read."
)

VERBS = {
    "prepare": Verb(
        "raw reviews -> 5-core, chronological samples in Parquet, with manifest and statistics",
        "A folder that was prepared from the same files with the same keys is reused. data.dataset=auto looks at what\n"
        "lies in data.root; data.dataset=synthetic generates a log. data_prep/README.md shows every input format.",
        _DATA,
        (
            "prepare --recipe recipes/quickstart.yaml",
            "prepare data.root=DIR prepare.reviews=Toys.json.gz prepare.metadata=meta_Toys.json.gz run_dir=runs/toys",
            "prepare data.root=DIR prepare.columns.user=customer prepare.columns.item=sku run_dir=runs/shop",
        ),
        '{"prepared": folder}',
    ),
    "tokenize": Verb(
        "item texts -> semantic IDs: vectors, codes, index.json for catalog.index, report and picture",
        "The folder holds index.json, report.json (collisions, dead codes, reconstruction) and codes.png; a folder of\n"
        "the same texts and keys is reused, a stopped one continues.",
        (*_DATA, "semantic_ids"),
        ("tokenize --recipe recipes/quickstart.yaml semantic_ids.method=constrained",),
        '{"index": file, "report": {...}}',
    ),
    "train": Verb(
        "SFT, then TAWin reinforcement learning, evaluation and report.html (resumes by itself)",
        "The same command starts, continues and completes a run; a finished one is only reported. --dry-run prepares\n"
        "the data, checks every stage and prints rows, steps and sizes. Several processes on this machine:\n"
        "trainer.devices=N; on several machines: torchrun or srun (slurm/README.md).",
        ("", *_DATA, *_MODEL, "sft", "align", "rl", "rollout", "reference", "compare", "eval", "baseline"),
        (
            "train --recipe recipes/quickstart.yaml rl.tawin.target_k=5 seed=1",
            "train --recipe recipes/industrial_sid_cpu.yaml data.root=DIR --dry-run",
        ),
        '{STAGE: {"recall@1": ...}, "invalid_rate": 0.0, "wall_s": s, "run_dir": folder, "final_stage": STAGE}',
    ),
    "evaluate": Verb(
        "Recall@K and NDCG@K of a checkpoint on valid and test, with 95 % intervals",
        _TRAINED,
        ("", "eval", "data", *_MODEL),
        (
            "evaluate --recipe recipes/quickstart.yaml",
            "evaluate checkpoint=runs/quickstart/sft eval.beams=100 eval.splits=test",
        ),
        '{"checkpoint": path, SPLIT: {"recall@1": ..., "intervals": {...}, "rows": n, "invalid_rate": 0.0}}',
    ),
    "generate": Verb(
        "recommendations for some histories, as catalog items",
        _TRAINED,
        ("", "generate", "eval", *_MODEL),
        ("generate --recipe recipes/quickstart.yaml generate.history=3,17 generate.n=5",),
        '{"recommendations": [{"history": [title], "items": [{"item": i, "external_id": id, "score": s}]}]}',
    ),
    "recommend": Verb(
        "lists of the best items for many users (Parquet -> Parquet), in parts, resumable, over processes and arrays",
        "recommend.histories is Parquet with user_id and item_ids (external ids, oldest first); without it, those of\n"
        "the prepared data are used. recommend.output gets part-000000.parquet ...: user_id, item_ids (best first),\n"
        "scores. Parts are written whole or not at all: the same command goes on after a stop, and refuses a folder\n"
        "of other weights, catalog, rows or keys. A part has the same bytes whoever makes it: trainer.devices=N\n"
        "processes here, or the tasks of `sbatch --array=0-9` (recommend.shard_count). --dry-run checks all histories\n"
        "and counts the parts.\n" + _TRAINED,
        ("", "recommend", "eval", "rollout", *_MODEL),
        (
            "recommend --recipe recipes/quickstart.yaml recommend.n=20 recommend.exclude_history=true",
            "recommend checkpoint=runs/shop/rl recommend.histories=users/ recommend.output=lists trainer.devices=8",
            "recommend checkpoint=runs/shop/rl recommend.histories=users/ recommend.filter=[brand=Acme] --dry-run",
        ),
        '{"output": folder, "rows": n, "parts": n, "parts_made": n, "rows_per_s": r, "complete": true, ...}',
    ),
    "convert": Verb(
        "a checkpoint -> Hugging Face directory (import: model.init=DIR)",
        _TRAINED,
        ("", "convert", *_MODEL),
        ("convert --recipe recipes/quickstart.yaml convert.output=export",),
        '{"exported": folder, "checkpoint": path}',
    ),
    "score": Verb(
        "recommendation lists of another program (Parquet, CSV, JSON lines) -> the same metrics and paired tests",
        "Columns: item_id (external id) with rank or score, one line per item; or item_ids, one list per line, best\n"
        "first. A list belongs to a row of the split: column row (0-based), or user_id where users have one row each.\n"
        "The split is the last one of eval.splits. A result in RUN_DIR is shown in that run's report.",
        ("score", "eval", *_DATA),
        (
            "score --recipe recipes/quickstart.yaml score.lists=recbole.csv",
            "score data.root=DIR score.lists=lists.parquet score.against=runs/quickstart/rl run_dir=runs/quickstart",
        ),
        '{"scored": folder, SPLIT: {"recall@1": ..., "intervals": {...}}, "minus": {...}, "unknown_items": n}',
    ),
    "retrain": Verb(
        "a night: prepare, train from the published model, export, gate on valid, publish (retrain.root=DIR)",
        "A model that is worse than the published one is refused (exit code 3) and what is published stays. With\n"
        "catalog.kind=sid the codes of the published version grow by those of new items. `retrain list` shows the\n"
        "versions, `retrain rollback` makes the one before live again (or that of retrain.date), `retrain prune`\n"
        "removes old ones (retrain.keep). `serve serve.follow=DIR` serves what is live.",
        ("retrain", *_DATA, *_MODEL, "sft", "rl", "eval", "semantic_ids"),
        (
            "retrain --recipe recipes/quickstart.yaml retrain.root=production retrain.date=2018-06-30",
            "retrain list retrain.root=production",
            "retrain rollback retrain.root=production",
            "retrain prune retrain.root=production retrain.keep=7",
        ),
        '{"date": day, "published": true, "gate": file, "latest": folder}',
    ),
    "serve": Verb(
        "recommendations over HTTP: a data plane for users, a control plane for weights and catalog",
        _TRAINED,
        ("", "serve", "eval", "rollout", *_MODEL),
        ("serve --recipe recipes/quickstart.yaml serve.port=8000",),
        '{"served": requests, "weight_version": n, "catalog_version": n} when it ends',
    ),
    "study": Verb("arms x seeds of one recipe, one process per run, then paired tests, tables and plots"),
    "plan": Verb("memory per GPU, step time and the best TP/PP/DP of a recipe on a cluster, without one"),
    "simulate": Verb(
        "which WPAUC window goes with Recall@K: Figure 3 as PNG and JSON (trials= seed= output=, no recipe)",
        examples=("simulate trials=1000 seed=0 output=figure3",),
    ),
    "doctor": Verb(
        "checks this machine and, with a recipe, whether that recipe can run here (--quick: the fast checks)",
        "With checkpoint=DIR (a stage, a step_N, or a Hugging Face directory and the keys of its data) it checks the\n"
        "model: the share of free answers that name no item, collisions, dead codes, recall against the most popular\n"
        "items, and the recall of unpopular items. Exit code 2 when a check fails; every line names the remedy.",
        examples=(
            "doctor --recipe recipes/quickstart.yaml",
            "doctor --quick",
            "doctor checkpoint=runs/quickstart/rl",
        ),
        result='{"can_run": ..., "checks": [...]}; of a model {"checkpoint": path, "recall@10": ..., "checks": [...]}',
    ),
    "keys": Verb(
        "list recipe keys with their meaning, limits and default; --schema: as JSON Schema for editors",
        examples=("keys", "keys rl.tawin", "keys --schema > recipe.schema.json"),
    ),
}

EXIT_CODES = """\
Exit codes: 0 done, 2 a mistake you can mend (the message says how), 75 out of trainer.max_time, or stopped by SIGTERM
or SIGUSR1 after a save (run it again), 1 a fault (with its traceback), 3 retrain's gate refused the model: what is
published stays."""


def page(name: str) -> str:
    """The text of ``tawin-nemo NAME --help`` below the usage line."""
    verb = VERBS[name]
    parts = [f"{name}: {verb.summary}"]
    if verb.detail:
        parts.append(verb.detail)
    if verb.sections:
        named = ", ".join(section or "keys without a section" for section in verb.sections)
        parts.append(f"sections of the recipe that it reads (tawin-nemo keys SECTION lists them):\n  {named}")
    if verb.examples:
        parts.append("examples:\n" + "\n".join(f"  tawin-nemo {example}" for example in verb.examples))
    if verb.result:
        parts.append(f"last line of stdout:\n  {verb.result}")
    return "\n\n".join([*parts, EXIT_CODES])
