"""One token per item: a recommender's fixed vector, projected to the embedding's width (LLaRA, arXiv 2312.02445).

Prompts hold the number ``FIRST_ITEM_TOKEN + i`` for item i (``data/item_tokens.py``); the first pipeline stage puts the
projected vector of the item there. The vectors are fixed and belong to no checkpoint; the projection, two matrices
with GELU between them, is trained with the model.

The projection is on every TP rank. What it writes lies behind the sum over vocabulary shards: without sequence
parallelism every TP rank computes the same values and gradients, with it each rank computes its own part of the
sequence and megatron sums the gradients, as it does for norms.

Axes beyond ``types``: E dimensions of a vector, M item tokens of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from tawin_nemo.models.megatron.model import weight_init
from tawin_nemo.types import FIRST_ITEM_TOKEN

if TYPE_CHECKING:
    from tawin_nemo.models.megatron.model.build import HiddenGPT

#: Beginning of the names of all parameters of the projection in a model.
PREFIX = "item_tokens."
#: GELU of a standard normal number has this mean square.
_GELU_POWER = 0.425


class ItemTokens(nn.Module):
    """The fixed vectors of all items and their trained projection."""

    def __init__(self, vectors_IE: Tensor, hidden: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """``vectors_IE`` are divided by their root mean square. The weights are undefined until ``draw``."""
        super().__init__()
        scaled_IE = vectors_IE.double() / vectors_IE.double().square().mean().sqrt().clamp(min=1e-12)
        self.register_buffer("vectors_IE", scaled_IE.to(device, dtype), persistent=False)
        self.vectors_IE: Tensor
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        self.inner = nn.Linear(vectors_IE.shape[1], hidden, **kind)
        self.outer = nn.Linear(hidden, hidden, **kind)

    @torch.no_grad()
    def draw(self, seed: int, std: float) -> None:
        """Draw the matrices by ``seed``, whatever the layout, so that entries of the output have about the standard
        deviation ``std``; biases are 0."""
        width = self.outer.weight.shape[1]
        scales = {"inner": self.inner.weight.shape[1] ** -0.5, "outer": std * (width * _GELU_POWER) ** -0.5}
        for name, scale in scales.items():
            linear = getattr(self, name)
            rows, columns = linear.weight.shape
            whole = [weight_init.Piece(0, rows, 0)]
            weight_init.fill(linear.weight, whole, (rows, columns), std=scale, key=f"{seed}/item_tokens.{name}")
            linear.bias.zero_()

    def forward(self, items_M: Tensor) -> Tensor:
        """Embeddings [M, D] of the items ``items_M``."""
        projected: Tensor = self.outer(F.gelu(self.inner(self.vectors_IE[items_M])))
        return projected


def words_only(tokens: Tensor) -> Tensor:
    """``tokens`` with 0, any row of the vocabulary, at the items."""
    return torch.where(tokens < FIRST_ITEM_TOKEN, tokens, 0)


def inject(item_tokens: ItemTokens, tokens_S: Tensor, hidden_SD: Tensor) -> Tensor:
    """``hidden_SD`` with the embeddings of items where ``tokens_S`` has items."""
    place_M = (tokens_S >= FIRST_ITEM_TOKEN).nonzero().squeeze(1)
    if len(place_M) == 0:
        return hidden_SD
    return hidden_SD.index_copy(0, place_M, item_tokens(tokens_S[place_M] - FIRST_ITEM_TOKEN))


def add_item_tokens(model: HiddenGPT, vectors_IE: Tensor, *, seed: int, std: float) -> None:
    """Give the model a new projection of the vectors of all items; only its first pipeline stage has one.

    Call it before a checkpoint that has one is loaded and before the optimizer is built. ``std``: about the standard
    deviation of the vocabulary's rows.
    """
    model.num_item_tokens = len(vectors_IE)
    if not model.pre_process:
        return
    table = model.embedding.word_embeddings
    weight = table.weight
    made = ItemTokens(vectors_IE, weight.shape[1], dtype=weight.dtype, device=weight.device)
    made.draw(seed, std)
    for parameter in made.parameters():
        set_tensor_model_parallel_attributes(parameter, False, -1, 1)
        parameter.sequence_parallel = model.config.sequence_parallel  # type: ignore[attr-defined]
    model.item_tokens = made
    table.register_forward_hook(lambda module, args, output: _injected(made, module, args[0], output))


def _injected(item_tokens: ItemTokens, table: Any, tokens_BS: Tensor, output: Tensor) -> Tensor:
    """The output of the embedding, [B, S, D] or this TP rank's part of [S, B, D], with the items in it."""
    if table.reduce_scatter_embeddings:
        tokens = tokens_BS.t().chunk(table.tp_group.size())[table.tp_group.rank()]
    else:
        tokens = tokens_BS
    return inject(item_tokens, tokens.flatten(), output.flatten(0, 1)).view(output.shape)
