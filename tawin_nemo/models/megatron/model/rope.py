"""Rotary positions: by place in the row, or by the positions of an attention plan."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from tawin_nemo.config.backbones import Backbone, RopeScaling
from tawin_nemo.models.megatron.model.attention import AttentionPlan


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
    """megatron's rotary embedding; a plan's own positions replace the places in the row."""

    def __init__(self, shape: Backbone) -> None:
        super().__init__(kv_channels=shape.kv_channels, rotary_percent=1.0, rotary_base=shape.rope_theta)
        device = torch.cuda.current_device()
        self.inv_freq = inverse_frequencies(shape.kv_channels, shape.rope_theta, shape.rope_scaling).to(device)

    def get_rotary_seq_len(self, *arguments: Any, **named: Any) -> int | Tensor:
        """What megatron hands to ``forward``: the plan's positions, or the length of the rows."""
        plan = next((value for value in (*arguments, *named.values()) if isinstance(value, AttentionPlan)), None)
        return super().get_rotary_seq_len(*arguments, **named) if plan is None else plan.position_S

    def forward(self, length_or_positions: int | Tensor, offset: int = 0, **unused: object) -> Tensor:
        """Angles [S, 1, 1, dim] of places ``offset ..``, or of the given positions [S]."""
        if isinstance(length_or_positions, Tensor):
            place_S = length_or_positions.to(self.inv_freq.device)
        else:
            place_S = torch.arange(offset, offset + length_or_positions, device=self.inv_freq.device)
        angles = place_S[:, None].to(self.inv_freq.dtype) * self.inv_freq
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
