"""A trie on disk: one ``.npy`` per array and a manifest with their checksums and the tokenizer's fingerprint."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np

from tawin_nemo.catalog.trie_build import TrieArrays
from tawin_nemo.util.errors import CatalogError
from tawin_nemo.util.files import atomic_directory, sha256, write_json

_FORMAT = "tawin_nemo.token_trie/2"


def save_arrays(arrays: TrieArrays, folder: Path, tokenizer: str) -> None:
    """Write the folder whole or not at all; ``tokenizer`` is the fingerprint of what made the token ids."""
    names = [field.name for field in fields(TrieArrays)]
    with atomic_directory(folder) as temporary:
        for name in names:
            np.save(temporary / f"{name}.npy", getattr(arrays, name))
        checksums = {name: sha256(temporary / f"{name}.npy") for name in names}
        write_json(temporary / "manifest.json", {"format": _FORMAT, "tokenizer": tokenizer, "sha256": checksums})


def load_arrays(folder: Path, tokenizer: str) -> TrieArrays:
    """Memory-map a saved trie; raises CatalogError that names the file and the remedy if anything is amiss."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogError(f"{folder} holds no readable trie ({error}); build it again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != _FORMAT or not isinstance(manifest.get("sha256"), dict):
        raise CatalogError(f"{file} is of format {found!r}, not {_FORMAT!r}; build the trie again")
    if manifest.get("tokenizer") != tokenizer:
        raise CatalogError(
            f"{file}: the trie was made with tokenizer {manifest.get('tokenizer')!r}, not {tokenizer!r}, so its token "
            "ids mean something else; build it again, or use the tokenizer it was made with"
        )
    return TrieArrays(**{field.name: _load(folder, field.name, manifest["sha256"]) for field in fields(TrieArrays)})


def _load(folder: Path, name: str, checksums: dict[str, str]) -> np.ndarray:
    file = folder / f"{name}.npy"
    if not file.is_file():
        raise CatalogError(f"{file} is missing; remove {folder} and build the trie again")
    if sha256(file) != checksums.get(name):
        raise CatalogError(f"{file} does not match its checksum; remove {folder} and build the trie again")
    # Copy-on-write: pages stay shared, and torch can wrap the array without a warning about read-only memory.
    array: np.ndarray = np.load(file, mmap_mode="c")
    return array
