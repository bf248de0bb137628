"""The rotation of queries and keys, in both its forms, against complex numbers and against megatron's own."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from tawin_nemo.models.megatron.model.rotary import Turned, Turns

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
#: Largest difference to complex numbers of double precision, for heads of standard deviation 1: a few units in the last
#: place of cosines and of products.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.04}


def scene(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Angles [S, 1, 1, D] and heads [S, G, H, D] that lie apart in memory."""
    generator = torch.Generator().manual_seed(4)
    angle_SP = torch.randint(0, 200, (7, 1), generator=generator) * torch.tensor([1.0, 0.3, 0.01, 0.0004])
    heads = torch.randn(7, 2, 5, 8, generator=generator, dtype=torch.float64).to(dtype)
    return torch.cat([angle_SP, angle_SP], dim=1)[:, None, None], heads[:, :, :3]


def turned_as_complex(heads_SGHD: Tensor, angle_S11D: Tensor) -> Tensor:
    first, second = heads_SGHD.double().chunk(2, dim=-1)
    pairs = torch.complex(first, second) * torch.exp(1j * angle_S11D.double().chunk(2, dim=-1)[0])
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_matrix", [False, True])
def test_pairs_are_turned_like_complex_numbers(as_matrix: bool, dtype: torch.dtype) -> None:
    angle, heads = scene(dtype)
    angle = angle.double() if dtype == torch.float64 else angle
    turns = Turns.of(angle, dtype, as_matrix=as_matrix)
    result = turns.turn(heads)
    torch.testing.assert_close(result.double(), turned_as_complex(heads, angle), rtol=0, atol=TOLERANCE[dtype])
    back = turns.turn(result, back=True)
    torch.testing.assert_close(back.double(), heads.double(), rtol=0, atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_matrix", [False, True])
def test_values_and_gradients_are_those_of_megatron_bit_for_bit(as_matrix: bool, dtype: torch.dtype) -> None:
    angle, heads = scene(dtype)
    grad = torch.randn(heads.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = (heads.clone().requires_grad_() for _ in range(2))
    found = Turned.apply(ours, Turns.of(angle, dtype, as_matrix=as_matrix))
    expected = torch.stack([_apply_rotary_pos_emb_bshd(theirs[:, g][:, None], angle)[:, 0] for g in range(2)], dim=1)
    assert torch.equal(found, expected)
    found.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("as_matrix", [False, True])
def test_heads_can_be_turned_where_they_lie(as_matrix: bool) -> None:
    angle, heads = scene(torch.float32)
    turns = Turns.of(angle, torch.float32, as_matrix=as_matrix)
    expected, whole = turns.turn(heads), heads._base.clone()
    part = whole[:, :, :3]
    assert turns.turn(part, out=part).data_ptr() == whole.data_ptr()
    assert torch.equal(whole[:, :, :3], expected)
    assert torch.equal(whole[:, :, 3:], heads._base[:, :, 3:])


def test_a_cpu_has_no_matrix_unless_it_is_asked_for() -> None:
    angle, _ = scene(torch.float32)
    assert Turns.of(angle, torch.float32).matrix_S11OIP is None
    matrix = Turns.of(angle, torch.float32, as_matrix=True).matrix_S11OIP
    assert matrix is not None
    assert matrix.shape == (7, 1, 1, 2, 2, 4)
