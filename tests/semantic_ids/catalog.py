"""Small prepared folders with item texts, for tests of the tokenizer of items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from tawin_nemo.data.interactions import Split
from tawin_nemo.data_prep.dataset import Prepared, write_dataset
from tawin_nemo.types import SPLITS, TokenRows

KINDS = ("hex bolt", "nitrile glove", "digital caliper", "safety goggle", "sanding disc", "pipe wrench")
BRANDS = ("Acme", "Bolton", "Cortex", "Delta")


def titles(items: int) -> list[str]:
    """Item i is of kind i % 6; every title differs."""
    sizes = np.random.default_rng(1).integers(1, 40, items)
    return [f"{KINDS[i % 6]} {sizes[i]} mm model {i}" for i in range(items)]


def prepared(folder: Path, names: list[str], *, ids: list[str] | None = None) -> Path:
    """A prepared folder whose items have these titles; every third has no description, brand = kind."""
    count = len(names)
    frame = pl.DataFrame(
        {
            "item": range(count),
            "external_id": ids or [f"B{i:03d}" for i in range(count)],
            "title": names,
            "description": ["" if i % 3 == 0 else f"['{names[i]} to go', 'steel &amp; more']" for i in range(count)],
            "brand": [BRANDS[i % 4] for i in range(count)],
            "category": [KINDS[i % 6] for i in range(count)],
        },
        schema_overrides={"item": pl.Int64},
    )  # fmt: skip
    splits, row = {}, 0
    for split, rows in zip(SPLITS, (24, 3, 4), strict=True):
        target_N = np.arange(row, row + rows) % count
        history = TokenRows.from_lists([[int(target + 1) % count] for target in target_N])
        splits[split] = Split(np.arange(row, row + rows), history, target_N, np.arange(row, row + rows))
        row += rows
    return write_dataset(Prepared("Shop", "inter", frame, splits, 10, []), folder, {"made": "by a test"})
