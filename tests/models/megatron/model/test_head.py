"""Log-probs of both spaces against one dense log softmax: values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.model import head
from tawin_nemo.models.megatron.model.build import HiddenGPT, build_model
from tawin_nemo.models.megatron.model.head import (
    best_tokens,
    child_logprobs,
    full_logits_NV,
    head_weight_VD,
    select_rows,
    token_logprobs,
    top_tokens,
)
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import Children

EXACT = 1e-12  # float64
REAL = 37  # of 41 rows: the last four stand for padding up to a multiple of the TP size
N = 9


def model(tied: bool) -> HiddenGPT:
    runtime.initialize(ModelConfig(), seed=1)
    shape = Backbone("qwen2", hidden=16, layers=1, heads=2, kv_heads=1, ffn=16, vocab=41, tied=tied, init_std=0.5)
    built = build_model(shape, ModelConfig(), seed=2).double()
    built.real_vocab = REAL
    return built


@pytest.fixture
def hidden_ND() -> Tensor:
    return torch.randn(N, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


def gradients(value_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> list[Tensor]:
    """Of a sum with uneven weights, so that no two rows can be mistaken for each other."""
    weights = torch.linspace(-1.0, 2.0, len(value_N), dtype=value_N.dtype)
    return list(torch.autograd.grad((value_N * weights).sum(), [hidden_ND, weight_VD]))


@pytest.mark.parametrize(("narrowest", "kept"), [(256, 2**23), (10, 2**23), (10, 0), (1, 0)])
@pytest.mark.parametrize("tied", [True, False])
def test_vocab_space_equals_log_softmax_without_the_padded_rows(
    tied: bool, narrowest: int, kept: int, hidden_ND: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several targets at one row, one row without any; the vocabulary at once, in slices, computed twice."""
    monkeypatch.setattr(head, "_LIVE_LOGITS", {"cpu": 1})
    monkeypatch.setattr(head, "_MIN_SLICE", narrowest)
    monkeypatch.setattr(head, "_KEPT_EXPONENTIALS", kept)
    built = model(tied)
    weight_VD = head_weight_VD(built)
    row_N, target_N = (
        torch.tensor([3, 0, 0, 1, 2, 5, 5, 5, 8, 7, 6]),
        torch.tensor([0, 36, 5, 5, 17, 30, 1, 2, 3, 3, 3]),
    )
    expected_N = (hidden_ND @ weight_VD[:REAL].T).log_softmax(-1)[row_N, target_N]
    got_N = token_logprobs(built, hidden_ND, row_N, target_N)
    torch.testing.assert_close(got_N, expected_N, rtol=0, atol=EXACT)
    for got, want in zip(
        gradients(got_N, hidden_ND, weight_VD), gradients(expected_N, hidden_ND, weight_VD), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=EXACT)
    padded = gradients(token_logprobs(built, hidden_ND, row_N, target_N), hidden_ND, weight_VD)[1][REAL:]
    assert torch.equal(padded, torch.zeros_like(padded))


