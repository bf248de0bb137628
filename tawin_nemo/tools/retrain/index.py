"""The semantic IDs of a nightly run: codes of earlier items stay, new items get unused codes of the same codebooks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from tawin_nemo.catalog.semantic_ids import find_codes
from tawin_nemo.commands.tokenize import INDEX, tokenize
from tawin_nemo.config.schema import Recipe, SemanticIdsConfig
from tawin_nemo.data.interactions import MANIFEST
from tawin_nemo.run.published import INDEX_FOLDER
from tawin_nemo.semantic_ids.growth import CODES, DEPARTED, ITEMS, read_departed, read_manifest
from tawin_nemo.semantic_ids.index_files import code_tokens
from tawin_nemo.util.errors import CatalogError, DataError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


def make_codes(recipe: Recipe, data: Path, version: str, out: Path) -> Path:
    """The index file with the codes of all items of the prepared data ``data``; a folder of ``tokenize`` is ``out``.

    ``version``: the published version whose index is grown. Where it has none (or is empty), ``catalog.index`` is the
    start: an output of ``tokenize`` is grown, another file is taken over by ``semantic_ids.given``; without
    ``catalog.index`` the items are tokenised by the section ``semantic_ids``. Raises ConfigError, CatalogError and
    DataError as ``tokenize`` does.
    """
    settings = replace(_settings(recipe, version), output=str(out))
    try:
        tokenize(replace(recipe, semantic_ids=settings), data)
    except (CatalogError, DataError) as error:
        if not settings.given:
            raise
        log.warning("%s is used as it is, and no later night can grow it: %s", settings.given, error)
        return Path(settings.given)
    return out / INDEX


def _settings(recipe: Recipe, version: str) -> SemanticIdsConfig:
    grown = Path(version) / INDEX_FOLDER
    if version and (grown / MANIFEST).is_file():
        return replace(recipe.semantic_ids, grow_from=str(grown), given="")
    if not recipe.catalog.index:
        return recipe.semantic_ids
    file = find_codes(Path(recipe.data.root), recipe.catalog.index).resolve()
    try:
        read_manifest(file.parent)
    except DataError:
        return replace(recipe.semantic_ids, given=str(file), grow_from="")
    return replace(recipe.semantic_ids, grow_from=str(file.parent), given="")


def codes_of_index(folder: Path) -> dict[str, list[str]]:
    """The code tokens of all items of an index folder by external id, of those that have left as well."""
    layout = read_manifest(folder)["request"]["settings"]["layout"]
    names = list(json.loads((folder / ITEMS).read_text(encoding="utf-8")))
    codes_IL = np.load(folder / CODES, allow_pickle=False)
    departed = read_departed(folder) if (folder / DEPARTED).is_file() else {}
    if departed:
        codes_IL = np.concatenate([codes_IL, np.array([*departed.values()], dtype=codes_IL.dtype)])
    return dict(zip([*names, *departed], code_tokens(codes_IL, layout), strict=True))
