"""A published version: one folder with weights, tokenizer, catalog, codes and item numbers, and checksums of all of it.

    ROOT/versions/DATE/   an export (``run.exported``) with
        version.json      date, the version before, SHA-256 of every other file
        gate.json         the decision that let it pass
        items.jsonl       every item that ROOT ever had, in the order of their numbers: external_id, title, codes
        popularity.parquet, columns.parquet   interactions per item in training; the items' further columns
        index/            the semantic-ID index of ``tokenize`` (catalog.kind=sid): the next night grows it
    ROOT/latest           symbolic link to one of them: the live version

A version gets its name by one rename after everything in it is written, and the link is replaced by a rename: whoever
follows the link finds a whole version, the old one or the new one.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tawin_nemo.config.schema import Recipe
from tawin_nemo.util.errors import CheckpointError, ConfigError, DataError
from tawin_nemo.util.files import sha256, write_json

FORMAT = "tawin_nemo.version/1"
LATEST, VERSIONS = "latest", "versions"
VERSION_FILE, GATE_FILE, ITEMS_FILE = "version.json", "gate.json", "items.jsonl"
POPULARITY_FILE, INDEX_FOLDER = "popularity.parquet", "index"


def live_version(root: Path) -> Path | None:
    """The folder that ``ROOT/latest`` points at; None before the first publication.

    Raises DataError when ``latest`` is no link, or points at nothing.
    """
    latest = root / LATEST
    if not os.path.lexists(latest):
        return None
    if not latest.is_symlink() or not latest.is_dir():
        raise DataError(f"{latest} must be a symbolic link to a folder in {root / VERSIONS}; mend it")
    return latest.resolve()


def starting_version(recipe: Recipe) -> Recipe:
    """The recipe with ``checkpoint`` set to the version that ``serve.follow``/latest points at; else unchanged.

    Raises ConfigError beside another checkpoint, and before the first publication.
    """
    root = recipe.serve.follow
    if not root:
        return recipe
    latest = Path(root) / LATEST
    live = live_version(Path(root))
    if recipe.start or (recipe.checkpoint and Path(recipe.checkpoint).resolve() != live):
        raise ConfigError(
            f"serve.follow={root} serves the version that {latest} points at; leave out checkpoint and start"
        )
    if recipe.serve.catalogue:
        raise ConfigError(f"serve.follow={root} serves the catalog of each version; leave out serve.catalogue")
    if live is None:
        raise ConfigError(f"serve.follow={root}: there is no {latest} yet; publish a version with `tawin-nemo retrain`")
    return replace(recipe, checkpoint=str(live))


def seal(folder: Path, *, date: str, against: str) -> None:
    """Write ``version.json`` with the checksum of every file of ``folder``, at any depth; the last file of a version.

    ``against``: the date of the version that was live when this one was judged; empty = there was none.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {name: sha256(folder / name) for name in names if name != VERSION_FILE}
    write_json(folder / VERSION_FILE, {"format": FORMAT, "date": date, "against": against, "files": files})


def read_version(folder: Path) -> dict[str, Any]:
    """The content of ``version.json``. Raises CheckpointError when it is missing, unreadable or of another format."""
    path = folder / VERSION_FILE
    try:
        about = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no published version: {path.name} cannot be read ({error})") from error
    if about.get("format") != FORMAT or not isinstance(about.get("files"), dict):
        raise CheckpointError(f"{path} has format {about.get('format')!r}, expected {FORMAT!r}; publish it again")
    return about


def check_version(folder: Path) -> dict[str, Any]:
    """Read every file of a version and compare its checksum; returns the content of ``version.json``.

    Raises CheckpointError that names the first file that is missing, damaged or edited.
    """
    about = read_version(folder)
    for name, expected in about["files"].items():
        try:
            actual = sha256(folder / name)
        except OSError as error:
            raise CheckpointError(
                f"{folder / name} cannot be read ({error.strerror}); the version is broken"
            ) from error
        if actual != expected:
            raise CheckpointError(f"{folder / name} is damaged or was edited; the version is broken")
    return about
