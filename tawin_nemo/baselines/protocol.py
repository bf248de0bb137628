"""The interface of sequential recommenders: histories in, scores of all items out, a loss per row.

A history is a row of item indices, oldest first, padded on the left with NO_ITEM (``left_padded`` makes such rows).
Padding has no influence on any result, whatever its width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tawin_nemo.baselines.sampled_softmax import SharedNegatives, sampled_softmax_loss
from tawin_nemo.types import NO_ITEM, TokenRows

#: Standard deviation of fresh embeddings.
INIT_STD = 0.02


def softmax_loss(scores_BI: Tensor, target_B: Tensor) -> Tensor:
    """``-log softmax(scores)[target]`` over all items. [B]"""
    return F.cross_entropy(scores_BI, target_B, reduction="none")


def bce_loss(positive_B: Tensor, negatives_BN: Tensor) -> Tensor:
    """``-log sigmoid(positive) - mean_n log(1 - sigmoid(negative_n))`` (SASRec, arXiv 1808.09781, Eq. 7). [B]

    With one negative this is the paper's loss; more are averaged, so that both parts keep their weight.
    """
    return F.softplus(-positive_B) + F.softplus(negatives_BN).mean(dim=1)


def sample_negatives(target_B: Tensor, num_items: int, count: int) -> Tensor:
    """``count`` items per row, uniform over all items but the target, with replacement. [B, count]

    Draws from torch's global generator of the target's device. Raises ValueError for a catalog of one item.
    """
    if num_items < 2:
        raise ValueError(f"a negative needs a second item, the catalog has {num_items}")
    draw_BN = torch.randint(num_items - 1, (len(target_B), count), device=target_B.device)
    return draw_BN + (draw_BN >= target_B.unsqueeze(1)).long()


class SequentialRecommender(nn.Module, ABC):
    """Ranks the I items of a catalog for a history."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items
        representative_I = torch.arange(num_items)
        #: For each item the item that represents it in rankings: itself, unless a model confuses some items.
        self.register_buffer("representative_I", representative_I, persistent=False)
        self.representative_I: Tensor

    @abstractmethod
    def scores(self, history_BL: Tensor, width: int | None = None) -> Tensor:
        """Scores [B, I], higher is better, -inf for items that the model does not list; call it in eval mode.

        ``width`` is the beam width of models that search (None = their default); the others score all items.
        """

    @abstractmethod
    def loss(
        self, history_BL: Tensor, target_B: Tensor, negatives: Tensor | SharedNegatives | None = None
    ) -> Tensor:  # fmt: skip
        """Loss of each row [B]: softmax over all items or SharedNegatives; binary with ``negatives`` [B, N]."""


class TextItems(nn.Module):
    """Item vectors as projections of fixed vectors of the item texts (MoRec, arXiv 2303.13835).

    It takes the place of an ``nn.Embedding`` whose row 0 is padding and whose row i + 1 is item i. Only the projection
    is trained; it is all that a checkpoint holds. N rows of the table, E dimensions of the text vectors.
    """

    def __init__(self, text_IE: Tensor, hidden: int) -> None:
        super().__init__()
        self.register_buffer("text_NE", F.pad(text_IE.float(), (0, 0, 1, 0)), persistent=False)
        self.text_NE: Tensor
        self.project = nn.Linear(text_IE.shape[1], hidden)

    @property
    def weight(self) -> Tensor:
        """The table [I + 1, D] that an embedding would have; row 0 is 0."""
        return self(torch.arange(len(self.text_NE), device=self.text_NE.device))

    def forward(self, index: Tensor) -> Tensor:
        """Vectors [..., D] of the rows ``index``; exactly 0 at row 0."""
        vectors: Tensor = self.project(self.text_NE[index])
        return vectors.masked_fill((index == 0).unsqueeze(-1), 0.0)


