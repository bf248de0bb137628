"""Keys and values of a growing set of beams: one set of slots per prompt, never one copy per beam.

A prompt's slots hold its own tokens first, then every token generated below it. A beam sees the prompt and its own
ancestors through a boolean mask, so choosing the next beams copies no keys. Slots that no living beam sees are
squeezed out once they are the majority.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueSlots:
    """Per layer, keys and values [B, heads, capacity, dim]; the first ``used`` slots are filled."""

    def __init__(self, capacity: int) -> None:
        self.used = 0
        self._capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key_BHSD: Tensor, value_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's S new slots behind the used ones; ``advance`` closes the step for all layers."""
        new = key_BHSD.shape[2]
        if layer not in self._layers:
            B, heads, _, dim = key_BHSD.shape
            room = (B, heads, max(self._capacity, new), dim)
            self._layers[layer] = (key_BHSD.new_empty(room), value_BHSD.new_empty(room))
        end = self.used + new
        for stored, fresh in zip(self._layers[layer], (key_BHSD, value_BHSD), strict=True):
            stored[:, :, self.used : end] = fresh
        keys, values = self._layers[layer]
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, slots: int) -> None:
        self.used += slots

    def make_room(self, slots: int) -> None:
        """Grow, at least by half, when ``slots`` more would not fit."""
        if self.used + slots <= self._capacity:
            return
        self._capacity = max(self.used + slots, self._capacity * 3 // 2)
        for layer, pair in self._layers.items():
            self._layers[layer] = (self._grown(pair[0]), self._grown(pair[1]))

    def _grown(self, stored: Tensor) -> Tensor:
        B, heads, _, dim = stored.shape
        larger = stored.new_empty(B, heads, self._capacity, dim)
        larger[:, :, : self.used] = stored[:, :, : self.used]
        return larger

    def keep(self, slot_BK: Tensor, first: int) -> None:
        """Behind the first ``first`` slots keep only those named in ``slot_BK``, in that order."""
        count = slot_BK.shape[1]
        for pair in self._layers.values():
            for stored in pair:
                index = slot_BK[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
                stored[:, :, first : first + count] = stored.gather(2, index)
        self.used = first + count

    def take_prompts(self, prompt_B: Tensor) -> None:
        """Keep only the named prompts."""
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (keys[prompt_B], values[prompt_B])


def squeeze_slots(visible_RK: Tensor, root_R: Tensor, prompts: int, first: int) -> tuple[Tensor, Tensor] | None:
    """Which generated slots to keep when most are dead: ``slot_BK`` for ``keep`` and the rows' new visibility.

    None when at least half of the generated slots of the fullest prompt are still seen by some row.
    """
    generated = visible_RK.shape[1] - first
    live_BK = torch.zeros(prompts, generated, dtype=torch.int32, device=visible_RK.device)
    live_BK = live_BK.index_add_(0, root_R, visible_RK[:, first:].int()) > 0
    most = int(live_BK.sum(dim=1).max()) if prompts else 0
    if generated < 2 * most + 1:
        return None
    slot_BK = live_BK.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    tail_RK = visible_RK[:, first:].gather(1, slot_BK[root_R])
    return slot_BK + first, torch.cat([visible_RK[:, :first], tail_RK], dim=1)
