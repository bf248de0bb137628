"""KV cache of prompts and of the token trees that grow below them: one set of slots per prompt.

A prompt's slots hold its own tokens first, then every token generated below it, whichever beam it belongs to. A token
attends to the prompt and its own ancestors through a mask, so choosing the next beams copies no keys.

Axes: B prompts, S new tokens, G key and value groups, H query heads, D dimension of a head, K slots, M chosen prompts,
T tokens of a padded prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tawin_nemo.models.megatron.model.attention import AttentionPlan, PlannedAttention, additive_mask
from tawin_nemo.models.megatron.model.tree_plan import TreePlan
from tawin_nemo.types import TokenBatch, TokenRows


class KeyValueSlots:
    """Per layer, keys and values [B, groups, capacity, dim]; prompts are right-padded to ``prompt_slots``."""

    def __init__(self, prompts: int, prompt_slots: int) -> None:
        self.prompts, self.prompt_slots = prompts, prompt_slots
        self.capacity = prompt_slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, prompt_S: Tensor, slot_S: Tensor, key_SGD: Tensor, value_SGD: Tensor) -> None:
        """Store S tokens' keys and values at (prompt, slot)."""
        for stored, fresh in zip(self._of_layer(layer, key_SGD), (key_SGD, value_SGD), strict=True):
            stored[prompt_S, :, slot_S] = fresh.detach()  # a pass that only sets FP8 scales has gradient enabled

    def write_prompts(self, layer: int, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        """Store keys and values of the first T slots of all prompts."""
        for stored, fresh in zip(self._of_layer(layer, key_BGTD[:, :, 0]), (key_BGTD, value_BGTD), strict=True):
            stored[:, :, : fresh.shape[2]] = fresh

    def _of_layer(self, layer: int, like_SGD: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            shape = (self.prompts, like_SGD.shape[1], self.capacity, like_SGD.shape[2])
            # zeros: a masked slot still enters the kernels, where 0 * NaN would be NaN
            self._layers[layer] = (like_SGD.new_zeros(shape), like_SGD.new_zeros(shape))
        return self._layers[layer]

    def read(self, layer: int, prompt_M: Tensor | None, slots: int) -> tuple[Tensor, Tensor]:
        """The first ``slots`` slots of the given prompts (None = of all, without a copy)."""
        keys, values = self._layers[layer]
        if prompt_M is None:
            return keys[:, :, :slots], values[:, :, :slots]
        return keys[prompt_M, :, :slots], values[prompt_M, :, :slots]

    def tensors(self) -> list[Tensor]:
        """Keys and values of all layers."""
        return [stored for pair in self._layers.values() for stored in pair]

    def make_room(self, slots: int) -> None:
        """Grow to at least ``slots`` slots, by half at least so that growing stays rare."""
        if slots > self.capacity:
            self.capacity = max(slots, self.capacity + (self.capacity - self.prompt_slots) // 2 + 8)
            self._map(lambda stored: _padded(stored, self.capacity))

    def keep(self, prompt_M: Tensor) -> None:
        """Keep only the given prompts."""
        self.prompts = len(prompt_M)
        self._map(lambda stored: stored[prompt_M])

    def join(self, other: KeyValueSlots) -> None:
        """Append the prompts of another store; prompts' and generated slots are padded to the larger of both."""
        prompt_slots = max(self.prompt_slots, other.prompt_slots)
        generated = max(self.capacity - self.prompt_slots, other.capacity - other.prompt_slots)
        for store in (self, other):
            store._pad_prompts(prompt_slots)
            store.make_room(prompt_slots + generated)
        self.capacity = max(self.capacity, other.capacity)
        for layer, pair in self._layers.items():
            theirs = other._layers[layer]
            self._layers[layer] = (
                torch.cat([_padded(pair[0], self.capacity), _padded(theirs[0], self.capacity)]),
                torch.cat([_padded(pair[1], self.capacity), _padded(theirs[1], self.capacity)]),
            )
        self.prompts += other.prompts

    def _pad_prompts(self, prompt_slots: int) -> None:
        old, extra = self.prompt_slots, prompt_slots - self.prompt_slots
        if extra:
            self.prompt_slots, self.capacity = prompt_slots, self.capacity + extra
            self._map(lambda stored: torch.cat([_padded(stored[:, :, :old], prompt_slots), stored[:, :, old:]], dim=2))

    def _map(self, change: object) -> None:
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (change(keys), change(values))  # type: ignore[operator]


def _padded(stored_BGKD: Tensor, slots: int) -> Tensor:
    return torch.nn.functional.pad(stored_BGKD, (0, 0, 0, slots - stored_BGKD.shape[2]))


# -- Attention of new tokens over stored keys: what one step of a search runs.


class PrefillPlan(TreePlan):
    """Prompts attend to themselves; their keys and values are written to the store."""

    def __init__(self, batch: TokenBatch, device: torch.device, store: KeyValueSlots, padding: int) -> None:
        super().__init__(batch, device, padding)
        self._store = store
        cell_BT = self.chain.inside_BT.nonzero()
        self._prompt_S, self._slot_S = cell_BT[:, 0], cell_BT[:, 1]

    def attend(self, core: PlannedAttention, query_SHD: Tensor, key_SGD: Tensor, value_SGD: Tensor) -> Tensor:
        real = len(self._prompt_S)
        self._store.write(core.layer_number, self._prompt_S, self._slot_S, key_SGD[:real], value_SGD[:real])
        return super().attend(core, query_SHD, key_SGD, value_SGD)


class ExtendPlan(AttentionPlan):
    """S new tokens, token s in slot ``slot_S[s]`` of prompt ``prompt_S[s]``, attending to slots ``visible_SK``."""

    def __init__(
        self,
        store: KeyValueSlots,
        prompt_S: Tensor,
        slot_S: Tensor,
        visible_SK: Tensor,
        position_S: Tensor,
        padding: int,
    ) -> None:
        super().__init__(torch.nn.functional.pad(position_S, (0, padding)))
        self._store, self._prompt_S, self._slot_S = store, prompt_S, slot_S
        self._slots = visible_SK.shape[1]
        prompt_M, self._block_S = prompt_S.unique(return_inverse=True)
        # a copy of the keys of those prompts that have new tokens, unless these are most of all
        few = 2 * len(prompt_M) <= store.prompts
        self._prompt_M = prompt_M if few else None
        if not few:
            self._block_S = prompt_S
        self._place_S = index_in_group(self._block_S)
        self._blocks = len(prompt_M) if few else store.prompts
        self._width = int(self._place_S.max()) + 1
        visible_BSK = visible_SK.new_zeros(self._blocks, self._width, self._slots)
        visible_BSK[:, :, 0] = True  # padding attends to a slot: a softmax over nothing is not a number
        visible_BSK[self._block_S, self._place_S] = visible_SK
        self._visible_BSK = visible_BSK
        self._mask: Tensor | None = None

    def attend(self, core: PlannedAttention, query_SHD: Tensor, key_SGD: Tensor, value_SGD: Tensor) -> Tensor:
        real = len(self._prompt_S)
        self._store.write(core.layer_number, self._prompt_S, self._slot_S, key_SGD[:real], value_SGD[:real])
        keys, values = self._store.read(core.layer_number, self._prompt_M, self._slots)
        query_BSHD = query_SHD.new_zeros(self._blocks, self._width, *query_SHD.shape[1:])
        query_BSHD[self._block_S, self._place_S] = query_SHD[:real]
        if self._mask is None:
            self._mask = additive_mask(self._visible_BSK, query_SHD.shape[1] // key_SGD.shape[1], query_SHD.dtype)
        output_BHSD = core.masked(query_BSHD.transpose(1, 2), keys, values, self._mask)
        output_SHD = query_SHD.new_zeros(query_SHD.shape)
        output_SHD[:real] = output_BHSD.transpose(1, 2)[self._block_S, self._place_S]
        return output_SHD


def index_in_group(group_S: Tensor) -> Tensor:
    """The index of each entry among the entries of its group, in order."""
    order_S = group_S.argsort(stable=True)
    sorted_S = group_S[order_S]
    first_S = torch.searchsorted(sorted_S, sorted_S)
    place_S = torch.empty_like(group_S)
    place_S[order_S] = torch.arange(len(group_S), device=group_S.device) - first_S
    return place_S


def chains_of(rows: TokenRows) -> TokenBatch:
    """The rows as token trees without branches."""
    length_B = torch.from_numpy(rows.lengths)
    end_S = length_B.cumsum(0).repeat_interleave(length_B)
    position_S = torch.arange(len(end_S)) - (length_B.cumsum(0) - length_B).repeat_interleave(length_B)
    none = torch.zeros(0, dtype=torch.long)
    return TokenBatch(
        tokens_S=torch.from_numpy(rows.flat).long(), position_S=position_S, end_S=end_S, chain_B=length_B,
        tree_B=torch.zeros_like(length_B), index_P=none, row_N=none, target_N=none,
    )  # fmt: skip
