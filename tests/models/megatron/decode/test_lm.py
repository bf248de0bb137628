"""Cached decoding of ragged prompts and growing token trees equals the plain forward pass over each full row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.decode.lm import Cache, MegatronLM
from tawin_nemo.models.megatron.model.build import HiddenGPT, build_model
from tawin_nemo.models.megatron.model.head import full_logits_NV
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows

SHAPE = Backbone(
    "qwen2", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, init_std=0.2, max_position=256
)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
PROMPTS = [[3, 9, 27, 4, 5, 6, 8, 11, 2], [1, 2, 3, 4], [50, 40, 30, 20, 10, 5, 1], [7], [8, 8, 8, 1, 9, 9]]


def language_model(dtype: torch.dtype, dropout: float = 0.0) -> tuple[HiddenGPT, MegatronLM]:
    runtime.initialize(ModelConfig(), seed=1)
    model = build_model(SHAPE, ModelConfig(dropout=dropout), seed=3).to(dtype)
    return model, MegatronLM(model, SHAPE)


@torch.no_grad()
def uncached(model: HiddenGPT, row: list[int]) -> Tensor:
    return full_logits_NV(model.eval(), model(torch.tensor([row]), None, None)[-1])[0]


def edges(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Between none and many distinct tokens behind each of the rows."""
    counts = torch.randint(0, 9, (rows,), generator=generator)
    counts[0] = 1
    tokens = [torch.randperm(SHAPE.vocab, generator=generator)[: int(count)] for count in counts]
    return torch.arange(rows).repeat_interleave(counts), torch.cat(tokens)


def assert_equals_full_forward(
    model: HiddenGPT, lm: MegatronLM, cache: Cache, rows: list[list[int]], generator: torch.Generator
) -> None:
    """The log-probs behind every row that the cache knows, in both spaces."""
    assert lm.rows(cache) == len(rows)
    position_E, token_E = edges(len(rows), generator)
    order = torch.randperm(len(rows), generator=generator)
    logits_NV = torch.stack([uncached(model, rows[int(row)]) for row in order])
    tolerance = TOLERANCE[logits_NV.dtype]
    vocab_E = lm.logprobs(cache, order, position_E, token_E, "vocab")
    torch.testing.assert_close(vocab_E, logits_NV.log_softmax(-1)[position_E, token_E], rtol=0, atol=tolerance)
    trie_E = lm.logprobs(cache, order, position_E, token_E, "trie")
    masked_NV = torch.full_like(logits_NV, -torch.inf)
    masked_NV[position_E, token_E] = logits_NV[position_E, token_E]
    torch.testing.assert_close(trie_E, masked_NV.log_softmax(-1)[position_E, token_E], rtol=0, atol=tolerance)
    single_E = torch.bincount(position_E, minlength=len(rows))[position_E] == 1
    assert torch.equal(trie_E[single_E], torch.zeros(int(single_E.sum()), dtype=trie_E.dtype))


def grow(
    lm: MegatronLM, cache: Cache, rows: list[list[int]], chains: int, generator: torch.Generator, longest: int = 3
) -> tuple[Cache, list[list[int]]]:
    parents = torch.randint(0, len(rows), (chains,), generator=generator)
    lengths = torch.randint(1, longest + 1, (chains,), generator=generator).tolist()
    tokens = [torch.randint(0, SHAPE.vocab, (length,), generator=generator).tolist() for length in lengths]
    new = []
    for parent, chain in zip(parents.tolist(), tokens, strict=True):
        new += [rows[parent] + chain[: i + 1] for i in range(len(chain))]
    return lm.extend(cache, parents, TokenRows.from_lists(tokens)), rows + new


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growing_trees_equal_the_full_forward(dtype: torch.dtype) -> None:
    model, lm = language_model(dtype)
    generator = torch.Generator().manual_seed(0)
    rows = [list(row) for row in PROMPTS]
    cache = lm.prefill(TokenRows.from_lists(rows))
    assert_equals_full_forward(model, lm, cache, rows, generator)
    for chains in (4, 9, 1, 2):
        cache, rows = grow(lm, cache, rows, chains, generator)
        assert_equals_full_forward(model, lm, cache, rows, generator)


def test_prompts_that_are_done_leave_and_new_ones_join() -> None:
    model, lm = language_model(torch.float64)
    generator = torch.Generator().manual_seed(1)
    rows = [list(row) for row in PROMPTS]
    cache = lm.prefill(TokenRows.from_lists(rows))
    cache, rows = grow(lm, cache, rows, 8, generator)
    prompt_of = cache.prompt_R.tolist()
    cache, new = lm.keep(cache, torch.tensor([1, 3, 4]))
    assert [int(n) >= 0 for n in new] == [prompt in (1, 3, 4) for prompt in prompt_of]
    kept = {int(n): row for n, row in zip(new, rows, strict=True) if n >= 0}
    rows = [kept[i] for i in range(len(kept))]
    assert rows[:3] == [PROMPTS[1], PROMPTS[3], PROMPTS[4]]
    assert_equals_full_forward(model, lm, cache, rows, generator)

    others = [[5] * 14, [6, 7]]  # longer than any prompt before
    newer = lm.prefill(TokenRows.from_lists(others))
    newer, other_rows = grow(lm, newer, others, 3, generator, longest=5)
    cache, first, second = lm.join(cache, newer)
    joined = {int(n): row for n, row in zip(first, rows, strict=True)}
    joined |= {int(n): row for n, row in zip(second, other_rows, strict=True)}
    rows = [joined[i] for i in range(len(joined))]
    assert rows[:5] == [PROMPTS[1], PROMPTS[3], PROMPTS[4], *others]
    assert_equals_full_forward(model, lm, cache, rows, generator)
    for chains in (9, 3):
        cache, rows = grow(lm, cache, rows, chains, generator)
        assert_equals_full_forward(model, lm, cache, rows, generator)


def test_nothing_to_append() -> None:
    _, lm = language_model(torch.float32)
    cache = lm.prefill(TokenRows.from_lists(PROMPTS))
    assert lm.extend(cache, torch.zeros(0, dtype=torch.long), TokenRows.from_lists([])) is cache


def test_training_mode_is_left_and_restored() -> None:
    model, lm = language_model(torch.float32, dropout=0.5)
    model.train()
    position_E, token_E = torch.arange(5), torch.arange(5)
    first, second = (
        lm.logprobs(lm.prefill(TokenRows.from_lists(PROMPTS)), torch.arange(5), position_E, token_E, "vocab")
        for _ in range(2)
    )
    assert model.training
    assert torch.equal(first, second)
    assert not first.requires_grad
