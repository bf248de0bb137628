"""What the GPU parts compute on: a generated catalog and training batches shaped like rollouts.

Sizes are those of the 0.5B model on titles: prompts of 40 to 400 tokens, 16 candidates of 6 to 28 tokens which share
their beginnings, as those of one beam search do. ``TAWIN_GPU_DRY=1`` takes a tiny model and a handful of prompts, and
``TAWIN_GPU_DRY=pretended`` the same on the pretended device of ``tests/simcuda`` (``first_contact.sh`` alone).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import BACKBONES, Backbone
from tawin_nemo.data.trees import tree_batches
from tawin_nemo.types import PromptBatch, TokenRows

if TYPE_CHECKING:  # run.py reads the sizes, also where megatron-core is missing
    from tawin_nemo.models.megatron.optim.trainable import MicroBatch

EOS = 1


@dataclass(frozen=True)
class Sizes:
    shape: Backbone
    items: int
    brands: int  # beginnings that items share
    rows: int  # prompts of the training set, seen again and again
    prompts: int  # of one step
    prompt_tokens: tuple[int, int]
    title_tokens: tuple[int, int]  # behind the brand
    candidates: int
    tokens: int  # of one forward pass
    steps: int
    warmup: int  # steps that are not timed
    lr: float


FULL = Sizes(
    shape=BACKBONES["qwen2.5-0.5b"], items=4000, brands=150, rows=256, prompts=64, prompt_tokens=(40, 400),
    title_tokens=(3, 24), candidates=16, tokens=16384, steps=200, warmup=20, lr=3e-4,
)  # fmt: skip
TINY = Sizes(
    shape=Backbone("qwen2", 64, 2, 4, 2, 96, 211, rope_theta=1e4, max_position=256), items=120, brands=8, rows=8,
    prompts=4, prompt_tokens=(5, 20), title_tokens=(2, 6), candidates=6, tokens=128, steps=8, warmup=2, lr=1e-2,
)  # fmt: skip


def sizes_of_run() -> dict[str, Any]:
    """What the figures are measured on."""
    given = asdict(sizes())
    given["shape"] = {key: value for key, value in given["shape"].items() if value is not None}
    return given


def is_dry() -> bool:
    return os.environ.get("TAWIN_GPU_DRY", "") == "1" or is_pretended()


def is_pretended() -> bool:
    return os.environ.get("TAWIN_GPU_DRY", "") == "pretended"


def sizes() -> Sizes:
    return TINY if is_dry() else FULL


def spread(shape: Backbone) -> Backbone:
    """Initial weights wide enough that candidates differ by more than rounding (logits spread by about 1.5)."""
    return replace(shape, init_std=0.05)


class Workload:
    """A catalog, and rows that a model can learn by heart; a function of nothing but the sizes."""

    def __init__(self, given: Sizes) -> None:
        self.sizes = given
        draw = np.random.default_rng(7)
        top = given.shape.vocab

        def tokens(low: int, high: int) -> tuple[int, ...]:
            return tuple(draw.integers(2, top, draw.integers(low, high + 1)).tolist())

        brands = [tokens(2, 4) for _ in range(given.brands)]
        self.brand_I = np.sort(draw.integers(0, given.brands, given.items))
        paths = [[*brands[brand], *tokens(*given.title_tokens), EOS] for brand in self.brand_I]
        rows, names = TokenRows.from_lists(paths), [f"item {i}" for i in range(given.items)]
        self.catalog = Catalog(names, names, "title", rows, TokenTrie.from_paths(rows))
        self.prompts = TokenRows.from_lists([tokens(*given.prompt_tokens) for _ in range(given.rows)])
        self.target_R = draw.integers(0, given.items, given.rows)
        self.candidates_RG = np.stack([self._candidates(int(target), draw) for target in self.target_R])

    def _candidates(self, target: int, draw: np.random.Generator) -> np.ndarray:
        """The target first; then items of its brand, as far as there are, and others."""
        count = self.sizes.candidates
        kin = np.setdiff1d(np.flatnonzero(self.brand_I == self.brand_I[target]), [target])
        kin = draw.permutation(kin)[: count // 2]
        others = np.setdiff1d(draw.permutation(self.sizes.items), [target, *kin], assume_unique=False)
        return np.concatenate([[target], kin, draw.permutation(others)[: count - 1 - len(kin)]])

    def rows_of_step(self, step: int) -> np.ndarray:
        return np.arange(step * self.sizes.prompts, (step + 1) * self.sizes.prompts) % self.sizes.rows

    def prompt_batch(self, step: int) -> PromptBatch:
        rows = self.rows_of_step(step)
        return PromptBatch(torch.from_numpy(rows), self.prompts.take(rows), torch.from_numpy(self.target_R[rows]))

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Trees of all candidates in vocabulary space; the loss is the mean negative log-likelihood of the targets."""
        from tawin_nemo.models.megatron.optim.trainable import MicroBatch

        rows = self.rows_of_step(step)
        answers = self.catalog.paths.take(self.candidates_RG[rows].reshape(-1))
        prompt_A = np.repeat(np.arange(len(rows)), self.sizes.candidates)
        target_tokens = int(self.catalog.paths.lengths_of(self.target_R[rows]).sum())
        for batch, index, answer_M in tree_batches(self.prompts.take(rows), answers, prompt_A, None, self.sizes.tokens):
            is_target_N = torch.from_numpy(answer_M)[index.answer_N] % self.sizes.candidates == 0

            def loss(logp_N: Tensor, is_target_N: Tensor = is_target_N) -> tuple[Tensor, dict[str, Tensor]]:
                return -logp_N[is_target_N.to(logp_N.device)].sum() / target_tokens, {}

            yield MicroBatch(batch, loss)
