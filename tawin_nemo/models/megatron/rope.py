"""Rotary positions: by place in the row, or by explicit position ids when the attention context has them."""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from tawin_nemo.backbones import Backbone, RopeScaling
from tawin_nemo.models.megatron.attention import AttentionContext


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


class PositionedRotary(RotaryEmbedding):
    """megatron's rotary embedding; frequencies are gathered by ``context.positions_BT`` when it is set."""

    def __init__(self, shape: Backbone, context: AttentionContext) -> None:
        super().__init__(kv_channels=shape.kv_channels, rotary_percent=1.0, rotary_base=shape.rope_theta)
        self.context = context
        device = torch.cuda.current_device()
        self.inv_freq = inverse_frequencies(shape.kv_channels, shape.rope_theta, shape.rope_scaling).to(device)

    def forward(self, max_seq_len: int, offset: int = 0, **unused: object) -> Tensor:
        """Angles [S, 1, 1, dim] of places ``offset ..``, or [S, B, 1, dim] of the explicit positions."""
        positions_BT = self.context.positions_BT
        if positions_BT is None:
            places_SB = torch.arange(offset, offset + max_seq_len, device=self.inv_freq.device)[:, None]
        else:
            places_SB = positions_BT.to(self.inv_freq.device).t()
        angles = places_SB[:, :, None].to(self.inv_freq.dtype) * self.inv_freq
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]
