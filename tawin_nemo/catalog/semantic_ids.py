"""Semantic IDs: the JSON index ``{"0": ["<a_12>", "<b_3>", "<c_77>"], ...}`` that RQ-VAE and RQ-k-means tools write."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import median_low
from typing import Any

from tawin_nemo.util.errors import CatalogError, ConfigError


def find_codes(root: Path, index: str, *, key: str = "catalog.index") -> Path:
    """The index file: absolute, or below ``root``; a ``*`` in its name must match exactly one file.

    Raises ConfigError, naming ``key`` and the code files in the folder, if there is no such file or more than one.
    """
    path = root / index  # an absolute index stays as it is
    matches = sorted(path.parent.glob(path.name)) if "*" in path.name else [path][: path.is_file()]
    if len(matches) == 1:
        return matches[0]
    there = ", ".join(sorted(other.name for other in path.parent.glob("*index*.json"))) or "none"
    what = f"{len(matches)} files match" if matches else "no file"
    raise ConfigError(f"{key}={index}: {what} {path}; code files there: {there}. Set {key} to one")


def load_codes(path: Path, num_items: int) -> list[list[str]]:
    """Codes of items 0 .. num_items - 1; some items may have one code more or less than most, and items may share all.

    Raises CatalogError that lists items without codes, keys that are no item, items named twice, items whose codes are
    not a list of non-empty strings without white space, and items with far more or fewer codes than the others.
    """
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except (OSError, ValueError) as error:
        raise CatalogError(f"cannot read the semantic-ID index {path}: {error}") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise CatalogError(f"{path} must hold one JSON object {{item: [codes]}}")
    names = [str(item) for item in range(num_items)]
    known, seen = set(names), Counter(key for key, _ in pairs)
    depth = {key: len(codes) for key, codes in pairs if _well_formed(codes)}
    usual = median_low(depth.values()) if depth else 0
    problems = {
        "have no codes": [name for name in names if name not in seen],
        f"are not items of 0 .. {num_items - 1}": [key for key in seen if key not in known],
        "are named twice": [key for key, count in seen.items() if count > 1],
        "have codes that are not a list of words": [key for key, codes in pairs if not _well_formed(codes)],
        f"have another number of codes than {usual}, or one more or less": [
            key for key, codes in depth.items() if abs(codes - usual) > 1
        ],
    }
    messages = [f"{len(keys)} {problem}: {_shorten(keys)}" for problem, keys in problems.items() if keys]
    if messages:
        raise CatalogError(f"{path} does not fit the catalog of {num_items} items; {'; '.join(messages)}")
    codes_of = dict(pairs)
    return [codes_of[name] for name in names]


def _well_formed(codes: Any) -> bool:
    return (
        isinstance(codes, list)
        and len(codes) > 0
        and all(isinstance(code, str) and code and not any(map(str.isspace, code)) for code in codes)
    )


def _shorten(keys: list[str], shown: int = 5) -> str:
    return ", ".join(map(repr, keys[:shown])) + (" ..." if len(keys) > shown else "")
