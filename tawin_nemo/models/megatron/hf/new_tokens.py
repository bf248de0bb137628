"""Rows of embedding and LM head for tokens that the pretrained weights do not know: how they begin, and how they alone
are trained.

A published vocabulary has spare rows behind its last token, so a new token may lie inside the file's matrix: which
tokens are new is told by the tokenizers, not by the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from scipy.sparse import csr_matrix
from torch import Tensor

from tawin_nemo.models.megatron.hf.files import ROWS_AT_ONCE, HfWeights
from tawin_nemo.types import TokenRows


@dataclass(frozen=True)
class NewTokens:
    """``ids`` ascending. ``words``: for each of them the known tokens whose mean it begins with; an empty row, or no
    ``words`` at all, stands for the mean of all rows of the file (Hewitt 2021, "Initializing New Word Embeddings")."""

    ids: np.ndarray
    words: TokenRows | None = None

    def local(self, first_row: int, rows: int) -> np.ndarray:
        """Which of them (places in ``ids``) a shard holds whose rows begin at ``first_row``."""
        return np.flatnonzero((self.ids >= first_row) & (self.ids < first_row + rows))

    def local_rows(self, first_row: int, rows: int) -> np.ndarray:
        """Their rows in that shard."""
        return self.ids[self.local(first_row, rows)] - first_row


def starting_rows(new: NewTokens, weights: HfWeights, name: str, which: np.ndarray) -> Tensor:
    """What the new tokens at places ``which`` begin with, before noise. [len(which), D] float64, the same on all ranks.

    The file's matrix is read in parts, so that no rank ever holds the whole.
    """
    rows, columns = weights.shape(name)
    start_ND = weights.mean_row(name).expand(len(which), columns).clone()
    if new.words is None:
        return start_ND
    words = new.words.take(which)
    told = np.flatnonzero(words.lengths > 0)
    token_E = np.repeat(np.arange(len(which)), words.lengths)
    share_NV = csr_matrix((1.0 / words.lengths[token_E], (token_E, words.flat)), shape=(len(which), rows))
    mean_ND = np.zeros((len(which), columns))
    for start in range(0, rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, rows)
        part_NV = share_NV[:, start:stop]
        if part_NV.nnz:
            mean_ND += part_NV @ weights.read(name, 0, start, stop).double().numpy()
    start_ND[told] = torch.from_numpy(mean_ND[told])
    return start_ND


def freeze_others(model: GPTModel, new: NewTokens) -> None:
    """Leave nothing but the rows of the new tokens to train. Call it before the model gets its optimizer."""
    for name, parameter in model.named_parameters():
        if "word_embeddings" in name or name.startswith("output_layer"):
            first = model.tp_group.rank() * len(parameter)
            frozen = torch.ones(len(parameter), dtype=torch.bool)
            frozen[torch.from_numpy(new.local_rows(first, len(parameter)))] = False
            parameter.frozen_rows = frozen.to(parameter.device)
        else:
            parameter.requires_grad_(False)


def frozen_parameters(model: GPTModel) -> list[Tensor]:
    """The matrices of which some rows are not trained."""
    return [parameter for parameter in model.parameters() if hasattr(parameter, "frozen_rows")]


def drop_frozen_gradients(parameters: list[Tensor]) -> None:
    """Gradients of rows that are not trained become 0, so that neither the norm nor AdamW sees them."""
    for parameter in parameters:
        parameter.main_grad[parameter.frozen_rows] = 0  # type: ignore[attr-defined]
