"""SASRec (arXiv 1808.09781): causal self-attention over the history, read at its newest item."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tawin_nemo.baselines.protocol import INIT_STD, EmbeddingRecommender, last_of, left_aligned


class SASRec(EmbeddingRecommender):
    """Pre-norm transformer blocks with a feed-forward width of ``hidden``, as in the paper; input embeddings score.

    Positions count from the newest item, which is what the paper's left padding amounts to. The state is read at the
    newest item only: every shorter history is a training row of its own in sliding-window data.
    """

    def __init__(
        self,
        num_items: int,
        *,
        hidden: int,
        layers: int,
        heads: int,
        max_history: int,
        dropout: float,
        text_IE: Tensor | None = None,
    ) -> None:
        super().__init__(num_items, hidden, dropout, text_IE=text_IE)
        self.positions = nn.Embedding(max_history, hidden)
        nn.init.normal_(self.positions.weight, std=INIT_STD)
        block = nn.TransformerEncoderLayer(
            hidden, heads, dim_feedforward=hidden, dropout=dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(hidden), enable_nested_tensor=False)
        for part in self.blocks.parameters():  # TransformerEncoder starts all its layers as copies of the first
            if part.dim() > 1:
                nn.init.xavier_uniform_(part)

    def state(self, history_BL: Tensor) -> Tensor:
        """The user vector [B, D]: the last block's output at the newest item of ``history_BL`` (left-padded)."""
        rows_BL, length_B = left_aligned(history_BL[:, -self.positions.num_embeddings :])
        longest = rows_BL.shape[1]
        age_BL = (length_B.unsqueeze(1) - 1 - torch.arange(longest, device=rows_BL.device)).clamp(min=0)
        inputs_BLD = self.dropout(self.embed(rows_BL) + self.positions(age_BL))
        causal_LL = torch.ones(longest, longest, dtype=torch.bool, device=rows_BL.device).triu(1)
        return last_of(self.blocks(inputs_BLD, mask=causal_LL), length_B)
