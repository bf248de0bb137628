"""The verb tokenize: item texts -> vectors -> codes -> a folder with index.json, its provenance and its quality."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.catalog.semantic_ids import find_codes
from tawin_nemo.config.schema import Recipe, SemanticIdsConfig
from tawin_nemo.data.interactions import BRAND, CATEGORY, ITEMS_FILE, MANIFEST, Dataset, load_dataset
from tawin_nemo.run.datasets import run_dir_of
from tawin_nemo.semantic_ids.clustering import check_enough_items
from tawin_nemo.semantic_ids.codebooks import mean_codebooks
from tawin_nemo.semantic_ids.coder import WITH_NETWORK, ItemCoder, fit, resolve_collisions
from tawin_nemo.semantic_ids.collisions import format_items
from tawin_nemo.semantic_ids.encoders import copy_encoder_files, embed, item_texts
from tawin_nemo.semantic_ids.growth import CODES, DEPARTED, FORMAT, ITEMS, ExistingIndex, Tokenized, is_finished
from tawin_nemo.semantic_ids.index_files import read_index, write_index, write_info
from tawin_nemo.semantic_ids.report import IndexReport, measure, plot_index, word_sets
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import atomic_directory, sha256, write_json
from tawin_nemo.util.log import say

INDEX, INFO, REPORT, PICTURE = "index.json", "info.txt", "report.json", "codes.png"


def tokenize(recipe: Recipe, root: Path) -> dict[str, Any]:
    """Make (or reuse) the index of the prepared folder ``root``; returns the result that the command line prints.

    Raises ConfigError and DataError for whatever cannot be used, naming keys or items.
    """
    cfg, out = recipe.semantic_ids, output_of(recipe)
    dataset = load_dataset(root)
    if not dataset.has_titles and cfg.text.encoder != "file" and not cfg.given and cfg.method != "random":
        raise DataError(
            "the data have no item file, so there are no texts to embed; name one with prepare.metadata=FILE, or set "
            "semantic_ids.text.encoder=file"
        )
    vectors = vectors_of(out)
    existing = ExistingIndex.read(Path(cfg.grow_from)) if cfg.grow_from else None
    if existing:
        cfg = existing.settings(cfg)
    seed = existing.seed if existing else recipe.seed
    if not (existing or cfg.given or cfg.method == "random"):
        check_enough_items(len(dataset.items.titles), cfg.codes)  # before the texts are embedded, which may take hours
    texts = item_texts(dataset.items.titles, dataset.items.descriptions, cfg.text.fields)
    like = existing.folder if existing else None
    embeddings = embed(texts, cfg.text, vectors, seed=seed, like=like, external_ids=dataset.items.external_ids)
    request = _request(cfg, seed, dataset, embeddings.manifest, existing, root)
    if is_finished(out, request):
        say(f"{out} holds this index already; reused")
        return _result(out)
    _look_for_duplicates(embeddings.vectors_ID, cfg)
    if existing:
        made = existing.extend(dataset.items.external_ids, embeddings.vectors_ID)
    else:
        made = _made(embeddings.vectors_ID, dataset.items.external_ids, cfg, seed, root, out)
    report = measure(
        made.codes_IL,
        made.coder.books.levels,
        embeddings.vectors_ID,
        test_target_N=dataset.test.target_N,
        read_ID=made.coder.decode(made.codes_IL),
        words=brand_and_category_words(root),
        seed=seed,
    )
    _write(out, made, cfg, dataset, embeddings.vectors_ID, vectors, report, request)
    checkpoint_of(out).unlink(missing_ok=True)
    return _result(out)


def output_of(recipe: Recipe) -> Path:
    """The folder of the index: ``semantic_ids.output``, or RUN_DIR/semantic_ids where that is empty."""
    return Path(recipe.semantic_ids.output) if recipe.semantic_ids.output else run_dir_of(recipe) / "semantic_ids"


def vectors_of(out: Path) -> Path:
    """The folder of the item vectors, beside that of the index."""
    return out.with_name(f"{out.name}.vectors")


def _made(
    x_ID: np.ndarray, external_ids: Sequence[str], cfg: SemanticIdsConfig, seed: int, root: Path, out: Path
) -> Tokenized:
    if cfg.given:
        index = read_index(find_codes(root, cfg.given, key="semantic_ids.given"), external_ids)
        base_IL = index.codes_IL[:, : index.levels]
        return Tokenized(index.codes_IL, ItemCoder("given", mean_codebooks(x_ID, base_IL, int(base_IL.max()) + 1)))
    checkpoint = checkpoint_of(out) if cfg.method in WITH_NETWORK else None
    coder, codes_IL = fit(x_ID, cfg, seed=seed, checkpoint=checkpoint)
    return Tokenized(resolve_collisions(codes_IL, coder, x_ID, cfg.collisions), coder)


def checkpoint_of(out: Path) -> Path:
    """Where the training of a network for the index ``out`` continues after it was stopped."""
    return out.with_name(f"{out.name}.checkpoint.pt")


def brand_and_category_words(root: Path) -> list[frozenset[str]]:
    """Words of each item's brand and category in a prepared folder; empty where both are."""
    path = root / ITEMS_FILE
    names = [name for name in (BRAND, CATEGORY) if name in pl.read_parquet_schema(path)]
    table = pl.read_parquet(path, columns=names).fill_null("")
    return word_sets([" ".join(row) for row in table.iter_rows()] if names else [])


