"""What the shared context makes the layers attend to: causal rows, explicit masks, a tree of suffixes in one row."""

from __future__ import annotations

import torch

from tawin_nemo.backbones import Backbone
from tawin_nemo.config import ModelConfig
from tawin_nemo.models.megatron import parallel
from tawin_nemo.models.megatron.attention import attention_context
from tawin_nemo.models.megatron.build import HiddenGPT, build_model

SHAPE = Backbone(
    "qwen2", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, init_std=0.2, max_position=256
)
EXACT = 1e-10  # float64


def model() -> HiddenGPT:
    parallel.initialize(ModelConfig(), seed=1)
    return build_model(SHAPE, ModelConfig(), seed=3).double()


def test_right_padding_does_not_reach_the_real_tokens() -> None:
    built = model()
    row = torch.tensor([[3, 1, 4, 1, 5]])
    padded = torch.tensor([[3, 1, 4, 1, 5, 0, 0, 0], [9, 9, 9, 9, 9, 9, 9, 9]])
    torch.testing.assert_close(built(padded, None, None)[:5, :1], built(row, None, None), rtol=0, atol=EXACT)


def test_explicit_causal_mask_equals_the_default() -> None:
    built, tokens = model(), torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    mask_BSK = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    with attention_context(built).using(mask_BSK=mask_BSK):
        masked = built(tokens, None, None)
    torch.testing.assert_close(masked, built(tokens, None, None), rtol=0, atol=EXACT)
    assert attention_context(built).mask_BSK is None


def test_a_tree_of_suffixes_equals_repeated_rows_in_values_and_gradients() -> None:
    """Prompt once, two suffixes behind it in the same row, each seeing the prompt and itself only."""
    built = model()
    prompt, suffixes = [3, 1, 4, 1], [[5, 9], [2, 6]]
    repeated = torch.tensor([prompt + suffix for suffix in suffixes])
    packed = torch.tensor([prompt + suffixes[0] + suffixes[1]])
    positions_BT = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5]])
    mask_BSK = torch.ones(1, 8, 8, dtype=torch.bool).tril()
    mask_BSK[:, 6:, 4:6] = False  # the second suffix does not see the first
    weights = torch.linspace(-1, 1, SHAPE.hidden, dtype=torch.float64)

    def gradients(hidden: torch.Tensor) -> list[torch.Tensor]:
        parameters = [p for p in built.parameters() if p.requires_grad]
        return list(torch.autograd.grad((hidden.sin() * weights).sum(), parameters, allow_unused=True))

    plain = built(repeated, None, None)
    with attention_context(built).using(mask_BSK=mask_BSK, positions_BT=positions_BT):
        tree = built(packed, None, None)
    suffix_of_rows = torch.cat([plain[4:, 0], plain[4:, 1]])
    torch.testing.assert_close(tree[4:, 0], suffix_of_rows, rtol=0, atol=EXACT)
    for got, want in zip(gradients(tree[4:, 0]), gradients(suffix_of_rows), strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-8, atol=EXACT)
