"""Core attention of every layer and its rotary positions: torch's scaled dot product under an attention plan.

A plan says which tokens attend to which. It is passed through megatron's layers as ``packed_seq_params``, so that
recomputation of activations, and pipeline stages with several micro-batches in flight, each get their own. The linear
layers do not use it: they process one flat row. Without a plan, rows are right-padded, and plain causal attention is
exact for the real tokens.

Axes: S tokens (queries), K keys, B rows, H query heads, G key and value groups, R = (H / G) * S folded queries, D the
dimension of a head.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.models.megatron.model.rotary import Turned, Turns, inverse_frequencies

#: torch's CUDA kernel takes masks whose rows begin at multiples of so many numbers; others it copies in every layer.
_MASK_ROW = 8


class AttentionPlan(PackedSeqParams):
    """Which of the S tokens of one flat row attend to which; ``position_S`` are their rotary positions."""

    def __init__(self, position_S: Tensor) -> None:
        # sbhd: megatron hands tensors on as they are, and leaves the plan itself to the core attention
        super().__init__(qkv_format="sbhd")
        self.position_S = position_S
        self._rotary: PositionedRotary | None = None
        self._turns: Turns | None = None

    def rotate_by(self, rotary: PositionedRotary) -> None:
        """Have the core attention turn queries and keys by ``rotary``'s angles, as megatron's layers then do not."""
        self._rotary = rotary

    def rotations(self, dtype: torch.dtype) -> Turns | None:
        """The rotation of queries and keys that is left to the core attention, None if none is; made once a pass."""
        if self._rotary is not None and self._turns is None:
            self._turns = Turns.of(self._rotary.angles(self.position_S), dtype)
        return self._turns

    @abstractmethod
    def attend(self, core: PlannedAttention, query_SHD: Tensor, key_SGD: Tensor, value_SGD: Tensor) -> Tensor:
        """[S, H, D] from queries of H heads and keys and values of G groups, all of them turned by their positions."""


class PlannedAttention(MegatronModule):
    """Grouped-query attention, for the ``core_attention`` slot of megatron's layer specs.

    Under a plan it also turns queries and keys: megatron would compute cosines and sines anew in every layer.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **unused: object) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.dropout = float(config.attention_dropout)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: AttentionPlan | None = None,
        **unused: object,
    ) -> Tensor:
        """``query`` [S, B, heads, dim], ``key`` and ``value`` [S, B, groups, dim] -> [S, B, heads * dim]."""
        S, B = query.shape[:2]
        if packed_seq_params is None:
            rows_BHSD = self.causal(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return rows_BHSD.permute(2, 0, 1, 3).reshape(S, B, -1)
        turns = packed_seq_params.rotations(query.dtype)
        if turns is not None:
            query, key = Turned.apply(query, turns), Turned.apply(key, turns)
        output_SHD = packed_seq_params.attend(self, query[:, 0], key[:, 0], value[:, 0])
        return output_SHD.reshape(S, 1, -1)

    def causal(self, query_BHSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> Tensor:
        """Causal attention within each row: [B, H, S, D]."""
        with self._dropout_generator():
            return F.scaled_dot_product_attention(
                query_BHSD,
                key_BGSD,
                value_BGSD,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=True,
                enable_gqa=query_BHSD.shape[1] != key_BGSD.shape[1],
            )

    def masked(self, query_BHSD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, mask_B1RK: Tensor) -> Tensor:
        """Attention under an additive mask (0 = visible, -inf = masked; see ``additive_mask``): [B, H, S, D]."""
        # The query heads of one group become further queries of that group: no copy of the keys, and the fast kernels
        # that take a mask but no grouped heads stay usable.
        B, heads, S, dim = query_BHSD.shape
        folded_BGRD = query_BHSD.reshape(B, key_BGKD.shape[1], -1, dim)
        return self.folded(folded_BGRD, key_BGKD, value_BGKD, mask_B1RK).reshape(B, heads, S, dim)

    def folded(self, query_BGRD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, mask_B1RK: Tensor) -> Tensor:
        """``masked`` for queries that are folded into their groups already, head by head: [B, G, R, D]."""
        with self._dropout_generator():
            return F.scaled_dot_product_attention(
                query_BGRD, key_BGKD, value_BGKD, attn_mask=mask_B1RK, dropout_p=self.dropout if self.training else 0.0
            )

    def _dropout_generator(self) -> contextlib.AbstractContextManager[Any]:
        """TP ranks hold different heads and must drop differently; sequence parallelism has forked already."""
        drops = self.training and self.dropout > 0.0
        if drops and not self.config.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()


def additive_mask(visible_BSK: Tensor, share: int, dtype: torch.dtype) -> Tensor:
    """``visible_BSK`` (bool) for ``PlannedAttention.masked`` with ``share`` query heads per key group."""
    B, S, K = visible_BSK.shape
    if visible_BSK.is_cuda and K % _MASK_ROW:
        visible_BSK = F.pad(visible_BSK, (0, -K % _MASK_ROW))
    row = visible_BSK.shape[2]
    mask_BSK = torch.zeros(B, S, row, dtype=dtype, device=visible_BSK.device).masked_fill_(~visible_BSK, -torch.inf)
    return mask_BSK[:, None, None].expand(B, 1, share, S, row).reshape(B, 1, share * S, row)[..., :K]


class PositionedRotary(RotaryEmbedding):
    """megatron's rotary embedding with the positions of an attention plan; without one, indices in the row.

    Under a plan megatron's layers get no angles: the core attention turns queries and keys, by tables of the plan.
    """

    def __init__(self, shape: Backbone) -> None:
        super().__init__(kv_channels=shape.kv_channels, rotary_percent=1.0, rotary_base=shape.rope_theta)
        device = torch.cuda.current_device()
        self.inv_freq = inverse_frequencies(shape.kv_channels, shape.rope_theta, shape.rope_scaling).to(device)

    def get_rotary_seq_len(self, *arguments: Any, **named: Any) -> int | AttentionPlan:
        """The argument that megatron passes to ``forward``: the plan, or the length of the rows."""
        plan = next((value for value in (*arguments, *named.values()) if isinstance(value, AttentionPlan)), None)
        return super().get_rotary_seq_len(*arguments, **named) if plan is None else plan

    def forward(self, place: int | AttentionPlan, offset: int = 0, **unused: object) -> Tensor | None:
        """Angles [S, 1, 1, dim] of positions ``offset ..`` of rows of this length; for a plan None."""
        if isinstance(place, AttentionPlan):
            place.rotate_by(self)
            return None
        return self.angles(torch.arange(offset, offset + place, device=self.inv_freq.device))

    def angles(self, position_S: Tensor) -> Tensor:
        """Angles [S, 1, 1, dim] of positions, those of the pairs twice."""
        angles = position_S[:, None].to(self.inv_freq.dtype) * self.inv_freq
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
