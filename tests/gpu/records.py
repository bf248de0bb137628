"""Committed runs of this folder (``recipes/results/gpu_*.json``) and what they show."""

from __future__ import annotations

import json
from pathlib import Path

from tawin_nemo.models.megatron.model.precision import FP8

RECORDS = Path(__file__).resolve().parents[2] / "recipes" / "results"


def verified_precisions(records: Path = RECORDS) -> frozenset[str]:
    """FP8 precisions whose training part passed in a ``gpu_*.json``; dry runs and unreadable files do not count."""
    passed: set[str] = set()
    for path in sorted(records.glob("gpu_*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            parts = {} if record["dry_run"] else record["parts"]
            passed |= {name.removeprefix("train_") for name, part in parts.items() if part["status"] == "passed"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return frozenset(passed & FP8.keys())
