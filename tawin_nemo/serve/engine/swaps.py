"""How an engine changes its weights and its catalog, one after the other or as a pair, while requests run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tawin_nemo.rollout.lm import LM
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.history import History
from tawin_nemo.serve.engine.messages import PutCatalog
from tawin_nemo.serve.engine.ranks import Leader
from tawin_nemo.serve.engine.telemetry import Metrics
from tawin_nemo.serve.engine.weight_sources import Source


class VersionSwaps:
    """The part of ``Engine`` that swaps versions. New ones are made in the caller's thread and put into use on the
    engine's thread, between two model calls; one change at a time."""

    leader: Leader
    history: History
    metrics: Metrics
    _swap: threading.Lock
    _wake: threading.Condition
    _installed: dict[int, ServedCatalog]
    call: Callable[[Callable[[], Any]], Future[Any]]

    def update_weights(self, source: Source, version: int | None = None) -> int:
        """Load weights beside those in use and make them current; returns their version (``History.next_weights``).

        A single process loads in the caller's thread while requests continue; ranks that share a model load together
        between two model calls. Raises TawinError when they cannot be loaded, Rejected for a version not newer."""
        with self._swap:
            new, model = self.history.next_weights(version), self._load_here(source)
            self.call(lambda: self._put_weights(new, source, model)).result()
            return new

    def _load_here(self, source: Source) -> LM | None:
        return source.load_here(self.leader.replica) if self.leader.ranks.size == 1 else None

    def _install_weights(self, version: int, source: Source, model: LM | None) -> None:
        if model is None:
            source.load_on_all_ranks(self.leader, version)
        else:
            self.leader.replica.models[version] = model

    def _put_weights(self, version: int, source: Source, model: LM | None) -> None:
        self._install_weights(version, source, model)
        self.history.put_weights(version)
        self.metrics.swaps.labels("weights").inc()

    def activate(self, catalog: ServedCatalog) -> None:
        """Make a catalog current for new requests; returns when all ranks have its trie."""
        with self._swap:
            command = PutCatalog(catalog.version, catalog.trie_paths)  # slow for many items: not on the engine's thread
            self.call(lambda: self._put_catalog(command, catalog)).result()

    def _put_catalog(self, command: PutCatalog, catalog: ServedCatalog) -> None:
        self.leader.put_catalog(command, catalog.trie)
        with self._wake:
            self._installed[catalog.version] = catalog
            self.history.put_catalog(catalog)
        self.metrics.swaps.labels("catalog").inc()

    def replace(self, source: Source, catalog: ServedCatalog) -> int:
        """Make weights and the catalog of their training current together; returns the weights' version.

        Requests that were tokenised with an earlier generation's catalog, also those that still wait, are answered
        with that generation's weights. Raises TawinError when either cannot be loaded: both stay as they were.
        """
        with self._swap:
            new, model = self.history.next_weights(None), self._load_here(source)
            command = PutCatalog(catalog.version, catalog.trie_paths)
            self.call(lambda: self._put_pair(new, source, model, command, catalog)).result()
            return new

    def _put_pair(
        self, version: int, source: Source, model: LM | None, command: PutCatalog, catalog: ServedCatalog
    ) -> None:
        self._install_weights(version, source, model)
        self.leader.put_catalog(command, catalog.trie)  # when it fails the weights are released: no pair has them
        with self._wake:
            self._installed[catalog.version] = catalog
            self.history.put_pair(version, catalog)
        self.metrics.swaps.labels("version").inc()

    def rollback(self) -> None:
        """Make the versions current that were so before; Rejected where none is kept (``serve.keep_versions``)."""
        with self._swap:
            self.call(self.history.back).result()
        self.metrics.swaps.labels("rollback").inc()
