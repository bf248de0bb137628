"""One rank's models, catalogs and running searches: carries out orders, decides nothing.

Every rank of a model gets the same orders in the same order (``ranks``), so that all of them call the model alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.rollout.beam import Answers, BeamSearch
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.rollout.lm import LM
from tawin_nemo.rollout.sampling import constrained_sample
from tawin_nemo.serve.engine.orders import (
    Admit,
    Advance,
    Draw,
    Drop,
    Forget,
    Lane,
    LoadWeights,
    Order,
    Probe,
    PutCatalog,
    Stop,
    TakeWeights,
)
from tawin_nemo.types import Candidates

FILTER_KINDS = ("", "only", "except")


@dataclass(frozen=True)
class FromTensors:
    """How a model is made of whole tensors under their Hugging Face names.

    ``rows``: names and shapes of tensors that are needed together, in the order in which ``build`` takes them.
    """

    rows: Sequence[dict[str, tuple[int, ...]]]
    dtype: torch.dtype
    build: Callable[[Iterable[Mapping[str, Tensor]]], LM]

    @cached_property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: size for row in self.rows for name, size in row.items()}


class Replica:
    """``load`` makes a model with the weights of a path; ``length_penalty`` is that of all searches."""

    def __init__(
        self, load: Callable[[str], LM], *, length_penalty: float = 0.0, from_tensors: FromTensors | None = None
    ) -> None:  # fmt: skip
        self.load, self.from_tensors = load, from_tensors
        self.models: dict[int, LM] = {}
        self.tries: dict[int, TokenTrie] = {}
        self.searches: dict[Lane, BeamSearch] = {}
        self._length_penalty = length_penalty

    def apply(self, order: Order) -> Any:
        """Answers of ``Advance``, candidates of ``Draw``, None otherwise. Errors are those of search and loading."""
        match order:
            case Admit():
                self._admit(order)
            case Advance():
                return self._advance(order.lane)
            case Drop():
                self._drop(order)
            case Draw():
                return self._draw(order)
            case LoadWeights():
                self.models[order.version] = self.load(order.path)
            case PutCatalog():
                self.tries[order.version] = TokenTrie.from_paths(order.paths)
            case Forget():
                for version in order.weights:
                    del self.models[version]
                for version in order.catalogs:
                    del self.tries[version]
            case Probe() | Stop() | TakeWeights():  # what belongs to the last one is ``build_from_tensors``
                pass
        return None

    def build_from_tensors(self, tensor_of: Callable[[str, tuple[int, ...], torch.dtype], Tensor]) -> LM:
        """A model whose tensors are ``tensor_of(name, shape, dtype)``, called in the order of the rows."""
        parts = self.from_tensors
        assert parts is not None
        rows = ({name: tensor_of(name, size, parts.dtype) for name, size in row.items()} for row in parts.rows)
        return parts.build(rows)

    def held(self) -> int:
        """Tokens of the models' caches, as ``BeamSearch.held``."""
        return sum(search.held for search in self.searches.values())

    def cost(self, lane: Lane, length: int, width: int) -> int:
        """Tokens that one more prompt may come to."""
        trie = self.tries[lane.catalog]
        return length + width * (trie.decision_depth if lane.space == "trie" else trie.max_depth - 1)

    def _admit(self, order: Admit) -> None:
        lane = order.lane
        if lane not in self.searches:
            self.searches[lane] = BeamSearch(
                self.models[lane.weights], self.tries[lane.catalog], 1,
                score_space=lane.space, length_penalty=self._length_penalty,
            )  # fmt: skip
        filters = [
            ItemFilter(FILTER_KINDS[kind], order.listed[row]) if kind else None
            for row, kind in enumerate(order.kind_B.tolist())
        ]
        self.searches[lane].admit(
            order.prompts, order.ticket_B, widths=order.width_B.tolist(), filters=filters if any(filters) else None
        )

    def _advance(self, lane: Lane) -> Answers:
        search = self.searches[lane]
        answers = search.advance()
        if not search.running:
            del self.searches[lane]
        return answers

    def _drop(self, order: Drop) -> None:
        if order.ticket_B is None:
            self.searches.pop(order.lane, None)
            return
        search = self.searches[order.lane]
        search.drop(order.ticket_B.tolist())
        if not search.running:
            del self.searches[order.lane]

    def _draw(self, order: Draw) -> Candidates:
        generators = [torch.Generator().manual_seed(int(seed)) for seed in order.seed_B]
        return constrained_sample(
            self.models[order.lane.weights], order.prompts, self.tries[order.lane.catalog], order.draws,
            generators=generators, temperature=order.temperature,
        )  # fmt: skip


def no_places() -> np.ndarray:
    """Of a prompt without a filter."""
    return np.zeros(0, dtype=np.int64)
