"""An engine whose answers are given, and a small catalog for it: what the tests of the evaluator share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import EvalConfig
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.evaluate import evaluate
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.types import NO_ITEM, Candidates, DataParallel, TokenRows

EOS = 1
#: Items 2 and 4 are written alike.
PATHS = [[5, 6, EOS], [5, 7, EOS], [8, EOS], [9, 9, 9, EOS], [8, EOS], [4, EOS]]


def make_catalog() -> Catalog:
    paths = TokenRows.from_lists(PATHS)
    names = [f"item {i}" for i in range(len(PATHS))]
    return Catalog(names, names, "title", paths, TokenTrie.from_paths(paths))


class ListedEngine:
    """Returns, for the prompt ``[r, ...]``, the items that ``lists[r]`` names; short lists are filled with NO_ITEM."""

    dp, num_replicas = None, 1  # it searches in this process alone

    def __init__(self, catalog: Catalog, lists: list[list[int]]) -> None:
        self.catalog, self.lists = catalog, lists
        self.calls: list[int] = []

    def search(
        self, prompts: TokenRows, width: int, *, score_space: str | None = None, token_budget: int | None = None
    ) -> Candidates:
        assert token_budget == EvalConfig().token_budget
        self.calls.append(len(prompts))
        rows = [self.lists[int(prompts[i][0])][:width] for i in range(len(prompts))]
        items_BW = torch.tensor([row + [NO_ITEM] * (width - len(row)) for row in rows])
        return candidates(self.catalog, items_BW)


def candidates(catalog: Catalog, items_BW: Tensor) -> Candidates:
    tokens, lengths = catalog.paths.padded()
    listed_BW = items_BW != NO_ITEM
    safe_BW = items_BW.clamp(min=0)
    lengths_BW = torch.where(listed_BW, lengths[safe_BW], 0)
    scores_BW = torch.where(listed_BW, -torch.arange(items_BW.shape[1], dtype=torch.float32), -math.inf)
    return Candidates(
        items_BW=items_BW,
        leaf_BW=torch.where(listed_BW, torch.from_numpy(catalog.leaf_I)[safe_BW], -1),
        tokens_BWT=torch.where(listed_BW.unsqueeze(-1), tokens[safe_BW], 0),
        lengths_BW=lengths_BW,
        scores_BW=scores_BW,
        logprobs_BWT=torch.zeros(*items_BW.shape, tokens.shape[1]),
    )


def make_samples(targets: list[int], lengths: list[int] | None = None) -> Samples:
    """Row r has the prompt ``[r, 0, 0 ...]`` of the given length."""
    n = len(targets)
    lengths = lengths or [1 + (3 * r) % 5 for r in range(n)]
    prompts = TokenRows.from_lists([[r] + [0] * (lengths[r] - 1) for r in range(n)])
    history = TokenRows.from_lists([[0]] * n)
    return Samples(prompts, np.array(targets, dtype=np.int64), 100 + np.arange(n), history)


#: How often each item occurs in train.
POPULARITY = np.array([8, 4, 2, 1, 0, 3])


def run(engine: Any, samples: Samples, catalog: Catalog, dp: DataParallel | None = None, **cfg: Any) -> EvalResult:
    config = EvalConfig(**{"beams": 4, "ks": [1, 3], **cfg})
    return evaluate(engine, samples, catalog, config, dp=dp or DataParallel(), label="test", popularity_I=POPULARITY)


LISTS = [[0, 1, 2, 3], [0, 1, 2, 3], [3, 1, 2, 0], [5, 0], [1, 0, 3, 2], [3, 2, 1, 0]]
TARGETS = [0, 2, 4, 2, 5, 1]  # ranks 0, 2 (shared), 2 (shared, the other item of the path), absent, absent, 2
