"""What cached decoding holds between two calls of the model.

Axes: B prompts, R rows (tokens that were run), A generated tokens of a path, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tawin_nemo.models.megatron.decode.kv_store import KeyValueSlots


@dataclass(frozen=True)
class Cache:
    """R rows (tokens that were run) over the stored keys of B prompts.

    ``extend`` writes into the same store, so only the newest cache can be used. What is worked out from integers alone
    is on the host, whatever the device: no pass has to wait for the one before.
    """

    store: KeyValueSlots
    prompt_length_B: Tensor
    used_B: Tensor  # generated slots in use
    prompt_R: Tensor
    length_R: Tensor  # tokens up to and with the row's: the rotary position of what follows
    path_RA: Tensor  # generated slots that the row and its successors see: as many columns as it has generated tokens
    hidden_RD: Tensor | None  # on the device, after the final norm; only on the last pipeline stage

    def __len__(self) -> int:
        return len(self.prompt_R)


def widened(path_RA: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(path_RA, (0, columns - path_RA.shape[1]))


def present(hidden_RD: Tensor | None) -> Tensor:
    assert hidden_RD is not None, "only the last pipeline stage holds hidden states"
    return hidden_RD
