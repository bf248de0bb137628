"""Cached decoding of ragged prompts and shuffled beams equals the plain forward pass over each full row."""

from __future__ import annotations

import pytest
import torch

from tawin_nemo.backbones import Backbone
from tawin_nemo.config import ModelConfig
from tawin_nemo.models.megatron import parallel
from tawin_nemo.models.megatron.build import HiddenGPT, build_model
from tawin_nemo.models.megatron.head import full_logits_NV
from tawin_nemo.models.megatron.kv_store import squeeze_slots
from tawin_nemo.models.megatron.lm import MegatronLM

SHAPE = Backbone(
    "qwen2", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, init_std=0.2, max_position=256
)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PROMPTS = [[3, 9, 27, 4, 5, 6, 8, 11, 2], [1, 2, 3, 4], [50, 40, 30, 20, 10, 5, 1], [7], [8, 8, 8, 1, 9, 9]]


def language_model(dtype: torch.dtype, dropout: float = 0.0) -> tuple[HiddenGPT, MegatronLM]:
    parallel.initialize(ModelConfig(), seed=1)
    model = build_model(SHAPE, ModelConfig(dropout=dropout), seed=3).to(dtype)
    return model, MegatronLM(model, SHAPE)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])


@torch.no_grad()
def uncached(model: HiddenGPT, row: list[int]) -> torch.Tensor:
    return full_logits_NV(model.eval(), model(torch.tensor([row]), None, None)[-1])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reserve", [0, 8])
def test_cached_decoding_equals_the_full_forward(dtype: torch.dtype, reserve: int) -> None:
    model, lm = language_model(dtype)
    generator = torch.Generator().manual_seed(0)
    rows = [list(row) for row in PROMPTS]
    logits, cache = lm.prefill(*padded(rows), reserve=reserve)
    assert logits.shape == (5, SHAPE.vocab)
    assert logits.dtype == dtype
    # growing, shrinking, one row only, and prompts that die out (the last steps descend from few rows)
    for step, count in enumerate((12, 20, 6, 25, 3, 3, 1, 4)):
        for row, got in zip(rows, logits, strict=True):
            torch.testing.assert_close(got, uncached(model, row), rtol=0, atol=TOLERANCE[dtype])
        low = 0 if step < 4 else len(rows) // 2
        parents = torch.randint(low, len(rows), (count,), generator=generator)
        tokens = torch.randint(0, SHAPE.vocab, (count,), generator=generator)
        logits, cache = lm.extend(cache, parents, tokens)
        rows = [rows[parent] + [token] for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True)]
    assert len(cache) == 4
    assert cache.prompts < 5  # slots of finished prompts were given up


def test_an_old_cache_is_refused() -> None:
    _, lm = language_model(torch.float32)
    _, cache = lm.prefill(*padded(PROMPTS), reserve=2)
    lm.extend(cache, torch.arange(5), torch.arange(5))
    with pytest.raises(ValueError, match="extended already"):
        lm.extend(cache, torch.arange(5), torch.arange(5))


def test_no_rows_at_all() -> None:
    _, lm = language_model(torch.float32)
    _, cache = lm.prefill(*padded(PROMPTS), reserve=2)
    none = torch.zeros(0, dtype=torch.long)
    for _ in range(2):
        logits, cache = lm.extend(cache, none, none)
        assert logits.shape == (0, SHAPE.vocab)
        assert len(cache) == 0


def test_training_mode_is_left_and_restored() -> None:
    model, lm = language_model(torch.float32, dropout=0.5)
    model.train()
    first, _ = lm.prefill(*padded(PROMPTS), reserve=1)
    second, _ = lm.prefill(*padded(PROMPTS), reserve=1)
    assert model.training
    assert torch.equal(first, second)
    assert not first.requires_grad


def test_dead_slots_are_squeezed_out() -> None:
    """Two prompts, one prompt slot each, five generated slots: prompt 0's rows see slots 2 and 4, prompt 1's slot 3."""
    visible_RK = torch.tensor([[1, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0], [1, 0, 0, 1, 0, 0]], dtype=torch.bool)
    root_R = torch.tensor([0, 0, 1])
    squeezed = squeeze_slots(visible_RK, root_R, prompts=2, first=1)
    assert squeezed is not None
    slot_BK, kept_RK = squeezed
    assert slot_BK[0].tolist() == [2, 4]
    assert slot_BK[1, 0] == 3
    assert kept_RK.tolist() == [[True, True, False], [True, True, True], [True, True, False]]
    assert squeeze_slots(kept_RK, root_R, prompts=2, first=1) is None
