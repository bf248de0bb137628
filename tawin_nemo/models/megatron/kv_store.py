"""Keys and values of prompts and of the token trees that grow below them: one set of slots per prompt.

A prompt's slots hold its own tokens first, then every token generated below it, whichever beam it belongs to. A token
sees the prompt and its own ancestors through a mask, so choosing the next beams copies no keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueSlots:
    """Per layer, keys and values [B, groups, capacity, dim]; prompts are right-padded to ``prompt_slots``."""

    def __init__(self, prompts: int, prompt_slots: int) -> None:
        self.prompts, self.prompt_slots = prompts, prompt_slots
        self.capacity = prompt_slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, prompt_S: Tensor, slot_S: Tensor, key_SGD: Tensor, value_SGD: Tensor) -> None:
        """Store S tokens' keys and values at (prompt, slot)."""
        if layer not in self._layers:
            room = (self.prompts, key_SGD.shape[1], self.capacity, key_SGD.shape[2])
            # zeros: a masked slot still enters the kernels, where 0 * NaN would be NaN
            self._layers[layer] = (key_SGD.new_zeros(room), value_SGD.new_zeros(room))
        for stored, fresh in zip(self._layers[layer], (key_SGD, value_SGD), strict=True):
            stored[prompt_S, :, slot_S] = fresh

    def read(self, layer: int, prompt_M: Tensor | None, slots: int) -> tuple[Tensor, Tensor]:
        """The first ``slots`` slots of the named prompts (None = of all, without a copy)."""
        keys, values = self._layers[layer]
        if prompt_M is None:
            return keys[:, :, :slots], values[:, :, :slots]
        return keys[prompt_M, :, :slots], values[prompt_M, :, :slots]

    def make_room(self, slots: int) -> None:
        """Grow to at least ``slots`` slots, by half at least so that growing stays rare."""
        if slots > self.capacity:
            self.capacity = max(slots, self.capacity + (self.capacity - self.prompt_slots) // 2 + 8)
            self._map(lambda stored: _padded(stored, self.capacity))

    def keep(self, prompt_M: Tensor) -> None:
        """Keep only the named prompts."""
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