def _look_for_duplicates(x_ID: np.ndarray, cfg: SemanticIdsConfig) -> None:
    """Warn about items with equal vectors, which their vectors cannot distinguish, or reject them.

    Raises DataError with ``semantic_ids.duplicates=refuse``.
    """
    alike: defaultdict[bytes, list[int]] = defaultdict(list)
    for item, row in enumerate(x_ID):
        alike[row.tobytes()].append(item)
    groups = [items for items in alike.values() if len(items) > 1]
    if not groups:
        return
    shown = "; ".join(format_items(np.array(items)) for items in groups[:5])
    message = (
        f"{sum(map(len, groups))} items have the vector of another item ({len(groups)} groups, e.g. items {shown})"
    )
    if cfg.duplicates == "refuse":
        raise DataError(
            f"semantic_ids.duplicates=refuse: {message}; merge them, or set semantic_ids.duplicates=separate"
        )
    say(message)


def _request(
    cfg: SemanticIdsConfig,
    seed: int,
    dataset: Dataset,
    vectors: dict[str, Any],
    existing: ExistingIndex | None,
    root: Path,
) -> dict[str, Any]:
    """All that decides about the codes."""
    settings = asdict(replace(cfg, output="", grow_from=""))
    del settings["text"], settings["rqvae"]["save_interval"]
    return {
        "settings": settings,
        "seed": seed,
        "data": dataset.manifest["files"][ITEMS_FILE],
        "test": dataset.manifest["files"]["test.parquet"],
        "vectors": {"maker": vectors["maker"], "files": vectors["files"]},
        "given": sha256(find_codes(root, cfg.given, key="semantic_ids.given")) if cfg.given else None,
        "grown_from": existing.manifest["files"] if existing else None,
    }


def _write(
    out: Path, made: Tokenized, cfg: SemanticIdsConfig, dataset: Dataset, x_ID: np.ndarray, vectors: Path,
    report: IndexReport, request: dict[str, Any],
) -> None:  # fmt: skip
    levels = made.coder.books.levels
    with atomic_directory(out) as folder:
        write_index(folder / INDEX, made.codes_IL, cfg.layout)
        if cfg.layout == "minionerec":
            write_info(folder / INFO, made.codes_IL, dataset.items.titles)
        np.save(folder / CODES, made.codes_IL)
        made.coder.save(folder)
        copy_encoder_files(vectors, folder)
        (folder / ITEMS).write_text(json.dumps(dataset.items.external_ids) + "\n", encoding="utf-8")
        if made.departed:
            write_json(folder / DEPARTED, made.departed)
        write_json(folder / REPORT, asdict(report) | {"kept_items": made.kept})
        plot_index(
            folder / PICTURE, x_ID, made.codes_IL, levels, title=f"{dataset.manifest['name']}: {made.coder.method}"
        )
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, {"format": FORMAT, "request": request, "text": asdict(cfg.text), "files": files})


def _result(out: Path) -> dict[str, Any]:
    report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    say(
        f"{report['distinct']} different IDs for {report['items']} items, "
        f"{' / '.join(str(level['used']) for level in report['levels'])} codes used; see {out / REPORT}"
    )
    return {"index": str((out / INDEX).resolve()), "report": report}
