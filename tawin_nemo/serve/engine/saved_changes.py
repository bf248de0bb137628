"""What requests changed in the catalog that a server started with, in a file, so that a restart does not lose it.

The file holds the difference between the catalog at the start and the one in use, not the way there: it grows with the
items that differ, and reading it back is one change.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tawin_nemo.serve.engine.catalog import NewItem, ServedCatalog
from tawin_nemo.util.errors import CatalogError
from tawin_nemo.util.files import write_json
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)
FORMAT = 1


class SavedChanges:
    """The file of a server's changes; None: they are not kept. ``first``: the catalog without them.

    Of that catalog only its fingerprint and which of its items are live are kept: its items have the first numbers in
    every catalog that was made of it. ``follows``: the server follows published versions, each of which replaces what
    requests changed.
    """

    def __init__(self, file: Path | None, first: ServedCatalog, *, follows: bool = False) -> None:
        self.file, self._follows = file, follows
        self._begin_with(first)

    def restart(self, first: ServedCatalog) -> None:
        """``first`` has come into use with a published version: what requests changed before is forgotten."""
        self._begin_with(first)
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _begin_with(self, first: ServedCatalog) -> None:
        self._base, self._live_I = first.fingerprint, first.live_I.copy()
        self._generation = first.prompt_format.generation

    def restored(self, first: ServedCatalog) -> ServedCatalog:
        """The catalog that was in use last: ``first`` with the changes of the file, or ``first`` without a file.

        Raises CatalogError for a file that is damaged, or whose changes are those of another catalog.
        """
        if self.file is None or not self.file.is_file():
            return first
        try:
            state = json.loads(self.file.read_text(encoding="utf-8"))
            version, base, added, removed = _checked(state)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CatalogError(
                f"{self.file} cannot be read ({type(error).__name__}: {error}), so what requests changed in the "
                "catalog is lost; remove the file to serve without it"
            ) from error
        if base != self._base and self._follows:
            log.warning(
                "%s belongs to an earlier version; its %d changes are forgotten", self.file, len(added + removed)
            )
            return first
        if base != self._base:
            raise CatalogError(
                f"{self.file} holds {len(added)} items added to, and {len(removed)} removed from, another catalog than "
                "the one to be served; remove the file to serve this catalog without these changes"
            )
        catalog = first.changed(added, removed, version)
        if catalog.fingerprint != state["fingerprint"]:
            raise CatalogError(f"{self.file} does not lead to the catalog that it was written for; remove the file")
        log.info("catalog version %d: requests before added %d items and removed %d", version, len(added), len(removed))
        return catalog

    def save(self, catalog: ServedCatalog) -> None:
        """Write how the catalog in use differs from the first one; nothing for one of another published version."""
        if self.file is None:
            return
        if catalog.prompt_format.generation != self._generation:  # after a rollback; a restart begins with the live one
            self.file.unlink(missing_ok=True)
            return
        before_I = np.zeros(len(catalog.live_I), dtype=bool)
        before_I[: len(self._live_I)] = self._live_I
        added = np.flatnonzero(catalog.live_I & ~before_I).tolist()
        removed = np.flatnonzero(before_I & ~catalog.live_I).tolist()
        sid = catalog.prompt_format.template.kind == "sid"
        items = [NewItem(catalog.external_ids[n], catalog.titles[n], (catalog.texts[n],) if sid else ()) for n in added]
        state = {
            "format": FORMAT, "version": catalog.version, "base": self._base, "fingerprint": catalog.fingerprint,
            "add": [asdict(item) for item in items], "remove": [catalog.external_ids[n] for n in removed],
        }  # fmt: skip
        write_json(self.file, state)


def _checked(state: Any) -> tuple[int, str, list[NewItem], list[str]]:
    """Version, first catalog's fingerprint, items to add, ids to remove. Raises ValueError, KeyError or TypeError."""
    if state["format"] != FORMAT:
        raise ValueError(f"format {state['format']} is not {FORMAT}")
    items = [
        NewItem(str(item["external_id"]), str(item["title"]), tuple(map(str, item["codes"]))) for item in state["add"]
    ]
    return int(state["version"]), str(state["base"]), items, [str(name) for name in state["remove"]]
