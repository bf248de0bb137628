"""Changes of the served catalog: a candidate is built beside the active catalog, validated, and activated."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tawin_nemo.api import control_schema as schema
from tawin_nemo.serve.engine.catalog import NewItem, ServedCatalog
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.engine.items_file import read_items
from tawin_nemo.serve.engine.saved_changes import SavedChanges
from tawin_nemo.serve.engine.weight_sources import Source
from tawin_nemo.serve.http.errors import ApiError
from tawin_nemo.serve.http.paths import allowed_path
from tawin_nemo.serve.http.requests import ServerContext
from tawin_nemo.util.trusted import confined


class CatalogChanges:
    """One change at a time, under a lock. ``roots``: folders that files of requests must lie in."""

    def __init__(self, engine: Engine, context: ServerContext, *, roots: Sequence[Path], saved: SavedChanges) -> None:
        self._engine, self._context, self._roots, self._saved = engine, context, roots, saved
        self._busy = threading.Lock()
        self._candidates: dict[int, tuple[ServedCatalog, int]] = {}  # version -> candidate, version it was built on
        self._valid: set[int] = set()
        self._last_version = engine.catalog.version

    @property
    def candidates(self) -> list[int]:
        """The versions that were built and are not active."""
        return sorted(self._candidates)

    def build(self, body: schema.Build) -> schema.CatalogReply:
        """Build a candidate from a file, or from added and removed items. Raises ApiError, CatalogError."""
        if body.path is not None and (body.add or body.remove):
            raise ApiError(400, "path replaces the whole catalog; omit add and remove", param="path")
        with self._alone():
            return self._reply(self._build(body))

    def validate(self, version: int) -> schema.CatalogReply:
        """Check a candidate against the model, and prepare it for use. Raises ApiError, CatalogError."""
        with self._alone():
            self._candidate(version)
            self._validate(version)
            return self._reply(version)

    def activate(self, version: int) -> schema.CatalogReply:
        """Activate a validated candidate. Raises ApiError."""
        with self._busy:
            self._candidate(version)
            if version not in self._valid:
                raise ApiError(409, f"candidate {version} was not validated; POST /catalog/validate first")
            return self._activate(version)

    def change(self, body: schema.Change) -> schema.CatalogReply:
        """Build, validate and activate in one call. Raises ApiError, CatalogError."""
        with self._alone():
            version = self._build(schema.Build(add=body.add, remove=body.remove))
            try:
                self._validate(version)
                return self._activate(version)
            finally:
                self._candidates.pop(version, None)

    def rollback(self) -> str:
        """Go back to the weights and the catalog before; returns what was left. Raises Rejected where none is kept."""
        with self._busy:
            left = self._engine.history.current
            self._engine.rollback()
            self._candidates.clear()  # built on what was left
            self._saved.save(self._engine.catalog)
        return f"weights {left.weights} and catalog {left.catalog.version}"

    def _build(self, body: schema.Build) -> int:
        current = self._engine.catalog
        version = self._last_version + 1
        if body.path is not None:
            with confined(self._roots):
                items = read_items(allowed_path(self._roots, body.path, "path"))
            built = current.replaced(items, version)
        else:
            added = [NewItem(item.external_id, item.title, tuple(item.codes)) for item in body.add]
            built = current.changed(added, body.remove, version)
        self._last_version = version
        self._candidates = {version: (built, current.version)}  # one at a time: each holds a whole trie
        return version

    def _validate(self, version: int) -> None:
        candidate = self._candidate(version)
        self._prepare(candidate)
        self._valid = {version}

    def _prepare(self, candidate: ServedCatalog) -> None:
        positions, vocab = self._context.limits(candidate)
        candidate.validate(vocab=vocab, positions=positions)
        candidate.warm()

    def follow(self, make: Callable[[ServedCatalog, int], ServedCatalog], source: Source) -> None:
        """Put a published version into use: its weights (``source``) and its catalog, in one step.

        ``make(current, version)`` makes the catalog. It replaces what requests changed before. Raises TawinError when
        the version cannot be used: weights and catalog stay as they were.
        """
        with self._busy:
            version = self._last_version + 1
            with _without_collections():
                built = make(self._engine.catalog, version)
                self._prepare(built)
            self._last_version = version
            self._engine.replace(source, built)
            self._candidates.clear()  # built on what was left
            self._saved.restart(built)

    def _activate(self, version: int) -> schema.CatalogReply:
        candidate, base = self._candidates[version]
        if base != self._engine.catalog.version:
            text = f"candidate {version} was built on version {base}, but {self._engine.catalog.version} is active"
            raise ApiError(409, f"{text}; build a new candidate")
        self._engine.activate(candidate)
        self._saved.save(self._engine.catalog)
        reply = self._reply(version)
        del self._candidates[version]
        return reply

    def _candidate(self, version: int) -> ServedCatalog:
        if version not in self._candidates:
            raise ApiError(404, f"there is no candidate {version}; candidates: {sorted(self._candidates)}")
        return self._candidates[version][0]

    def _reply(self, version: int) -> schema.CatalogReply:
        candidate = self._candidates[version][0]
        return schema.CatalogReply(
            candidate=version, items=candidate.trie.num_items, paths=candidate.trie.num_leaves,
            fingerprint=candidate.fingerprint, validated=version in self._valid, weight_version=self._engine.weights,
            catalog_version=self._engine.catalog.version,
        )  # fmt: skip

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One change at a time, without garbage collections: those would traverse a million new items again and again,
        and block every request meanwhile."""
        with self._busy, _without_collections():
            yield


@contextmanager
def _without_collections() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
