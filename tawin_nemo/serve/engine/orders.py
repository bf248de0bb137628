"""What rank 0 tells all ranks to do, in order, and how it travels: JSON and raw arrays, nothing that runs code."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np

from tawin_nemo.types import TokenRows


@dataclass(frozen=True)
class Lane:
    """Prompts that can share a model call: same weights, same catalog, same score space."""

    weights: int
    catalog: int
    space: str  # trie | vocab


@dataclass(frozen=True)
class Admit:
    """Prompts begin to run. ``kind_B`` says how ``listed`` filters: 0 not at all, 1 only these, 2 all but these."""

    lane: Lane
    prompts: TokenRows
    ticket_B: np.ndarray
    width_B: np.ndarray
    kind_B: np.ndarray
    listed: TokenRows  # places in the sorted catalog


@dataclass(frozen=True)
class Advance:
    """One model call of a lane."""

    lane: Lane


@dataclass(frozen=True)
class Drop:
    """Prompts leave unanswered; without tickets the whole lane goes."""

    lane: Lane
    ticket_B: np.ndarray | None


@dataclass(frozen=True)
class Draw:
    """Independent draws instead of a search, all at once."""

    lane: Lane
    prompts: TokenRows
    seed_B: np.ndarray
    draws: int
    temperature: float


@dataclass(frozen=True)
class LoadWeights:
    """Read weights from disk under a new version; running requests keep theirs."""

    version: int
    path: str


@dataclass(frozen=True)
class TakeWeights:
    """Weights follow, tensor by tensor, and become a new version; running requests keep theirs."""

    version: int


@dataclass(frozen=True)
class PutCatalog:
    """A catalog's token paths under a new version."""

    version: int
    paths: TokenRows


@dataclass(frozen=True)
class Forget:
    """Weights and catalogs that no request runs on any more."""

    weights: list[int]
    catalogs: list[int]


@dataclass(frozen=True)
class Probe:
    """Every rank shows that it is there."""


@dataclass(frozen=True)
class Stop:
    """The ranks part."""


Order = Admit | Advance | Drop | Draw | LoadWeights | TakeWeights | PutCatalog | Forget | Probe | Stop
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in get_args(Order)}


def encode(order: Order) -> bytes:
    """Length of a JSON head, the head, and the arrays that it describes."""
    arrays: list[np.ndarray] = []

    def plain(value: Any) -> Any:
        if isinstance(value, TokenRows):
            return {"rows": [plain(value.flat), plain(value.offsets)]}
        if isinstance(value, Lane):
            return {"lane": [value.weights, value.catalog, value.space]}
        if isinstance(value, np.ndarray):
            arrays.append(np.ascontiguousarray(value, dtype=np.int64))
            return {"array": len(arrays) - 1, "size": value.size}
        return value

    values = {item.name: plain(getattr(order, item.name)) for item in fields(order)}
    head = json.dumps({"kind": type(order).__name__, "values": values}).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *(array.tobytes() for array in arrays)])


def decode(data: bytes) -> Order:
    """The order that ``encode`` wrote."""
    size = int.from_bytes(data[:8], "little")
    head, place = json.loads(data[8 : 8 + size]), 8 + size

    def rich(value: Any) -> Any:
        nonlocal place
        if not isinstance(value, dict):
            return value
        if "rows" in value:
            flat, offsets = map(rich, value["rows"])
            return TokenRows(flat, offsets)
        if "lane" in value:
            return Lane(*value["lane"])
        array = np.frombuffer(data, dtype=np.int64, count=value["size"], offset=place).copy()
        place += array.nbytes
        return array

    order: Order = _KINDS[head["kind"]](**{name: rich(value) for name, value in head["values"].items()})
    return order
