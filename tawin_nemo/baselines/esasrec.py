"""eSASRec (arXiv 2508.06450): SASRec's objective with LiGR layers and sampled softmax.

Axes: B rows, L items, H heads, D width, E width of a head, F feed-forward width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tawin_nemo.baselines.protocol import INIT_STD, CausalRecommender

#: Feed-forward width, in units of ``hidden``.
WIDENING = 4


class LiGRLayer(nn.Module):
    """A transformer layer whose residual branches are gated by their input (LiGR, arXiv 2502.03417)::

        X = X + sigmoid(X Wa + ba) * attention(norm(X))
        X = X + sigmoid(X Wf + bf) * feed_forward(norm(X))
        feed_forward(Z) = (silu(Z W1) * (Z W2)) W3                  (SwiGLU, arXiv 2002.05202)

    Attention is causal softmax attention.
    """

    def __init__(self, hidden: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.merge = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.gate_attention, self.gate_feed = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.widen = nn.Linear(hidden, 2 * WIDENING * hidden, bias=False)
        self.narrow = nn.Linear(WIDENING * hidden, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        for part in self.parameters():
            if part.dim() > 1:
                nn.init.xavier_uniform_(part)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The layer's output [B, L, D]; position l reads positions 0 .. l."""
        gate_BLD = torch.sigmoid(self.gate_attention(x_BLD))
        x_BLD = x_BLD + gate_BLD * self.dropout(self._attention(self.norm_attention(x_BLD)))
        gate_BLD = torch.sigmoid(self.gate_feed(x_BLD))
        return x_BLD + gate_BLD * self.dropout(self._feed_forward(self.norm_feed(x_BLD)))

    def _attention(self, z_BLD: Tensor) -> Tensor:
        parts = self.qkv(z_BLD).unflatten(-1, (3, self.heads, -1)).unbind(dim=2)
        q_BHLE, k_BHLE, v_BHLE = (part.transpose(1, 2) for part in parts)
        dropout = self.dropout.p if self.training else 0.0
        read_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, dropout_p=dropout, is_causal=True)
        return self.merge(read_BHLE.transpose(1, 2).flatten(2))

    def _feed_forward(self, z_BLD: Tensor) -> Tensor:
        gate_BLF, value_BLF = self.widen(z_BLD).chunk(2, dim=-1)
        return self.narrow(self.dropout(F.silu(gate_BLF) * value_BLF))


class ESASRec(CausalRecommender):
    """Item embeddings plus a learned position and ``layers`` LiGR layers; input embeddings score.

    Positions count from the oldest item, in which this differs from the authors' code: there they count from the newest
    item of a training sequence, and what a position means differs between training and ranking.
    """

    def __init__(
        self, num_items: int, *, hidden: int, layers: int, heads: int, max_history: int, dropout: float,
        temperature: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(num_items, hidden, dropout, temperature=temperature)
        self.max_history = max_history
        self.positions = nn.Embedding(max_history, hidden)
        nn.init.normal_(self.positions.weight, std=INIT_STD)
        self.layers = nn.ModuleList(LiGRLayer(hidden, heads=heads, dropout=dropout) for _ in range(layers))

    def states(self, items_BL: Tensor) -> Tensor:
        """The last layer's output [B, L, D] at each item of left-aligned rows."""
        place_L = torch.arange(items_BL.shape[1], device=items_BL.device)
        x_BLD = self.dropout(self.embed(items_BL) + self.positions(place_L))
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return x_BLD
