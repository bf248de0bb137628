"""Core attention of every layer: torch's scaled dot product, told by a plan which tokens see which.

Without a plan, rows are right-padded and plain causal attention is exact for the real tokens. A plan travels through
megatron's layers in the place of ``packed_seq_params``, so that recomputation of activations and pipeline stages with
several micro-batches in flight each find their own. The linear layers know nothing of it: they see one flat row.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class AttentionPlan(PackedSeqParams):
    """Which of the S tokens of one flat row see which; ``position_S`` are their rotary positions."""

    def __init__(self, position_S: Tensor) -> None:
        # sbhd: megatron hands tensors on as they are, and leaves the plan itself to the core attention
        super().__init__(qkv_format="sbhd")
        self.position_S = position_S

    @abstractmethod
    def attend(self, core: PlannedAttention, query_SHD: Tensor, key_SGD: Tensor, value_SGD: Tensor) -> Tensor:
        """[S, H, D] from queries of H heads and keys and values of G groups."""


class PlannedAttention(MegatronModule):
    """Grouped-query attention after RoPE; fits the ``core_attention`` place of megatron's layer specs."""

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
        output_SHD = packed_seq_params.attend(self, query[:, 0], key[:, 0], value[:, 0])
        return output_SHD.reshape(S, 1, -1)

    def causal(self, query_BHSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> Tensor:
        """Every row for itself, from its beginning."""
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
        """``mask_B1RK``: 0 where visible, -inf elsewhere, R = (H / G) * S (see ``additive_mask``)."""
        # The query heads of one group become further queries of that group: no copy of the keys, and the fast kernels
        # that take a mask but no grouped heads stay usable.
        B, heads, S, dim = query_BHSD.shape
        folded = query_BHSD.reshape(B, key_BGKD.shape[1], -1, dim)
        with self._dropout_generator():
            output = F.scaled_dot_product_attention(
                folded, key_BGKD, value_BGKD, attn_mask=mask_B1RK, dropout_p=self.dropout if self.training else 0.0
            )
        return output.reshape(B, heads, S, dim)

    def _dropout_generator(self) -> contextlib.AbstractContextManager[Any]:
        """TP ranks hold different heads and must drop differently; sequence parallelism has forked already."""
        drops = self.training and self.dropout > 0.0
        if drops and not self.config.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()


def additive_mask(visible_BSK: Tensor, share: int, dtype: torch.dtype) -> Tensor:
    """``visible_BSK`` (bool) for ``PlannedAttention.masked`` with ``share`` query heads per key group."""
    B, S, K = visible_BSK.shape
    mask_BSK = torch.zeros(B, S, K, dtype=dtype, device=visible_BSK.device).masked_fill_(~visible_BSK, -torch.inf)
    return mask_BSK[:, None, None].expand(B, 1, share, S, K).reshape(B, 1, share * S, K)
