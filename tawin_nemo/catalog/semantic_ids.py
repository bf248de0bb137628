"""Semantic IDs: the JSON index ``{"0": ["<a_12>", "<b_3>", "<c_77>"], ...}`` that RQ-VAE and RQ-k-means tools write."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

from tawin_nemo.catalog.item_names import named, shorten
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


def load_codes(path: Path, external_ids: Sequence[str]) -> list[list[str]]:
    """Codes of the items with ``external_ids``; some may have one code more or less than most, several may share all.

    Codes belong to external ids, never to a position. The keys of the index are external ids, or numbers that a file
    ``items.json`` beside it (a JSON list of external ids, number 0 first) explains. Numbers alone are accepted only
    where the items of the catalog are named by their numbers, as in MiniOneRec's data.

    Raises CatalogError that lists items without codes, keys that are no item, items named twice, items whose codes are
    not a list of non-empty strings without white space, and items with far more or fewer codes than the others; also
    for an index of numbers that nothing explains.
    """
    pairs = named(path, _pairs(path), external_ids, "codes")
    known, seen = set(external_ids), Counter(key for key, _ in pairs)
    depth = {key: len(codes) for key, codes in pairs if _well_formed(codes)}
    usual = median_low(depth.values()) if depth else 0
    problems = {
        "have no codes": [name for name in external_ids if name not in seen],
        "are not in the catalog": [key for key in seen if key not in known],
        "are named twice": [key for key, count in seen.items() if count > 1],
        "have codes that are not a list of words": [key for key, codes in pairs if not _well_formed(codes)],
        f"have another number of codes than {usual}, or one more or less": [
            key for key, codes in depth.items() if abs(codes - usual) > 1
        ],
    }
    messages = [f"{len(keys)} {problem}: {shorten(keys)}" for problem, keys in problems.items() if keys]
    if messages:
        raise CatalogError(f"{path} does not fit the catalog of {len(external_ids)} items; {'; '.join(messages)}")
    codes_of = dict(pairs)
    return [codes_of[name] for name in external_ids]


def _pairs(path: Path) -> list[tuple[str, Any]]:
    """Keys and codes of an index file as they stand there, double keys included."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except (OSError, ValueError) as error:
        raise CatalogError(f"cannot read the semantic-ID index {path}: {error}") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise CatalogError(f"{path} must hold one JSON object {{item: [codes]}}")
    return pairs


def _well_formed(codes: Any) -> bool:
    return (
        isinstance(codes, list)
        and len(codes) > 0
        and all(isinstance(code, str) and code and not any(map(str.isspace, code)) for code in codes)
    )
