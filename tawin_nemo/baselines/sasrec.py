"""SASRec (arXiv 1808.09781): causal self-attention over the history, read at its newest item."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tawin_nemo.baselines.protocol import INIT_STD, CausalRecommender
from tawin_nemo.types import NO_ITEM


class SASRec(CausalRecommender):
    """Pre-norm transformer blocks with a feed-forward width of ``hidden``, as in the paper; input embeddings score.

    ``positions_from``: with "newest", positions count from the newest item, which is what the paper's left padding
    amounts to for a history; every shorter history is then a training row of its own. With "oldest" they count from the
    first item, so that the state at an item is the same in a longer sequence (``baseline.training=sequences``).
    """

    def __init__(
        self, num_items: int, *, hidden: int, layers: int, heads: int, max_history: int, dropout: float,
        positions_from: str = "newest", temperature: float = 0.0, text_IE: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_items, hidden, dropout, temperature=temperature, text_IE=text_IE)
        self.max_history, self.positions_from = max_history, positions_from
        self.positions = nn.Embedding(max_history, hidden)
        nn.init.normal_(self.positions.weight, std=INIT_STD)
        block = nn.TransformerEncoderLayer(
            hidden, heads, dim_feedforward=hidden, dropout=dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(hidden), enable_nested_tensor=False)
        for part in self.blocks.parameters():  # TransformerEncoder starts all its layers as copies of the first
            if part.dim() > 1:
                nn.init.xavier_uniform_(part)

    def states(self, items_BL: Tensor) -> Tensor:
        """The last block's output [B, L, D] at each item of left-aligned rows.

        With positions from the newest item, the state at this item alone is that of a history.
        """
        longest = items_BL.shape[1]
        place_BL = torch.arange(longest, device=items_BL.device).expand(items_BL.shape)
        if self.positions_from == "newest":
            length_B = (items_BL != NO_ITEM).sum(dim=1)
            place_BL = (length_B.unsqueeze(1) - 1 - place_BL).clamp(min=0)
        inputs_BLD = self.dropout(self.embed(items_BL) + self.positions(place_BL))
        causal_LL = torch.ones(longest, longest, dtype=torch.bool, device=items_BL.device).triu(1)
        return self.blocks(inputs_BLD, mask=causal_LL)
