"""Attention over packed token trees (``TokenBatch``), one padded block per prompt: chains causal, trees masked.

Two exact calls replace one over the flat row: the chain of every prompt attends to itself with the causal kernel, the
tree's tokens attend to their chain and their ancestors with a mask. Padding exists in the attention only, not in the
linear layers.

Axes: S tokens of the flat row, B prompts, T columns of a padded block, Q queries, K keys, H query heads, G key/value
groups, D dimension of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tawin_nemo.models.megatron.model.attention import AttentionPlan, PlannedAttention, additive_mask
from tawin_nemo.types import TokenBatch


class TreePlan(AttentionPlan):
    """For the S tokens of a batch, and ``padding`` further tokens behind them, to which no token attends."""

    def __init__(self, batch: TokenBatch, device: torch.device, padding: int = 0) -> None:
        position_S = torch.nn.functional.pad(batch.position_S.to(device), (0, padding))
        super().__init__(position_S)
        chain_B, tree_B = batch.chain_B.to(device), batch.tree_B.to(device)
        start_B = (chain_B + tree_B).cumsum(0) - (chain_B + tree_B)
        self.rows = len(position_S)
        self.chain = _Block(start_B, chain_B)
        self.tree = _Block(start_B + chain_B, tree_B) if int(tree_B.sum()) else None
        if self.tree is not None:
            self._visible_BSK = _visible(self.chain, self.tree, batch.end_S.to(device))
        self._mask: Tensor | None = None

    def attend(self, core: PlannedAttention, query_SHD: Tensor, key_SGD: Tensor, value_SGD: Tensor) -> Tensor:
        chain = [self.chain.padded(x) for x in (query_SHD, key_SGD, value_SGD)]
        parts = [self.chain.packed(core.causal(*chain))]
        indices = [self.chain.flat_S]
        if self.tree is not None:
            query, key, value = (self.tree.padded(x) for x in (query_SHD, key_SGD, value_SGD))
            key, value = torch.cat([chain[1], key], dim=2), torch.cat([chain[2], value], dim=2)
            mask = self._additive(query.shape[1] // key.shape[1], query.dtype)
            parts.append(self.tree.packed(core.masked(query, key, value, mask)))
            indices.append(self.tree.flat_S)
        output_SHD = query_SHD.new_zeros(query_SHD.shape)
        return output_SHD.index_copy(0, torch.cat(indices), torch.cat(parts))

    def _additive(self, share: int, dtype: torch.dtype) -> Tensor:
        """The additive mask of the tree's tokens, computed once for all layers."""
        if self._mask is None or self._mask.dtype != dtype:
            self._mask = additive_mask(self._visible_BSK, share, dtype)
        return self._mask


class _Block:
    """B runs of consecutive tokens of the flat row, as a padded [B, T] block and back."""

    def __init__(self, start_B: Tensor, length_B: Tensor) -> None:
        column_T = torch.arange(int(length_B.max()), device=start_B.device)
        self.inside_BT = column_T < length_B[:, None]
        # padding repeats token 0 of the flat row: any real token does, its output is never read
        self.index_BT = torch.where(self.inside_BT, start_B[:, None] + column_T, 0)
        self.flat_S = self.index_BT[self.inside_BT]
        self._cell_S = self.inside_BT.flatten().nonzero().squeeze(1)

    def padded(self, x_SHD: Tensor) -> Tensor:
        """The block's tokens as [B, H, T, D]."""
        B, T = self.index_BT.shape
        return x_SHD.index_select(0, self.index_BT.flatten()).view(B, T, *x_SHD.shape[1:]).transpose(1, 2)

    def packed(self, x_BHTD: Tensor) -> Tensor:
        """[tokens of the block, H, D], in the order of ``flat_S``."""
        return x_BHTD.transpose(1, 2).flatten(0, 1).index_select(0, self._cell_S)


def _visible(chain: _Block, tree: _Block, end_S: Tensor) -> Tensor:
    """``[B, Ts, Tc + Ts]``: tree tokens attend to their prompt's chain, their ancestors and themselves."""
    query_BQ1 = tree.index_BT[:, :, None]
    key_B1K = tree.index_BT[:, None, :]
    trees_BQK = tree.inside_BT[:, None, :] & (key_B1K <= query_BQ1) & (query_BQ1 < end_S[key_B1K])
    chains_BQK = chain.inside_BT[:, None, :].expand(-1, trees_BQK.shape[1], -1)
    return torch.cat([chains_BQK, trees_BQK], dim=2)
