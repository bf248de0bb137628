"""A small world with a rule: the next item is the newest one's successor."""

import numpy as np
import torch

from tawin_nemo.baselines.build import Blueprint, build_recommender
from tawin_nemo.baselines.protocol import SequentialRecommender
from tawin_nemo.config.schema import BaselineConfig
from tawin_nemo.types import TokenRows

ITEMS, WINDOW, END_OF_TEXT = 12, 5, 1
MODELS = ("gru4rec", "caser", "sasrec", "hstu", "esasrec", "tiger")

#: Two or three codes per item and the end of text; all items apart.
PATHS = TokenRows.from_lists(
    [[2 + item // 4, 6 + item % 4, *([2] if item % 3 == 0 else []), END_OF_TEXT] for item in range(ITEMS)]
)


def histories(rows: int, *, seed: int) -> TokenRows:
    draw = np.random.default_rng(seed)
    return TokenRows.from_lists([draw.integers(0, ITEMS, size=draw.integers(1, WINDOW + 1)) for _ in range(rows)])


def successors(history: TokenRows) -> np.ndarray:
    return (history.flat[history.offsets[1:] - 1] + 1) % ITEMS


def model_of(name: str, *, dropout: float = 0.0, seed: int = 0, **options) -> SequentialRecommender:
    torch.manual_seed(seed)
    config = BaselineConfig(model=name, hidden=16, layers=2, heads=2, dropout=dropout, **options)
    paths = PATHS if name == "tiger" else None
    return build_recommender(Blueprint(config, ITEMS, WINDOW, paths))
