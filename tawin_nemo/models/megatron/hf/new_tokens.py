"""Rows of embedding and LM head for new tokens: their initial values, and training of these rows alone.

A published vocabulary has spare rows behind its last token, so the row of a new token may be part of the file's matrix.
Which tokens are new is decided by comparing the tokenizers, not by the number of rows.

Axes: N new tokens, D width, V vocabulary rows of the file, E pairs of a new token and one of its words.
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
        """Indices into ``ids`` of the tokens whose rows lie in a shard of ``rows`` rows from ``first_row`` on."""
        return np.flatnonzero((self.ids >= first_row) & (self.ids < first_row + rows))

    def local_rows(self, first_row: int, rows: int) -> np.ndarray:
        """The rows of those tokens within the shard."""
        return self.ids[self.local(first_row, rows)] - first_row


def starting_rows(new: NewTokens, weights: HfWeights, name: str, which: np.ndarray) -> Tensor:
    """Initial rows of the tokens ``ids[which]``, before noise: [len(which), D] float64, the same on all ranks.

    The file's matrix is read in parts, so that no rank ever holds the whole.
    """
    rows, columns = weights.shape(name)
    start_ND = weights.mean_row(name).expand(len(which), columns).clone()
    if new.words is None:
        return start_ND
    words = new.words.take(which)
    has_words = np.flatnonzero(words.lengths > 0)
    token_E = np.repeat(np.arange(len(which)), words.lengths)
    share_NV = csr_matrix((1.0 / words.lengths[token_E], (token_E, words.flat)), shape=(len(which), rows))
    mean_ND = np.zeros((len(which), columns))
    for start in range(0, rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, rows)
        part_NV = share_NV[:, start:stop]
        if part_NV.nnz:
            mean_ND += part_NV @ weights.read(name, 0, start, stop).double().numpy()
    start_ND[has_words] = torch.from_numpy(mean_ND[has_words])
    return start_ND


def freeze_others(model: GPTModel, new: NewTokens) -> None:
    """Freeze everything but the rows of the new tokens. Call it before the optimizer is built."""
    for name, parameter in model.named_parameters():
        if "word_embeddings" in name or name.startswith("output_layer"):
            first = model.tp_group.rank() * len(parameter)
            frozen = torch.ones(len(parameter), dtype=torch.bool)
            frozen[torch.from_numpy(new.local_rows(first, len(parameter)))] = False
            parameter.frozen_rows = frozen.to(parameter.device)
        else:
            parameter.requires_grad_(False)


def frozen_parameters(model: GPTModel) -> list[Tensor]:
    """The parameters with frozen rows."""
    return [parameter for parameter in model.parameters() if hasattr(parameter, "frozen_rows")]


def drop_frozen_gradients(parameters: list[Tensor]) -> None:
    """Set the gradients of frozen rows to 0, so that neither the gradient norm nor AdamW uses them."""
    for parameter in parameters:
        parameter.main_grad[parameter.frozen_rows] = 0  # type: ignore[attr-defined]
