"""HSTU, hierarchical sequential transduction units (arXiv 2402.17152): pointwise attention with gating.

Axes: B rows, L items (M: attended ones), H heads, D width, E width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tawin_nemo.baselines.protocol import INIT_STD, CausalRecommender


class HSTULayer(nn.Module):
    """One unit, with a residual connection around it (Section 3, Eq. 1-3)::

        U, V, Q, K = split(silu(f1(norm(X))))                       (1)
        A V        = silu(Q K^T + rab) V / N, causal                (2)
        Y          = f2(norm(A V) * U)                              (3)

    Attention weights are not normalised over the items, so they tell how many items match. N is ``max_history``. The
    heads share ``rab``, a learned bias of the distance between two items. The paper's second bias, of the time between
    two items, is omitted: prepared data hold the time of a row's target alone, and requests hold none.
    """

    def __init__(self, hidden: int, *, heads: int, max_history: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.max_history = heads, max_history
        self.norm_input = nn.LayerNorm(hidden, elementwise_affine=False)
        self.norm_output = nn.LayerNorm(hidden, elementwise_affine=False)
        self.project = nn.Linear(hidden, 4 * hidden, bias=False)
        self.distance_bias = nn.Parameter(torch.empty(max_history))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, hidden)
        nn.init.normal_(self.project.weight, std=INIT_STD)
        nn.init.normal_(self.distance_bias, std=INIT_STD)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The unit's output [B, L, D]; position l reads positions 0 .. l."""
        u_BLD, v_BLD, q_BLD, k_BLD = F.silu(self.project(self.norm_input(x_BLD))).chunk(4, dim=-1)
        q_BHLE, k_BHLE, v_BHLE = (self._split(part) for part in (q_BLD, k_BLD, v_BLD))
        place_L = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        distance_LM = place_L.unsqueeze(1) - place_L
        score_BHLM = q_BHLE @ k_BHLE.transpose(-1, -2) + self.distance_bias[distance_LM.clamp(min=0)]
        weight_BHLM = (F.silu(score_BHLM) / self.max_history).masked_fill(distance_LM < 0, 0.0)
        read_BLD = (weight_BHLM @ v_BHLE).transpose(1, 2).flatten(2)
        return x_BLD + self.out(self.dropout(self.norm_output(read_BLD) * u_BLD))

    def _split(self, x_BLD: Tensor) -> Tensor:
        """[B, H, L, E]"""
        return x_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class HSTU(CausalRecommender):
    """Item embeddings times sqrt(D) plus a learned position, counted from the oldest item, and ``layers`` units.

    The authors rank by cosines over a temperature of 0.05 and train with sampled softmax (``baseline.temperature``,
    ``baseline.loss=sampled_softmax``).
    """

    def __init__(
        self, num_items: int, *, hidden: int, layers: int, heads: int, max_history: int, dropout: float,
        temperature: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(num_items, hidden, dropout, temperature=temperature)
        self.max_history = max_history
        self.positions = nn.Embedding(max_history, hidden)
        nn.init.normal_(self.positions.weight, std=INIT_STD)
        self.layers = nn.ModuleList(
            HSTULayer(hidden, heads=heads, max_history=max_history, dropout=dropout) for _ in range(layers)
        )

    def states(self, items_BL: Tensor) -> Tensor:
        """The last unit's output [B, L, D] at each item of left-aligned rows."""
        place_L = torch.arange(items_BL.shape[1], device=items_BL.device)
        embedded_BLD = self.embed(items_BL) * math.sqrt(self.items.weight.shape[1])
        x_BLD = self.dropout(embedded_BLD + self.positions(place_L))
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return x_BLD