class EmbeddingRecommender(SequentialRecommender):
    """Score = inner product of a state of the history with a vector of the item.

    ``tied``: the item's vector is its input embedding; else it has an output vector and a bias of its own.
    ``temperature`` > 0, for tied vectors: the score is the cosine of both, divided by it. ``text_IE``: vectors of the
    item texts, from which the item vectors are projected (``TextItems``), instead of a table.
    """

    def __init__(
        self, num_items: int, hidden: int, dropout: float, *, tied: bool = True, temperature: float = 0.0,
        text_IE: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_items)
        self.temperature = temperature
        self.items: nn.Embedding | TextItems
        self.dropout = nn.Dropout(dropout)
        if text_IE is None:
            self.items = nn.Embedding(num_items + 1, hidden, padding_idx=0)  # row 0 is padding, row i + 1 is item i
            nn.init.normal_(self.items.weight, std=INIT_STD)
            nn.init.zeros_(self.items.weight[0])
        else:
            self.items = TextItems(text_IE, hidden)
        self.output = None if tied else nn.Linear(hidden, num_items)
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=INIT_STD)
            nn.init.zeros_(self.output.bias)

    @abstractmethod
    def state(self, history_BL: Tensor) -> Tensor:
        """The user vector [B, D] that is multiplied with item vectors."""

    def embed(self, history_BL: Tensor) -> Tensor:
        """Item embeddings [B, L, D]; exactly 0 at padding."""
        return self.items(history_BL + 1)

    def scores(self, history_BL: Tensor, width: int | None = None) -> Tensor:
        """Scores [B, I] of the states of the histories; ``width`` is not used."""
        return self._all_scores(self.state(history_BL))

    def loss(
        self, history_BL: Tensor, target_B: Tensor, negatives: Tensor | SharedNegatives | None = None
    ) -> Tensor:  # fmt: skip
        """Loss of each row [B]; see ``state_loss``."""
        return self.state_loss(self.state(history_BL), target_B, negatives)

    def state_loss(
        self, state_MD: Tensor, target_M: Tensor, negatives: Tensor | SharedNegatives | None = None
    ) -> Tensor:  # fmt: skip
        """Loss of each state [M]: ``softmax_loss`` over all items; with negatives [M, N] ``bce_loss``; with
        SharedNegatives ``sampled_softmax_loss``."""
        if negatives is None:
            return softmax_loss(self._all_scores(state_MD), target_M)
        if isinstance(negatives, SharedNegatives):
            own_M, shared_MN = self._own_and_shared(state_MD, target_M, negatives.items_N)
            return sampled_softmax_loss(own_M, shared_MN, target_M, negatives)
        scores_MN = self._scores_of(state_MD, torch.cat([target_M.unsqueeze(1), negatives], dim=1))
        return bce_loss(scores_MN[:, 0], scores_MN[:, 1:])

    def _all_scores(self, state_MD: Tensor) -> Tensor:
        """Scores of all items [M, I]."""
        if self.output is not None:
            return self.output(state_MD)
        if self.temperature:
            state_MD = F.normalize(state_MD, dim=-1) / self.temperature
            return state_MD @ F.normalize(self.items.weight[1:], dim=-1).T
        return state_MD @ self.items.weight[1:].T

    def _own_and_shared(self, state_MD: Tensor, target_M: Tensor, items_N: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of each state's target [M], and of ``items_N`` [M, N], which all states share.

        All vectors come from one look-up, whose gradient is as large as the table.
        """
        items_R = torch.cat([target_M, items_N])
        vector_RD = self.items(items_R + 1) if self.output is None else self.output.weight[items_R]
        if self.temperature:
            state_MD, vector_RD = F.normalize(state_MD, dim=-1) / self.temperature, F.normalize(vector_RD, dim=-1)
        target_MD, shared_ND = vector_RD.split([len(target_M), len(items_N)])
        own_M, shared_MN = (state_MD * target_MD).sum(dim=1), state_MD @ shared_ND.T
        if self.output is None:
            return own_M, shared_MN
        return own_M + self.output.bias[target_M], shared_MN + self.output.bias[items_N]

    def _scores_of(self, state_BD: Tensor, items_BM: Tensor) -> Tensor:
        """Scores [B, M] of the items ``items_BM``, which each state has of its own."""
        if self.output is not None:
            return torch.einsum("bd,bmd->bm", state_BD, self.output.weight[items_BM]) + self.output.bias[items_BM]
        vector_BMD = self.items(items_BM + 1)
        if self.temperature:
            state_BD, vector_BMD = F.normalize(state_BD, dim=-1) / self.temperature, F.normalize(vector_BMD, dim=-1)
        return torch.einsum("bd,bmd->bm", state_BD, vector_BMD)


class CausalRecommender(EmbeddingRecommender):
    """A state at every item of a history, which depends on this item and those before it alone.

    So a sequence of L items gives L states in one pass. ``max_history`` is the longest sequence.
    """

    max_history: int

    @abstractmethod
    def states(self, items_BL: Tensor) -> Tensor:
        """State [B, L, D] at each item of left-aligned rows with L <= ``max_history``; arbitrary behind their ends."""

    def state(self, history_BL: Tensor) -> Tensor:
        """The user vector [B, D]: the state at the newest item of ``history_BL`` (left-padded)."""
        items_BL, length_B = left_aligned(history_BL[:, -self.max_history :])
        return last_of(self.states(items_BL), length_B)

    def sequence_loss(
        self, items_BL: Tensor, target_BL: Tensor, negatives: Tensor | SharedNegatives | None = None
    ) -> Tensor:  # fmt: skip
        """Loss [M] of the M targets of left-aligned sequences, row by row; ``target_BL`` is NO_ITEM where none is.

        ``negatives``: as in ``state_loss``, [M, N] in the order of the targets.
        """
        is_target_BL = target_BL != NO_ITEM
        return self.state_loss(self.states(items_BL)[is_target_BL], target_BL[is_target_BL], negatives)


def left_padded(rows: TokenRows) -> Tensor:
    """B ragged histories as ``history_BL`` [B, longest], padded on the left with NO_ITEM.

    >>> left_padded(TokenRows.from_lists([[4], [7, 8, 9]])).tolist()
    [[-1, -1, 4], [7, 8, 9]]
    """
    lengths_B = rows.lengths
    longest = int(lengths_B.max(initial=0))
    history_BL = np.full((len(rows), longest), NO_ITEM, dtype=np.int64)
    history_BL[np.arange(longest) >= longest - lengths_B[:, None]] = rows.flat
    return torch.from_numpy(history_BL)


def left_aligned(history_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of left-padded histories behind the items; also returns ``length_B``.

    A causal model that reads such a row meets no padding before its last item.

    >>> left_aligned(torch.tensor([[-1, -1, 4], [7, 8, 9]]))[0].tolist()
    [[4, -1, -1], [7, 8, 9]]
    """
    longest = history_BL.shape[1]
    length_B = (history_BL != NO_ITEM).sum(dim=1)
    column_BL = torch.arange(longest, device=history_BL.device) + (longest - length_B).unsqueeze(1)
    moved_BL = history_BL.gather(1, column_BL.clamp(max=longest - 1))
    return moved_BL.masked_fill(column_BL >= longest, NO_ITEM), length_B


def last_of(hidden_BLD: Tensor, length_B: Tensor) -> Tensor:
    """Hidden state [B, D] at each left-aligned row's last item."""
    return hidden_BLD[torch.arange(len(hidden_BLD), device=hidden_BLD.device), (length_B - 1).clamp(min=0)]
