"""Builds a baseline model from section ``baseline`` of a recipe, by a blueprint that is stored with its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from tawin_nemo.baselines.caser import Caser
from tawin_nemo.baselines.esasrec import ESASRec
from tawin_nemo.baselines.gru4rec import GRU4Rec
from tawin_nemo.baselines.hstu import HSTU
from tawin_nemo.baselines.protocol import SequentialRecommender
from tawin_nemo.baselines.sasrec import SASRec
from tawin_nemo.config.schema import BaselineConfig
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError

#: Models with a state at every item of a sequence.
CAUSAL = ("sasrec", "hstu", "esasrec")


@dataclass(frozen=True, eq=False)
class Blueprint:
    """Everything that the shape of a model depends on. ``paths``: the items' token paths, only for tiger."""

    config: BaselineConfig
    num_items: int
    max_history: int
    paths: TokenRows | None = None
    items: str = ""  # ``items_fingerprint`` of the catalog; empty in models that were trained before it was stored
    text: str = ""  # SHA-256 of the text vectors (``text_items``), only with baseline.items=text

    def to_json(self) -> dict[str, Any]:
        """The blueprint as a value that ``json.dumps`` takes; ``from_json`` reads it back."""
        paths = None if self.paths is None else [self.paths[item].tolist() for item in range(self.num_items)]
        return {**vars(self), "config": asdict(self.config), "paths": paths}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Blueprint:
        """Read what ``to_json`` returned. Raises KeyError or TypeError for a record with missing or foreign entries."""
        paths = record["paths"]
        return cls(
            BaselineConfig(**record["config"]), record["num_items"], record["max_history"],
            None if paths is None else TokenRows.from_lists(paths), record.get("items", ""), record.get("text", ""),
        )  # fmt: skip


def items_fingerprint(external_ids: Sequence[str]) -> str:
    """SHA-256 over the external ids in order: equal where item numbers mean the same items."""
    return hashlib.sha256(json.dumps(list(external_ids)).encode()).hexdigest()


def check_config(cfg: BaselineConfig, *, semantic_ids: bool) -> None:
    """Raise ConfigError for a combination of settings from which no model can be built."""
    if cfg.model == "tiger" and cfg.loss in ("bce", "sampled_softmax"):
        raise ConfigError(
            f"baseline.loss={cfg.loss}: tiger writes codes and has no sampled negatives; set baseline.loss=softmax"
        )
    if cfg.model != "tiger" and cfg.loss == "trie":
        raise ConfigError(f"baseline.loss=trie: {cfg.model} ranks items, not codes; set baseline.loss=softmax or bce")
    if cfg.model == "tiger" and not semantic_ids:
        raise ConfigError("baseline.model=tiger reads semantic IDs; set catalog.kind=sid and catalog.index")
    if cfg.items == "text" and cfg.model not in ("gru4rec", "sasrec"):
        raise ConfigError(
            f"baseline.items=text projects the vectors that items are read and scored by, but {cfg.model} has "
            "further weights of its own for each item; set baseline.model=sasrec or gru4rec, or baseline.items=ids"
        )
    if cfg.model in (*CAUSAL, "tiger") and cfg.hidden % cfg.heads:
        raise ConfigError(f"baseline.heads={cfg.heads} does not divide baseline.hidden={cfg.hidden}")
    if cfg.model not in CAUSAL and cfg.training == "sequences":
        raise ConfigError(
            f"baseline.training=sequences needs a model with a state at every item ({', '.join(CAUSAL)}), not "
            f"{cfg.model}; set baseline.training=windows"
        )
    if cfg.model not in CAUSAL and cfg.temperature > 0:
        raise ConfigError(
            f"baseline.temperature={cfg.temperature} is for {', '.join(CAUSAL)}, not {cfg.model}; set it to 0"
        )
    if cfg.negatives_from == "popularity" and cfg.loss != "sampled_softmax":
        raise ConfigError(
            f"baseline.negatives_from=popularity needs baseline.loss=sampled_softmax, not {cfg.loss}; set it to uniform"
        )
    if cfg.logq_correction and cfg.loss != "sampled_softmax":
        raise ConfigError(
            f"baseline.logq_correction=true needs baseline.loss=sampled_softmax, not {cfg.loss}; set it to false"
        )


def build_recommender(blueprint: Blueprint, text_IE: Tensor | None = None) -> SequentialRecommender:
    """A model with fresh weights, drawn from torch's global generator; ``text_IE``: the vectors of the item texts.

    Raises ConfigError for baseline.model=off, for combinations that ``check_config`` rejects, and for text vectors that
    are missing, or of another number of items.
    """
    cfg, items, longest = blueprint.config, blueprint.num_items, blueprint.max_history
    check_config(cfg, semantic_ids=blueprint.paths is not None)
    if cfg.items == "text" and (text_IE is None or len(text_IE) != items):
        there = "none" if text_IE is None else f"those of {len(text_IE)}"
        raise ConfigError(f"baseline.items=text needs the text vectors of {items} items, but there are {there}")
    if cfg.items == "ids":
        text_IE = None
    if cfg.model == "gru4rec":
        return GRU4Rec(items, hidden=cfg.hidden, layers=cfg.layers, dropout=cfg.dropout, text_IE=text_IE)
    if cfg.model == "caser":
        return Caser(items, hidden=cfg.hidden, window=longest, dropout=cfg.dropout)
    block: dict[str, Any] = {"hidden": cfg.hidden, "layers": cfg.layers, "heads": cfg.heads, "dropout": cfg.dropout}
    if cfg.model in CAUSAL:
        block |= {"max_history": longest, "temperature": cfg.temperature}
    if cfg.model == "sasrec":
        positions = "oldest" if cfg.training == "sequences" else "newest"
        return SASRec(items, positions_from=positions, text_IE=text_IE, **block)
    if cfg.model == "hstu":
        return HSTU(items, **block)
    if cfg.model == "esasrec":
        return ESASRec(items, **block)
    if cfg.model == "tiger":
        from tawin_nemo.baselines.tiger import Tiger  # transformers takes seconds to import

        assert blueprint.paths is not None
        return Tiger(blueprint.paths, loss_space="trie" if cfg.loss == "trie" else "vocab", **block)
    raise ConfigError(
        f"baseline.model={cfg.model} is not a model; choose gru4rec, caser, sasrec, hstu, esasrec or tiger"
    )
