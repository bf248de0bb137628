"""Core attention of every layer: torch's scaled dot product, told by a shared context what a query may see.

Training sets nothing in the context: rows are right-padded, so plain causal attention is exact for the real tokens.
Decoding puts a key-value store and a boolean mask there; a tree of candidates in one row puts a mask alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class KeyValueStore(Protocol):
    """Where decoding keeps keys and values; [B, heads, slots, dim] per layer."""

    def append(self, layer: int, key_BHSD: Tensor, value_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Store this step's keys and values of the layer; returns everything stored for it."""


@dataclass
class AttentionContext:
    """What all layers of one model attend to in this forward pass; all empty = causal attention over the rows.

    ``positions_BT`` are rotary positions; ``store`` receives keys and values and supplies the earlier ones;
    ``mask_BSK`` (bool, True = visible) says which of the K keys each of the S queries sees.
    """

    positions_BT: Tensor | None = None
    store: KeyValueStore | None = None
    mask_BSK: Tensor | None = None

    @contextlib.contextmanager
    def using(self, **fields: Any) -> Iterator[None]:
        """Set the given fields for the passes inside the block."""
        before = replace(self)
        try:
            for name, value in fields.items():
                setattr(self, name, value)
            yield
        finally:
            self.positions_BT, self.store, self.mask_BSK = before.positions_BT, before.store, before.mask_BSK


class ContextAttention(MegatronModule):
    """Grouped-query attention after RoPE; fits the ``core_attention`` place of megatron's layer specs."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, context: AttentionContext, **unused: object
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.context = context
        self.dropout = float(config.attention_dropout)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **unused: object
    ) -> Tensor:
        """``query`` [S, B, heads, dim], ``key`` and ``value`` [S, B, groups, dim] -> [S, B, heads * dim]."""
        query_BHSD, key_BHKD, value_BHKD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.context.store is not None:
            key_BHKD, value_BHKD = self.context.store.append(self.layer_number, key_BHKD, value_BHKD)
        mask_BSK = self.context.mask_BSK
        if mask_BSK is None:
            output_BHSD = self._causal(query_BHSD, key_BHKD, value_BHKD)
        else:
            output_BHSD = self._masked(query_BHSD, key_BHKD, value_BHKD, mask_BSK)
        return output_BHSD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _causal(self, query_BHSD: Tensor, key_BHKD: Tensor, value_BHKD: Tensor) -> Tensor:
        with self._dropout_generator():
            return F.scaled_dot_product_attention(
                query_BHSD,
                key_BHKD,
                value_BHKD,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=True,
                enable_gqa=query_BHSD.shape[1] != key_BHKD.shape[1],
            )

    def _masked(self, query_BHSD: Tensor, key_BHKD: Tensor, value_BHKD: Tensor, mask_BSK: Tensor) -> Tensor:
        # The query heads of one group become further queries of that group: no copy of the keys, and the fast kernels
        # that take a mask but no grouped heads stay usable.
        B, heads, S, dim = query_BHSD.shape
        groups = key_BHKD.shape[1]
        share = heads // groups
        folded = query_BHSD.reshape(B, groups, share * S, dim)
        mask = mask_BSK[:, None, None].expand(B, 1, share, S, -1).reshape(B, 1, share * S, -1)
        with self._dropout_generator():
            output = F.scaled_dot_product_attention(
                folded, key_BHKD, value_BHKD, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
            )
        return output.reshape(B, heads, S, dim)

    def _dropout_generator(self) -> contextlib.AbstractContextManager[Any]:
        """TP ranks hold different heads and must drop differently; sequence parallelism has forked already."""
        drops = self.training and self.dropout > 0.0
        if drops and not self.config.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()


def attention_context(model: torch.nn.Module) -> AttentionContext:
    """The context that the layers of this model share (the model may be wrapped)."""
    for module in model.modules():
        if isinstance(module, ContextAttention):
            return module.context
    raise ValueError(f"{type(model).__name__} has no ContextAttention layer on this pipeline stage")
