"""Every method of `tawin-nemo tokenize` on the real Industrial items, beside the two published indexes.

    python -m tests.benchmarks.semantic_id_table --encoder minilm --json FILE

Methods run with three seeds. Errors are squared distances as a share of the vectors' variance. `error` is that of the
method's own decoder after collisions are dealt with, `error before` the one before that. Published indexes have no
decoder here, and were made from other vectors: `refit` (``semantic_ids/measure.py``) compares any codes on these.
The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from tawin_nemo.commands.tokenize import brand_and_category_words
from tawin_nemo.config.schema import DataConfig, PrepareConfig, RqVaeConfig, SemanticIdsConfig, TextConfig
from tawin_nemo.data.interactions import Dataset, load_dataset
from tawin_nemo.data_prep.prepare import prepare
from tawin_nemo.semantic_ids.coder import ItemCoder, fit, resolve_collisions
from tawin_nemo.semantic_ids.collisions import groups_of
from tawin_nemo.semantic_ids.encoders import embed, item_texts
from tawin_nemo.semantic_ids.index_files import read_index
from tawin_nemo.semantic_ids.report import measure, relative_error
from tests.benchmarks.harness import _git, rounded, table
from tests.benchmarks.setting import shared_folder

NAME = "Industrial_and_Scientific"
PUBLISHED = {"MiniOneRec": "minionerec", "MiniOneRec, constrained": "rqkmeans_constrained"}
TEXT = {
    "tfidf": TextConfig(dims=256),
    "minilm": TextConfig(encoder="minilm", max_tokens=128, precision="bf16", shard_items=512),
}
BASE = SemanticIdsConfig()
#: Row -> settings. The networks are small beside 3,686 items, so that they get more epochs in smaller batches.
METHODS = {
    "residual k-means, shared IDs": replace(BASE, collisions="keep"),
    "residual k-means": BASE,
    "constrained": replace(BASE, method="constrained", kmeans_iterations=12),
    "RQ-k-means+": replace(BASE, method="rqkmeans_plus", rqvae=RqVaeConfig(widths=[512], epochs=40, batch_size=256)),
    "RQ-VAE": replace(BASE, method="rqvae", rqvae=RqVaeConfig(epochs=150, batch_size=256)),
    "random codes": replace(BASE, method="random"),
}
OURS = "RQ-k-means+"
#: Settings and seed -> what they gave, within one run of this program.
FITTED: list[tuple[tuple[SemanticIdsConfig, int], tuple[ItemCoder, np.ndarray]]] = []


def rows_of(
    name: str, cfg: SemanticIdsConfig, x_ID: np.ndarray, dataset: Dataset, words: list[frozenset[str]], seeds: list[int]
) -> list[dict[str, Any]]:
    """One row per seed; rows that differ in how they deal with collisions share one fit."""
    rows = []
    for seed in seeds:
        begin = time.perf_counter()
        key = (replace(cfg, collisions="keep"), seed)
        fitted = next((found for known, found in FITTED if known == key), None) or fit(x_ID, cfg, seed=seed)
        FITTED.append((key, fitted))
        coder, raw_IL = fitted
        codes_IL = resolve_collisions(raw_IL, coder, x_ID, cfg.collisions)
        seconds = time.perf_counter() - begin
        target_N, read_ID = dataset.test.target_N, coder.decode(codes_IL)
        report = measure(codes_IL, cfg.levels, x_ID, test_target_N=target_N, read_ID=read_ID, words=words, seed=seed)
        error = rounded(relative_error(x_ID, coder.decode(raw_IL)))
        before = {"distinct_before": len(groups_of(raw_IL)), "error_before": error}
        rows.append({"method": name, "seed": seed, "seconds": round(seconds, 1), **before, "report": asdict(report)})
        print(f"{name}, seed {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return rows


def published_rows(
    source: Path, x_ID: np.ndarray, dataset: Dataset, words: list[frozenset[str]]
) -> list[dict[str, Any]]:
    rows = []
    for name, file in PUBLISHED.items():
        found = read_index(source / f"{NAME}.index.{file}.json", dataset.items.external_ids)
        target_N = dataset.test.target_N
        report = measure(found.codes_IL, found.levels, x_ID, test_target_N=target_N, words=words)
        rows.append({"method": name, "seed": None, "seconds": None, "report": asdict(report)})
    return rows


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: means over seeds, ``low..high`` where seeds differ in a count."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        reports = [row["report"] for row in own]
        lines.append(
            {
                "method": name,
                "distinct": _span([report["distinct"] for report in reports]),
                "three tokens": _span([report["distinct_without_dedup"] for report in reports]),
                "4th token": _span([report["items_with_more_tokens"] for report in reports]),
                "before": _span([row["distinct_before"] for row in own if "distinct_before" in row]),
                "codes used": " / ".join(
                    _span([report["levels"][level]["used"] for report in reports]) for level in range(3)
                ),
                "entropy, bits": " / ".join(
                    f"{mean(report['levels'][level]['entropy_bits'] for report in reports):.2f}" for level in range(3)
                ),
                "test rows shared": f"{100 * mean(report['shared_test_rows'] for report in reports):.1f} %",
                "trie": " / ".join(_span([report["prefixes"][depth] for report in reports]) for depth in range(2)),
                "error before": _mean([row["error_before"] for row in own if "error_before" in row]),
                "error": _mean([report["reconstruction_error"] for report in reports]),
                "refit": _mean([report["refit_error"] for report in reports]),
                "purity": _mean([report["purity"]["same_first_code"] for report in reports]),
            }
        )
    return lines


def _span(counts: list[int]) -> str:
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}..{high:,}"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.4f}" if known else ""


def goals(rows: list[dict[str, Any]], method: str = OURS) -> dict[str, dict[str, Any]]:
    """What ``method`` is to reach with every seed: value, goal, met."""
    own = [row["report"] for row in rows if row["method"] == method]
    plain = [row["report"]["reconstruction_error"] for row in rows if row["method"] == "residual k-means, shared IDs"]
    collisions = max(report["items"] - report["distinct"] for report in own)
    tokens = max(report["tokens_mean"] for report in own)
    used = min(level["used"] for report in own for level in report["levels"])
    ratio = mean(report["reconstruction_error"] for report in own) / mean(plain)
    return {
        "collisions": {"value": collisions, "goal": "= 0", "met": collisions == 0},
        "tokens of an item": {"value": tokens, "goal": "= 3", "met": tokens == 3},
        "codes used of 256, worst level and seed": {"value": used, "goal": ">= 250", "met": used >= 250},
        "error, times that of residual k-means with shared IDs": {
            "value": rounded(ratio), "goal": "<= 1.05", "met": ratio <= 1.05,
        },
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--encoder", choices=TEXT, default="tfidf")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--vectors", type=Path, help="folder that keeps the vectors of the texts (default: none)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file, too")
    given = options.parse_args()
    source = shared_folder("amazon18_industrial")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "data"
        prepare("inter", source, root, prepare=PrepareConfig(), data=DataConfig(), seed=0)
        dataset, words, text = load_dataset(root), brand_and_category_words(root), TEXT[given.encoder]
        texts = item_texts(dataset.items.titles, dataset.items.descriptions, text.fields)
        x_ID = embed(texts, text, given.vectors or Path(scratch) / "vectors", seed=0).vectors_ID
    rows = published_rows(source, x_ID, dataset, words)
    for name in given.methods:
        rows += rows_of(name, METHODS[name], x_ID, dataset, words, given.seeds)
        print(json.dumps(rows[-len(given.seeds) :]), file=sys.stderr, flush=True)
    print(table(shown(rows)))
    result = {
        "command": f"python -m tests.benchmarks.semantic_id_table --encoder {given.encoder}",
        "seeds": given.seeds,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain") else ""),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": platform.machine(),
        "text": asdict(text),
        "settings": {name: asdict(METHODS[name]) for name in given.methods},
        "goals": goals(rows) if {OURS, "residual k-means, shared IDs"} <= set(given.methods) else {},
        "rows": rows,
    }
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
