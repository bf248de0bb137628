"""Rotary positions (RoPE, arXiv 2104.09864): angles, their tables for one pass of all layers, and the rotation.

A head's dimensions i and i + D / 2 are a pair, which is turned by the angle of pair i at the token's position.

Axes: S tokens, G groups of H heads, D dimension of a head, P = D / 2 pairs, I and O its halves before and after.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tawin_nemo.config.backbones import RopeScaling


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """``dim / 2`` inverse frequencies in float32 (arXiv 2104.09864), with Llama 3's scaling if any.

    The scaling leaves wavelengths below ``original / high_freq_factor`` alone, divides those above
    ``original / low_freq_factor`` by ``factor`` and interpolates in between.
    """
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if scaling is None:
        return inverse
    wavelength = 2 * math.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((scaling.original_max_position / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


@dataclass(frozen=True)
class Turns:
    """Cosines and sines of S tokens' angles, computed once for all layers of a pass, in the heads' dtype."""

    cos_S11D: Tensor
    sin_S11D: Tensor
    matrix_S11OIP: Tensor | None  # ((cos, -sin), (sin, cos)), to rotate in few kernels

    @classmethod
    def of(cls, angle_S11D: Tensor, dtype: torch.dtype, *, as_matrix: bool | None = None) -> Turns:
        """The tables of the angles of tokens, each given for both halves of a head.

        ``as_matrix``: rotate in few kernels (None: on a CUDA device) instead of with little memory.
        """
        cos_S11D, sin_S11D = angle_S11D.cos().to(dtype), angle_S11D.sin().to(dtype)
        matrix = None
        if angle_S11D.is_cuda if as_matrix is None else as_matrix:
            cos, sin = (x[..., : x.shape[-1] // 2] for x in (cos_S11D, sin_S11D))
            matrix = torch.stack([cos, -sin, sin, cos], dim=3).unflatten(3, (2, 2))
        return cls(cos_S11D, sin_S11D, matrix)

    def turn(self, heads_SGHD: Tensor, *, back: bool = False, out: Tensor | None = None) -> Tensor:
        """The heads turned by their tokens' angles, or back by them; no gradient. ``out`` may be the heads themselves.

        Both forms round the two products and then their sum, as megatron does: results are equal bit for bit, but for
        the sign of zeros.
        """
        if self.matrix_S11OIP is not None:
            return _by_matrix(heads_SGHD, self.matrix_S11OIP, back=back, out=out)
        first, second = heads_SGHD.chunk(2, dim=-1)
        halves = (second, -first) if back else (-second, first)
        return torch.add(heads_SGHD * self.cos_S11D, torch.cat(halves, dim=-1).mul_(self.sin_S11D), out=out)


def _by_matrix(heads_SGHD: Tensor, matrix_S11OIP: Tensor, *, back: bool, out: Tensor | None) -> Tensor:
    """``Turns.turn`` in two kernels instead of five."""
    matrix = matrix_S11OIP.transpose(3, 4) if back else matrix_S11OIP  # of a rotation: the inverse
    products_SGHOIP = heads_SGHD.unflatten(-1, (1, 2, -1)) * matrix
    if out is None:
        return products_SGHOIP.sum(-2).flatten(-2)
    torch.sum(products_SGHOIP, -2, out=out.unflatten(-1, (2, -1)))
    return out


class Turned(torch.autograd.Function):
    """``Turns.turn`` with its gradient: the gradient of what was turned, turned back."""

    @staticmethod
    def forward(ctx: Any, heads_SGHD: Tensor, turns: Turns) -> Tensor:
        ctx.turns = turns
        return turns.turn(heads_SGHD)

    @staticmethod
    def backward(ctx: Any, grad_SGHD: Tensor) -> tuple[Tensor, None]:
        return ctx.turns.turn(grad_SGHD, back=True), None
