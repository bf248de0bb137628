"""GRU4Rec (arXiv 1511.06939): the state is a gated recurrent unit's last output."""

from __future__ import annotations

from torch import Tensor, nn

from tawin_nemo.baselines.protocol import EmbeddingRecommender, last_of, left_aligned


class GRU4Rec(EmbeddingRecommender):
    """Item embeddings, ``layers`` GRU layers, a linear map back to the embeddings' space.

    Input and output embeddings are one table (the "constrained embedding" of the authors' later work, arXiv
    1706.03847), which suits small data.
    """

    def __init__(
        self, num_items: int, *, hidden: int, layers: int, dropout: float, text_IE: Tensor | None = None
    ) -> None:
        super().__init__(num_items, hidden, dropout, text_IE=text_IE)
        self.gru = nn.GRU(hidden, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.out = nn.Linear(hidden, hidden)

    def state(self, history_BL: Tensor) -> Tensor:
        """The user vector [B, D]: the GRU's hidden state after the newest item of ``history_BL`` (left-padded)."""
        rows_BL, length_B = left_aligned(history_BL)
        hidden_BLD, _ = self.gru(self.dropout(self.embed(rows_BL)))
        return self.out(self.dropout(last_of(hidden_BLD, length_B)))
