"""Attention over packed token trees (``TokenBatch``), one padded block per prompt: chains causal, trees masked.

Two exact calls replace one over the flat row: the chain of every prompt attends to itself with the causal kernel, the
tree's tokens attend to their chain and their ancestors with a mask. Padding exists in the attention only, not in the
linear layers. A block has the columns of all chains first, then those of all trees; where its cells lie is worked out
on the host, once for all layers.

Axes: S tokens of the flat row, B prompts, T columns of a part of a block, Q queries, K keys and columns of a block, H
query heads, G key/value groups, D dimension of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tawin_nemo.models.megatron.model.attention import AttentionPlan, PlannedAttention, additive_mask
from tawin_nemo.types import TokenBatch
from tawin_nemo.util.transfers import to_device

#: A padding query's place in the flat row, behind all tokens, and the end of what sees a chain, behind that.
_BEHIND, _NEVER = 2**40, 2**41


class TreePlan(AttentionPlan):
    """For the S tokens of a batch, and ``padding`` further tokens behind them, to which no token attends."""

    def __init__(self, batch: TokenBatch, device: torch.device, padding: int = 0) -> None:
        chain_B, tree_B, end_S = batch.chain_B.cpu(), batch.tree_B.cpu(), batch.end_S.cpu()
        start_B = (chain_B + tree_B).cumsum(0) - (chain_B + tree_B)
        chain_BT, tree_BT = _places(start_B, chain_B), _places(start_B + chain_B, tree_B)
        place_BK = torch.cat([chain_BT, tree_BT], dim=1)
        self._columns = [chain_BT.shape[1], tree_BT.shape[1]]
        cell_X = (place_BK.flatten() >= 0).nonzero()[:, 0]
        cell_S = torch.zeros(len(end_S) + padding, dtype=torch.long)
        cell_S[place_BK.flatten()[cell_X]] = cell_X
        # the tokens that see a key: of a chain all behind it in the block, of a tree those before the key's end
        last_BK = end_S[place_BK.clamp(min=0)]
        last_BK[:, : self._columns[0]] = _NEVER
        query_BQ = tree_BT.masked_fill(tree_BT < 0, _BEHIND)  # sees its chain: a softmax over nothing is not a number
        position_S, self._place_BK, self._cell_S, query_BQ, last_BK = to_device(
            [
                torch.nn.functional.pad(batch.position_S.cpu(), (0, padding)),
                place_BK.clamp(min=0),  # padding repeats token 0 of the flat row: any real token does
                cell_S,
                query_BQ,
                last_BK.masked_fill(place_BK < 0, 0),
            ],
            device,
        )
        super().__init__(position_S)
        self._visible_BQK = (self._place_BK[:, None] <= query_BQ[..., None]) & (query_BQ[..., None] < last_BK[:, None])
        self._mask: Tensor | None = None

    def attend(self, core: PlannedAttention, query_SHD: Tensor, key_SGD: Tensor, value_SGD: Tensor) -> Tensor:
        groups = key_SGD.shape[1]
        query, key, value = (self._block(x) for x in (query_SHD, key_SGD, value_SGD))
        chain_query, tree_query = query.split(self._columns, dim=2)
        chain = self._columns[0]
        parts = [core.causal(chain_query, key[:, :, :chain], value[:, :, :chain]).unflatten(1, (groups, -1))]
        if self._columns[1]:
            folded_BGRD = tree_query.unflatten(1, (groups, -1)).flatten(2, 3)
            mask = self._additive(query_SHD.shape[1] // groups, query_SHD.dtype)
            output_BGRD = core.folded(folded_BGRD, key, value, mask)
            parts.append(output_BGRD.unflatten(2, (-1, self._columns[1])))
        # [B, K, G, H / G, D], straight from the layouts of the two calls
        output = torch.cat([part.permute(0, 3, 1, 2, 4) for part in parts], dim=1)
        return output.flatten(2, 3).flatten(0, 1).index_select(0, self._cell_S)

    def _block(self, x_SHD: Tensor) -> Tensor:
        """The tokens of all cells, [B, H, K, D]."""
        B, K = self._place_BK.shape
        return x_SHD.index_select(0, self._place_BK.flatten()).view(B, K, *x_SHD.shape[1:]).transpose(1, 2)

    def _additive(self, share: int, dtype: torch.dtype) -> Tensor:
        """The additive mask of the tree's tokens, computed once for all layers."""
        if self._mask is None or self._mask.dtype != dtype:
            self._mask = additive_mask(self._visible_BQK, share, dtype)
        return self._mask


def _places(start_B: Tensor, length_B: Tensor) -> Tensor:
    """B runs of consecutive tokens of the flat row as a padded block [B, T] of their places in it, -1 for padding.

    >>> _places(torch.tensor([0, 3]), torch.tensor([2, 1])).tolist()
    [[0, 1], [3, -1]]
    """
    column_T = torch.arange(int(length_B.max()))
    return torch.where(column_T < length_B[:, None], start_B[:, None] + column_T, -1)
