"""Caser (arXiv 1809.07426): convolutions over the matrix of the newest L item embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tawin_nemo.baselines.protocol import EmbeddingRecommender
from tawin_nemo.types import NO_ITEM

#: Filters of each height, and vertical filters (the paper tries 4 .. 64 and 1 .. 16).
HORIZONTAL, VERTICAL = 16, 4


class Caser(EmbeddingRecommender):
    """Horizontal filters of every height 1 .. L with max pooling, vertical filters, one dense layer (Eq. 4-10).

    ``window`` is L; shorter histories are filled with zero vectors, longer ones lose their oldest items. The paper's
    user embedding is omitted: rows differ by their history alone, as for the other models. Output vectors
    and biases are their own table, as in the paper.
    """

    def __init__(self, num_items: int, *, hidden: int, window: int, dropout: float) -> None:
        super().__init__(num_items, hidden, dropout, tied=False)
        self.window = window
        self.horizontal = nn.ModuleList(nn.Conv1d(hidden, HORIZONTAL, height) for height in range(1, window + 1))
        self.vertical = nn.Linear(window, VERTICAL, bias=False)
        self.dense = nn.Linear(HORIZONTAL * window + VERTICAL * hidden, hidden)

    def state(self, history_BL: Tensor) -> Tensor:
        """The user vector [B, D] from the last ``window`` items of ``history_BL`` (left-padded with ``NO_ITEM``)."""
        missing = max(0, self.window - history_BL.shape[1])
        rows_BL = F.pad(history_BL[:, -self.window :], (missing, 0), value=NO_ITEM)
        image_BDL = self.embed(rows_BL).transpose(1, 2)
        pooled = [F.relu(filters(image_BDL)).amax(dim=2) for filters in self.horizontal]
        columns_BR = self.vertical(image_BDL).flatten(1)
        return F.relu(self.dense(self.dropout(torch.cat([*pooled, columns_BR], dim=1))))
