"""Which weights and catalogs a server has answered with: the pair that is in use, and those that it can go back to."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.jobs import Rejected


@dataclass(frozen=True)
class Served:
    """Weights and a catalog that are, or were, in use together. ``since``: when they came into use, in Unix seconds."""

    weights: int
    catalog: ServedCatalog
    since: float = field(default_factory=time.time)


class History:
    """The pair in use and up to ``keep`` pairs before it, whose weights and catalogs stay in memory.

    Numbers of versions are never used twice: what follows a rollback is newer than what it went back from.
    """

    def __init__(self, weights: int, catalog: ServedCatalog, *, keep: int) -> None:
        self.keep = keep
        self.newest_weights = weights
        self._served = deque([Served(weights, catalog)], maxlen=keep + 1)
        self._weights_of = {catalog.prompt_format.generation: weights}

    @property
    def current(self) -> Served:
        """The pair in use."""
        return self._served[-1]

    def list(self) -> list[Served]:
        """The pair in use, then those that a rollback goes to, newest first."""
        return [*self._served][::-1]

    def put_weights(self, version: int) -> None:
        """New weights come into use, with the catalog in use."""
        self._put(Served(version, self.current.catalog))

    def put_catalog(self, catalog: ServedCatalog) -> None:
        """A new catalog comes into use, with the weights in use."""
        self._put(Served(self.current.weights, catalog))

    def put_pair(self, version: int, catalog: ServedCatalog) -> None:
        """Weights and the catalog that they were trained with come into use together."""
        self._put(Served(version, catalog))

    def weights_for(self, catalog: ServedCatalog) -> int:
        """The weights that a request of this catalog starts with: the newest of the catalog's generation."""
        return self._weights_of.get(catalog.prompt_format.generation, self.current.weights)

    def _put(self, pair: Served) -> None:
        self.newest_weights = max(self.newest_weights, pair.weights)
        self._served.append(pair)
        self._weights_of[pair.catalog.prompt_format.generation] = pair.weights

    def back(self) -> Served:
        """Go back to the pair before the one in use, which is then forgotten. Raises Rejected where there is none."""
        if len(self._served) < 2:
            kept = f"serve.keep_versions={self.keep}" + ("" if self.keep else ", so no version before is kept")
            raise Rejected("invalid", f"there is no version to go back to ({kept})")
        self._served.pop()
        self._weights_of[self.current.catalog.prompt_format.generation] = self.current.weights
        return self.current

    def next_weights(self, version: int | None) -> int:
        """The version of the next weights: ``version``, or the newest + 1. Raises Rejected unless it is newer."""
        new = self.newest_weights + 1 if version is None else version
        if new <= self.newest_weights:
            used = "the one in use" if self.newest_weights == self.current.weights else "the newest so far"
            raise Rejected("invalid", f"weight_version {new} is not newer than {self.newest_weights}, {used}")
        return new

    @property
    def kept_weights(self) -> set[int]:
        """Versions of weights that must stay in memory."""
        return {pair.weights for pair in self._served}

    @property
    def kept_catalogs(self) -> set[int]:
        """Versions of catalogs that must stay in memory."""
        return {pair.catalog.version for pair in self._served}