def children() -> Children:
    """Between one and all tokens below a position, unsorted; the chosen one anywhere among them."""
    generator = torch.Generator().manual_seed(4)
    lists = [torch.randperm(REAL, generator=generator)[:count] for count in (1, 2, 3, REAL, 1, 5, 2, 8, 4)]
    counts = torch.tensor([len(tokens) for tokens in lists])
    first_N = counts.cumsum(0) - counts
    return Children(torch.arange(N).repeat_interleave(counts), torch.cat(lists), first_N + counts // 2)


@pytest.mark.parametrize("tied", [True, False])
def test_trie_space_equals_log_softmax_over_the_children(tied: bool, hidden_ND: Tensor) -> None:
    built, edges = model(tied), children()
    weight_VD = head_weight_VD(built)
    masked_NV = torch.full((N, len(weight_VD)), -torch.inf, dtype=torch.float64)
    masked_NV[edges.position_E, edges.token_E] = 0.0
    expected_NV = (hidden_ND @ weight_VD.T + masked_NV).log_softmax(-1)
    expected_N = expected_NV[torch.arange(N), edges.token_E[edges.chosen_N]]
    got_N = child_logprobs(built, hidden_ND, edges)
    torch.testing.assert_close(got_N, expected_N, rtol=0, atol=EXACT)
    for got, want in zip(
        gradients(got_N, hidden_ND, weight_VD), gradients(expected_N, hidden_ND, weight_VD), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=EXACT)


def test_forced_token_has_log_prob_and_gradient_exactly_zero(hidden_ND: Tensor) -> None:
    built = model(tied=True)
    forced = Children(torch.arange(N), torch.arange(N), torch.arange(N))
    logp_N = child_logprobs(built, hidden_ND, forced)
    assert torch.equal(logp_N, torch.zeros(N, dtype=torch.float64))
    for gradient in gradients(logp_N, hidden_ND, head_weight_VD(built)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_positions_at_all() -> None:
    built, none = model(tied=True), torch.zeros(0, dtype=torch.long)
    hidden_ND = torch.zeros(0, 16, dtype=torch.float64, requires_grad=True)
    assert token_logprobs(built, hidden_ND, none, none).shape == (0,)
    logp_N = child_logprobs(built, hidden_ND, Children(none, none, none))
    assert logp_N.shape == (0,)
    assert logp_N.requires_grad


def test_full_logits_drop_the_padding(hidden_ND: Tensor) -> None:
    built = model(tied=False)
    torch.testing.assert_close(full_logits_NV(built, hidden_ND), (hidden_ND @ head_weight_VD(built).T)[:, :REAL])


def test_rows_are_picked_by_place() -> None:
    hidden_SBD = torch.arange(3 * 2.0).reshape(3, 1, 2)
    assert select_rows(model(tied=True), hidden_SBD, torch.tensor([2, 0])).tolist() == [[4.0, 5.0], [0.0, 1.0]]


def test_number_formats_without_a_sparse_kernel_take_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16: rows are gathered, a few edges at a time; the same numbers as float32 up to bf16's rounding."""
    monkeypatch.setattr(head, "_EDGES_AT_ONCE", 5)
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(N, 16, generator=generator).bfloat16()
    built, edges = model(tied=True), children()
    exact = built.float()
    want_hidden = hidden.float().requires_grad_()
    want = child_logprobs(exact, want_hidden, edges)
    want_grads = gradients(want, want_hidden, head_weight_VD(exact))
    coarse = built.bfloat16()
    got_hidden = hidden.clone().requires_grad_()
    got = child_logprobs(coarse, got_hidden, edges)
    torch.testing.assert_close(got, want, rtol=0, atol=0.05)
    for got_grad, want_grad in zip(gradients(got, got_hidden, head_weight_VD(coarse)), want_grads, strict=True):
        torch.testing.assert_close(
            got_grad.float(), want_grad.detach(), rtol=0, atol=0.05 * float(want_grad.abs().max())
        )


@pytest.mark.parametrize("tied", [True, False])
def test_the_best_token_is_never_a_padded_row_and_the_first_of_equal_ones(tied: bool, hidden_ND: Tensor) -> None:
    built = model(tied)
    with torch.no_grad():
        weight_VD = head_weight_VD(built)
        weight_VD[REAL:] = 100 * weight_VD[REAL:].sign()
        weight_VD[30] = weight_VD[4]
    logits_NV = full_logits_NV(built, hidden_ND)
    assert best_tokens(built, hidden_ND).tolist() == [row.index(max(row)) for row in logits_NV.tolist()]
    tokens, logp = top_tokens(built, hidden_ND, 3)
    assert tokens.max() < REAL
    torch.testing.assert_close(logp, logits_NV.log_softmax(1).gather(1, tokens))
    assert torch.equal(logp, logits_NV.log_softmax(1).sort(dim=1, descending=True).values[:, :3])
    assert top_tokens(built, hidden_ND, 1000)[0].shape == logits_NV.shape
