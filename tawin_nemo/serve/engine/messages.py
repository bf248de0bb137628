"""Messages from rank 0 of a generation server to all its ranks; ``models.megatron.parallel.channel`` encodes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from tawin_nemo.models.megatron.parallel.channel import Stop
from tawin_nemo.rollout.assist import Assist
from tawin_nemo.types import TokenRows


@dataclass(frozen=True)
class Lane:
    """Prompts that can share a model call: same weights, same catalog, same score space."""

    weights: int
    catalog: int
    space: str  # trie | vocab


@dataclass(frozen=True)
class Admit:
    """Prompts join a lane. ``kind_B`` says how ``listed`` filters: 0 not at all, 1 only these, 2 all but these."""

    lane: Lane
    prompts: TokenRows
    ticket_B: np.ndarray
    width_B: np.ndarray
    kind_B: np.ndarray
    listed: TokenRows  # positions in the sorted catalog
    assist: Assist | None = None  # an auxiliary recommender's part of the scores (``rollout.assist``)


@dataclass(frozen=True)
class Advance:
    """Make one model call for a lane."""

    lane: Lane


@dataclass(frozen=True)
class Drop:
    """Drop prompts from a lane without an answer; without tickets drop all and close the lane."""

    lane: Lane
    ticket_B: np.ndarray | None


@dataclass(frozen=True)
class Draw:
    """Draw ``draws`` independent candidates per prompt at once, instead of a search."""

    lane: Lane
    prompts: TokenRows
    seed_B: np.ndarray
    draws: int
    temperature: float


@dataclass(frozen=True)
class LoadWeights:
    """Read weights from disk as a new version; running requests keep the version they started with."""

    version: int
    path: str


@dataclass(frozen=True)
class ReceiveWeights:
    """The tensors of a new weight version follow by broadcast; running requests keep the version they started with."""

    version: int


@dataclass(frozen=True)
class PutCatalog:
    """Build the trie of a catalog's token paths as a new version."""

    version: int
    paths: TokenRows


@dataclass(frozen=True)
class Release:
    """Free weights and catalogs that no request uses any more."""

    weights: list[int]
    catalogs: list[int]


@dataclass(frozen=True)
class Probe:
    """Heartbeat: a barrier over all ranks, which fails when one of them is gone."""


Message = Admit | Advance | Drop | Draw | LoadWeights | ReceiveWeights | PutCatalog | Release | Probe | Stop
MESSAGES: tuple[type, ...] = get_args(Message)
