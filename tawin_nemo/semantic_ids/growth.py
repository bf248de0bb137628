"""New items under frozen codebooks: existing items keep their codes, new ones get unused codes.

I existing or all items, N new items, L code levels, D dimensions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tawin_nemo.config.schema import SemanticIdsConfig, TextConfig
from tawin_nemo.data.interactions import MANIFEST
from tawin_nemo.semantic_ids.coder import ItemCoder, random_codes
from tawin_nemo.semantic_ids.collisions import NO_TOKEN, FreeCodes, groups_of
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import sha256
from tawin_nemo.util.log import say


def encode_new_items(
    codes_IL: np.ndarray, coder: ItemCoder, x_ND: np.ndarray, how: str, *, seed: int = 0
) -> np.ndarray:
    """Codes of N new items, with as many columns as ``codes_IL`` (existing items) has.

    ``how`` is ``semantic_ids.collisions`` of the existing index. assign, sinkhorn: no two items share codes; items of
    one family get its free last codes as in ``collisions.assign_unique``. dedup: shared codes get the next
    numbers of the last column. keep: codes may be shared. Raises DataError naming an item (of ``x_ND``) for which
    no code is left, ConfigError for random codes that are too few.
    """
    if not len(x_ND):
        return codes_IL[:0]
    books = coder.books
    if coder.method == "random":
        new_NL = random_codes(len(x_ND), levels=books.levels, codes=books.codes, seed=seed, taken=codes_IL)
    else:
        new_NL = coder.encode(x_ND)
        if how == "dedup":
            new_NL = _numbered(codes_IL, new_NL)
        elif how != "keep":
            new_NL = FreeCodes(codes_IL, books).assign(new_NL, coder.latents(x_ND), np.arange(len(x_ND)))
    return np.pad(new_NL, ((0, 0), (0, codes_IL.shape[1] - new_NL.shape[1])), constant_values=NO_TOKEN)


def _numbered(codes_IL: np.ndarray, new_NL: np.ndarray) -> np.ndarray:
    """Dedup tokens behind those in use; a first item that has none keeps its shorter ID."""
    levels = new_NL.shape[1]
    following: dict[tuple[int, ...], int] = {}
    for row in codes_IL.tolist():
        key = tuple(row[:levels])
        following[key] = max(following.get(key, 0), row[levels] + 1)
    token_N = np.full(len(new_NL), NO_TOKEN, dtype=codes_IL.dtype)
    counts = {tuple(new_NL[group[0]].tolist()): len(group) for group in groups_of(new_NL)}
    for item, row in enumerate(new_NL.tolist()):
        key = tuple(row)
        if key in following or counts[key] > 1:
            token_N[item] = following.get(key, 0)
            following[key] = int(token_N[item]) + 1
    return np.column_stack([new_NL, token_N]).astype(codes_IL.dtype)


# -- An existing index folder: verified, read, and extended by new items.


FORMAT = "tawin_nemo.semantic_ids.v1"
CODES, ITEMS = "codes.npy", "items.json"
#: Items that were in an earlier index of the chain and are not in this one: external id -> codes.
DEPARTED = "departed.json"
#: Keys of section ``semantic_ids.text`` that may change while an index grows: where vectors lie and batch sizes.
_OWN_KEYS = ("source", "processes", "shard_items", "batch_size")


@dataclass(frozen=True, eq=False)
class Tokenized:
    """Codes [I, L or more] of all items, their coder, and the number of items that kept earlier codes.

    ``departed``: the codes of items that have left; they are not given to others and wait for a return.
    """

    codes_IL: np.ndarray
    coder: ItemCoder
    kept: int = 0
    departed: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ExistingIndex:
    """An index folder that ``tokenize`` wrote: item ``i`` has the name ``external_ids[i]`` and the codes of row i.

    Behind its own items stand those that have left since the first index of the chain.
    """

    folder: Path
    manifest: dict[str, Any]
    external_ids: list[str]
    codes_IL: np.ndarray
    coder: ItemCoder

    @classmethod
    def read(cls, folder: Path) -> ExistingIndex:
        """Read and verify an index folder.

        Raises DataError for a folder that is no index, or whose files are missing, altered or inconsistent.
        """
        manifest = read_manifest(folder)
        _verify(folder, manifest)
        try:
            external_ids = list(json.loads((folder / ITEMS).read_text(encoding="utf-8")))
            codes_IL = np.load(folder / CODES, allow_pickle=False)
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise DataError(f"{folder} holds no index that can be read ({error}); tokenize again") from error
        if len(codes_IL) != len(external_ids):
            raise DataError(
                f"{folder} has codes for {len(codes_IL)} items and {len(external_ids)} names; tokenize again"
            )
        departed = read_departed(folder)
        if departed:
            codes_IL = np.concatenate([codes_IL, np.array([*departed.values()], dtype=codes_IL.dtype)])
        return cls(folder, manifest, [*external_ids, *departed], codes_IL, ItemCoder.load(folder))

    @property
    def seed(self) -> int:
        """The random seed that the index was made with."""
        return int(self.manifest["request"]["seed"])

    def settings(self, cfg: SemanticIdsConfig) -> SemanticIdsConfig:
        """``cfg`` with the settings that the index was made with: method, sizes, collisions, encoder."""
        settings = {key: value for key, value in self.manifest["request"]["settings"].items() if key != "rqvae"}
        own = {key: getattr(cfg.text, key) for key in _OWN_KEYS}
        text = TextConfig(**(self.manifest["text"] | own))
        if not cfg.text.source:
            text = replace(text, source=self.manifest["text"]["source"])
        return replace(cfg, **settings, text=text)

    def extend(self, external_ids: list[str], x_ID: np.ndarray) -> Tokenized:
        """Codes of a newer catalog; items are identified by their external ids.

        Codes of items that have left are not given to others, and an item that returns has its own again. Raises as
        ``encode_new_items``, with the external ids of the first new items.
        """
        row_of = {name: item for item, name in enumerate(self.external_ids)}
        before_I = np.array([row_of.get(name, -1) for name in external_ids])
        new_N = np.flatnonzero(before_I < 0)
        gone = len(self.external_ids) - (len(external_ids) - len(new_N))
        say(f"{len(external_ids) - len(new_N)} items keep their codes, {len(new_N)} are new, {gone} have left")
        how = self.manifest["request"]["settings"]["collisions"]
        try:
            fresh_NL = encode_new_items(
                self.codes_IL, self.coder, x_ID[new_N], how, seed=self.seed + len(self.codes_IL)
            )
        except DataError as error:
            names = ", ".join(external_ids[item] for item in new_N[:5])
            raise DataError(f"{error} (counting new items from 0; the first are {names})") from error
        codes_IL = np.empty((len(external_ids), self.codes_IL.shape[1]), dtype=self.codes_IL.dtype)
        codes_IL[before_I >= 0] = self.codes_IL[before_I[before_I >= 0]]
        codes_IL[new_N] = fresh_NL
        present = set(external_ids)
        departed = {name: self.codes_IL[row].tolist() for name, row in row_of.items() if name not in present}
        return Tokenized(codes_IL, self.coder, len(external_ids) - len(new_N), departed)


def read_departed(folder: Path) -> dict[str, list[int]]:
    """Codes of the items that have left an index; empty without any. Raises DataError for a file that is damaged."""
    path = folder / DEPARTED
    if not path.is_file():
        return {}
    try:
        return {str(name): [int(code) for code in row] for name, row in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}); tokenize again") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index folder. Raises DataError if it is missing, unreadable or of another format."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not an index folder of `tawin-nemo tokenize` ({error})") from error
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path} has format {manifest.get('format')!r}, expected {FORMAT!r}; tokenize again")
    return manifest


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing although {MANIFEST} lists it; tokenize again")
        if sha256(folder / name) != expected:
            raise DataError(f"{folder / name} is damaged or was edited; tokenize again")


def is_finished(folder: Path, request: dict[str, Any]) -> bool:
    """True if the folder holds the result of exactly this request, unaltered."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(folder)
        # through JSON, where tuples are lists
        if manifest["request"] != json.loads(json.dumps(request)):
            return False
        _verify(folder, manifest)
    except DataError as error:
        say(f"tokenizing again: {error}")
        return False
    return True
