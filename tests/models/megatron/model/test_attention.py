"""Who sees whom: right-padded causal rows, and packed trees of suffixes against the same rows one by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.model.build import HiddenGPT, build_model
from tawin_nemo.models.megatron.model.forward import hidden_states
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenBatch

SHAPE = Backbone(
    "qwen2", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, init_std=0.2, max_position=256
)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # values; gradients are compared relative to their largest
#: Prompts and the paths below them: a tree with a fork at its root and deeper, a pure chain, a prompt alone, a fork
#: behind the first token.
TREES: list[tuple[list[int], list[list[int]]]] = [
    ([3, 1, 4, 1], [[5, 9], [5, 8, 7], [2, 6]]),
    ([9, 2, 6, 5, 3, 5], [[8, 9, 7]]),
    ([11], []),
    ([2, 7], [[1, 8, 2], [1, 8, 4, 5], [1, 9]]),
]


def model(dtype: torch.dtype = torch.float64, recompute: str = "none") -> HiddenGPT:
    runtime.initialize(ModelConfig(), seed=1)
    return build_model(SHAPE, ModelConfig(recompute=recompute), seed=3).to(dtype)


def packed(trees: list[tuple[list[int], list[list[int]]]]) -> tuple[TokenBatch, list[list[int]]]:
    """The batch, and for each of its tokens the row that ends with it; written the slow and obvious way."""
    tokens, positions, ends, chains, sizes, rows = [], [], [], [], [], []
    for prompt, paths in trees:
        start = len(tokens)
        single = len(paths) <= 1
        chain = prompt + (paths[0] if single and paths else [])
        prefixes = sorted({tuple(path[: i + 1]) for path in paths for i in range(len(path))}) if not single else []
        size = len(chain) + len(prefixes)
        for i, token in enumerate(chain):
            tokens.append(token)
            positions.append(i)
            ends.append(start + size)
            rows.append(chain[: i + 1])
        for i, prefix in enumerate(prefixes):
            tokens.append(prefix[-1])
            positions.append(len(chain) + len(prefix) - 1)
            below = [j for j, other in enumerate(prefixes) if other[: len(prefix)] == prefix]
            assert below[0] == i
            ends.append(start + len(chain) + below[-1] + 1)
            rows.append(chain + list(prefix))
        chains.append(len(chain))
        sizes.append(len(prefixes))
    none = torch.zeros(0, dtype=torch.long)
    return TokenBatch(*(torch.tensor(x) for x in (tokens, positions, ends, chains, sizes)), none, none, none), rows


def gradients(built: HiddenGPT, hidden_ND: Tensor) -> list[Tensor]:
    weights_ND = torch.linspace(-1, 1, hidden_ND.numel(), dtype=hidden_ND.dtype).view_as(hidden_ND)
    built.zero_grad()
    (hidden_ND.sin() * weights_ND).sum().backward()  # recomputation refuses torch.autograd.grad
    return [p.grad.clone() for p in built.parameters() if p.grad is not None]


def test_right_padding_does_not_reach_the_real_tokens() -> None:
    built = model()
    row = torch.tensor([[3, 1, 4, 1, 5]])
    padded = torch.tensor([[3, 1, 4, 1, 5, 0, 0, 0], [9, 9, 9, 9, 9, 9, 9, 9]])
    torch.testing.assert_close(built(padded, None, None)[:5, :1], built(row, None, None), rtol=0, atol=1e-10)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_trees_equal_rows_of_their_own_in_values_and_gradients(dtype: torch.dtype, recompute: str) -> None:
    built = model(dtype, recompute).train()
    batch, rows = packed(TREES)
    tree_SD = hidden_states(built, batch)[:, 0]
    # two further passes lie between forward and backward, as in a pipeline: each must keep its own plan
    hidden_states(built, packed(TREES[:1])[0])
    plain_SD = torch.cat([built(torch.tensor([row]), None, None)[-1] for row in rows])
    torch.testing.assert_close(tree_SD, plain_SD, rtol=0, atol=TOLERANCE[dtype])
    for got, want in zip(gradients(built, tree_SD), gradients(built, plain_SD), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype] * float(want.abs().max() + 1))


def test_trees_of_one_batch_do_not_see_each_other() -> None:
    built = model()
    together, _ = packed(TREES)
    hidden_SD = hidden_states(built, together)[:, 0]
    start = 0
    for tree in TREES:
        alone, _ = packed([tree])
        size = len(alone.tokens_S)
        torch.testing.assert_close(
            hidden_SD[start : start + size], hidden_states(built, alone)[:, 0], rtol=0, atol=1e-10
        )
        start += size


def test_the_order_of_siblings_does_not_matter_to_the_kernel() -> None:
    """Only ``end_S`` says who descends from whom: the fork of the second prompt, its branches swapped by hand."""
    built = model()
    batch, rows = packed([TREES[3]])  # [2 7] then 1, 1-8, 1-8-2, 1-8-4, 1-8-4-5, 1-9
    order = torch.tensor([0, 1, 2, 7, 3, 4, 5, 6])
    swapped = dataclasses.replace(
        batch,
        tokens_S=batch.tokens_S[order], position_S=batch.position_S[order],
        end_S=torch.tensor([8, 8, 8, 4, 8, 6, 8, 8]),
    )  # fmt: skip
    before, after = hidden_states(built, batch)[:, 0], hidden_states(built, swapped)[:, 0]
    assert rows[7] == [2, 7, 1, 9]
    torch.testing.assert_close(after, before[order], rtol=0, atol=1e-10)
