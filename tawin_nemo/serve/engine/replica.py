"""One rank's models, catalogs and running searches: executes messages and takes no decisions.

Every rank of a model gets the same messages in the same order (``ranks``), so that all of them call the model alike.
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
from tawin_nemo.models.megatron.parallel.channel import Stop
from tawin_nemo.rollout.beam import BeamSearch, FinishedPrompts
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.rollout.lm import LM
from tawin_nemo.rollout.sampling import constrained_sample
from tawin_nemo.serve.engine.messages import (
    Admit,
    Advance,
    Draw,
    Drop,
    Lane,
    LoadWeights,
    Message,
    Probe,
    PutCatalog,
    ReceiveWeights,
    Release,
)
from tawin_nemo.types import Candidates

FILTER_KINDS = ("", "only", "except")


@dataclass(frozen=True)
class FromTensors:
    """How a model is built from whole tensors under their Hugging Face names.

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
    """``load`` makes a model with the weights of a path; ``length_penalty`` is that of all searches.

    ``check`` raises a TawinError for a path that ``load`` cannot load, as far as one rank sees that without the others.
    """

    def __init__(
        self, load: Callable[[str], LM], *, check: Callable[[str], None] = lambda path: None,
        length_penalty: float = 0.0, from_tensors: FromTensors | None = None,
    ) -> None:  # fmt: skip
        self.load, self.check, self.from_tensors = load, check, from_tensors
        self.models: dict[int, LM] = {}
        self.tries: dict[int, TokenTrie] = {}
        self.searches: dict[Lane, BeamSearch] = {}
        self._length_penalty = length_penalty

    def apply(self, message: Message) -> Any:
        """Execute a message; returns the FinishedPrompts of ``Advance``, the Candidates of ``Draw``, None otherwise.

        Raises the errors of searching (DataError, CatalogError, ConfigError).
        """
        match message:
            case Admit():
                self._admit(message)
            case Advance():
                return self._advance(message.lane)
            case Drop():
                self._drop(message)
            case Draw():
                return self._draw(message)
            case Release():
                for version in message.weights:
                    del self.models[version]
                for version in message.catalogs:
                    del self.tries[version]
            case Probe() | Stop() | LoadWeights() | ReceiveWeights() | PutCatalog():
                pass  # ``ranks`` carries these out on all ranks together
        return None

    def build_from_tensors(self, tensor_of: Callable[[str, tuple[int, ...], torch.dtype], Tensor]) -> LM:
        """A model whose tensors are ``tensor_of(name, shape, dtype)``, called in the order of the rows."""
        parts = self.from_tensors
        assert parts is not None
        rows = ({name: tensor_of(name, size, parts.dtype) for name, size in row.items()} for row in parts.rows)
        return parts.build(rows)

    def held(self) -> int:
        """KV-cache tokens of all running searches (``BeamSearch.cache_tokens``)."""
        return sum(search.cache_tokens for search in self.searches.values())

    def cost(self, lane: Lane, length: int, width: int) -> int:
        """KV-cache tokens that one more prompt of ``length`` tokens may need with ``width`` beams."""
        trie = self.tries[lane.catalog]
        return length + width * (trie.decision_depth if lane.space == "trie" else trie.max_depth - 1)

    def _admit(self, message: Admit) -> None:
        lane = message.lane
        if lane not in self.searches:
            self.searches[lane] = BeamSearch(
                self.models[lane.weights], self.tries[lane.catalog], 1,
                score_space=lane.space, length_penalty=self._length_penalty,
            )  # fmt: skip
        filters = [
            ItemFilter(FILTER_KINDS[kind], message.listed[row]) if kind else None
            for row, kind in enumerate(message.kind_B.tolist())
        ]
        self.searches[lane].admit(
            message.prompts,
            message.ticket_B,
            widths=message.width_B.tolist(),
            filters=filters if any(filters) else None,
            assist=message.assist,
        )

    def _advance(self, lane: Lane) -> FinishedPrompts:
        search = self.searches[lane]
        answers = search.advance()
        if not search.running:
            del self.searches[lane]
        return answers

    def _drop(self, message: Drop) -> None:
        if message.ticket_B is None:
            self.searches.pop(message.lane, None)
            return
        search = self.searches[message.lane]
        search.drop(message.ticket_B.tolist())
        if not search.running:
            del self.searches[message.lane]

    def _draw(self, message: Draw) -> Candidates:
        generators = [torch.Generator().manual_seed(int(seed)) for seed in message.seed_B]
        return constrained_sample(
            self.models[message.lane.weights], message.prompts, self.tries[message.lane.catalog], message.draws,
            generators=generators, temperature=message.temperature,
        )  # fmt: skip


def no_items() -> np.ndarray:
    """The filter list of a prompt without a filter: empty."""
    return np.zeros(0, dtype=np.int64)
