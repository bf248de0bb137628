"""KV cache of prompts and of the token trees that grow below them: one set of slots per prompt.

A prompt's slots hold its own tokens first, then every token generated below it, whichever beam it belongs to. A token
attends to the prompt and its own ancestors through a mask, so choosing the next beams copies no keys.

Axes: B prompts, S new tokens, G key and value groups, H query heads, X heads of a group (its queries, key and value), D
dimension of a head, K slots, M chosen prompts, T tokens of a padded prompt, W new tokens of a prompt, R folded queries,
A generated slots on the way to a token. An axis "2": keys, then values.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tawin_nemo.models.megatron.model.attention import AttentionPlan, PlannedAttention, additive_mask
from tawin_nemo.util.torch_modes import numbers
from tawin_nemo.util.transfers import to_device


class KeyValueSlots:
    """Per layer, keys and values [2, B, groups, capacity, dim]; prompts are right-padded to ``prompt_slots``."""

    def __init__(self, prompts: int, prompt_slots: int) -> None:
        self.prompts, self.prompt_slots = prompts, prompt_slots
        self.capacity = prompt_slots
        self._layers: dict[int, Tensor] = {}

    def write(self, layer: int, prompt_S: Tensor, slot_S: Tensor, pair_S2GD: Tensor) -> None:
        """Store S tokens' keys and values at (prompt, slot)."""
        stored = self._of_layer(layer, pair_S2GD[0])
        stored[:, prompt_S, :, slot_S] = pair_S2GD.detach()  # a pass that only sets FP8 scales has gradient enabled

    def write_prompts(self, layer: int, pair_2BGTD: Tensor) -> None:
        """Store keys and values of the first T slots of all prompts."""
        self._of_layer(layer, pair_2BGTD[:, 0, :, 0])[:, :, :, : pair_2BGTD.shape[3]] = pair_2BGTD

    def take_prompts(self, layer: int, pair_2BGTD: Tensor) -> None:
        """Begin with these keys and values of all slots of all prompts; the tensor becomes the store's own.

        What lies in padding must be finite: a masked slot still enters the kernels, where 0 * NaN would be NaN.
        """
        self._layers[layer] = pair_2BGTD.detach()

    def _of_layer(self, layer: int, like_2GD: Tensor) -> Tensor:
        if layer not in self._layers:
            both, groups, dim = like_2GD.shape
            # zeros, for the reason that take_prompts gives
            self._layers[layer] = like_2GD.new_zeros(both, self.prompts, groups, self.capacity, dim)
        return self._layers[layer]

    def read(self, layer: int, prompt_M: Tensor | None, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values in the first ``slots`` slots of the given prompts (None = of all, without a copy)."""
        stored = self._layers[layer]
        keys, values = stored[:, :, :, :slots] if prompt_M is None else stored[:, prompt_M, :, :slots]
        return keys, values

    def tensors(self) -> list[Tensor]:
        """Keys and values of all layers."""
        return list(self._layers.values())

    def make_room(self, slots: int) -> None:
        """Grow to at least ``slots`` slots, by half at least so that growing stays rare."""
        if slots > self.capacity:
            self.capacity = max(slots, self.capacity + (self.capacity - self.prompt_slots) // 2 + 8)
            self._map(lambda stored: _padded(stored, self.capacity))

    def keep(self, prompt_M: Tensor) -> None:
        """Keep only the given prompts."""
        self.prompts = len(prompt_M)
        self._map(lambda stored: stored[:, prompt_M])

    def join(self, other: KeyValueSlots) -> None:
        """Append the prompts of another store; prompts' and generated slots are padded to the larger of both."""
        prompt_slots = max(self.prompt_slots, other.prompt_slots)
        generated = max(self.capacity - self.prompt_slots, other.capacity - other.prompt_slots)
        for store in (self, other):
            store._pad_prompts(prompt_slots)
            store.make_room(prompt_slots + generated)
        self.capacity = max(self.capacity, other.capacity)
        for layer, stored in self._layers.items():
            both = (stored, other._layers[layer])
            self._layers[layer] = torch.cat([_padded(each, self.capacity) for each in both], dim=1)
        self.prompts += other.prompts

    def _pad_prompts(self, prompt_slots: int) -> None:
        old, extra = self.prompt_slots, prompt_slots - self.prompt_slots
        if extra:
            self.prompt_slots, self.capacity = prompt_slots, self.capacity + extra
            self._map(
                lambda stored: torch.cat([_padded(stored[..., :old, :], prompt_slots), stored[..., old:, :]], dim=3)
            )

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self._layers = {layer: change(stored) for layer, stored in self._layers.items()}


def _padded(stored_2BGKD: Tensor, slots: int) -> Tensor:
    return torch.nn.functional.pad(stored_2BGKD, (0, 0, 0, slots - stored_2BGKD.shape[3]))


# -- Attention of new tokens over stored keys: what one step of a search runs.


class DecodePlan(AttentionPlan):
    """A plan over the heads as the fused product of queries, keys and values leaves them."""

    @abstractmethod
    def attend_heads(self, core: PlannedAttention, heads_SGXD: Tensor) -> Tensor:
        """[S, H, D] from the X = H / G + 2 heads of each group: its queries, its key, its value; all turned."""

    def attend(self, core: PlannedAttention, query_SHD: Tensor, key_SGD: Tensor, value_SGD: Tensor) -> Tensor:
        """For megatron's modules, which hand them on one by one."""
        query_SGXD = query_SHD.unflatten(1, (key_SGD.shape[1], -1))
        return self.attend_heads(core, torch.cat([query_SGXD, key_SGD[:, :, None], value_SGD[:, :, None]], dim=2))


class PrefillPlan(DecodePlan):
    """Prompts attend to themselves; their keys and values become the store's. ``padding`` tokens attend to nothing."""

    def __init__(self, length_B: Tensor, device: torch.device, store: KeyValueSlots, padding: int) -> None:
        """``length_B`` is on the host, where everything is worked out."""
        slot_T, start_B1 = torch.arange(store.prompt_slots), (length_B.cumsum(0) - length_B)[:, None]
        inside_BT = slot_T < length_B[:, None]
        # padding of a prompt repeats token 0 of the flat row: any real token does
        token_BT = torch.where(inside_BT, start_B1 + slot_T, 0)
        position_S, cell_S = slot_T.expand_as(token_BT)[inside_BT], inside_BT.flatten().nonzero()[:, 0]
        ends = [torch.nn.functional.pad(each, (0, padding)) for each in (position_S, cell_S)]
        position_S, self._cell_S, self._token_BT = to_device([*ends, token_BT], device)
        super().__init__(position_S)
        self._store = store
        self._rows: tuple[Tensor, Tensor] | None = None

    def _rows_of(self, groups: int, heads: int) -> tuple[Tensor, Tensor]:
        """Of a flat row of S * G * X heads: those of the queries [B, H, T], and of keys and values [2, B, G, T]."""
        if self._rows is None:
            number_GX = numbers(groups * heads, self._token_BT.device).view(groups, heads)
            first_BGXT = (self._token_BT * (groups * heads))[:, None, None] + number_GX[..., None]
            query_BGXT, pair_BGXT = first_BGXT.split([heads - 2, 2], dim=2)
            self._rows = query_BGXT.flatten(), pair_BGXT.permute(2, 0, 1, 3).flatten()
        return self._rows

    def attend_heads(self, core: PlannedAttention, heads_SGXD: Tensor) -> Tensor:
        _, groups, heads, dim = heads_SGXD.shape
        (prompts, slots), flat = self._token_BT.shape, heads_SGXD.reshape(-1, dim)
        query_rows, pair_rows = self._rows_of(groups, heads)
        query_BHTD = flat.index_select(0, query_rows).view(prompts, -1, slots, dim)
        pair_2BGTD = flat.index_select(0, pair_rows).view(2, prompts, groups, slots, dim)
        self._store.take_prompts(core.layer_number, pair_2BGTD)
        output_BHTD = core.causal(query_BHTD, pair_2BGTD[0], pair_2BGTD[1])
        return output_BHTD.transpose(1, 2).flatten(0, 1).index_select(0, self._cell_S)


class ExtendPlan(DecodePlan):
    """S new tokens, token s in slot ``slot_S[s]`` of prompt ``prompt_S[s]``.

    Each attends to its prompt, which has ``length_B`` tokens, and to generated slots: those that ``path_SA`` names in
    its first ``count_S`` columns. ``padding`` further tokens attend to nothing that counts.
    """

    def __init__(
        self,
        store: KeyValueSlots,
        device: torch.device,
        *,
        prompt_S: Tensor,
        slot_S: Tensor,
        position_S: Tensor,
        length_B: Tensor,
        path_SA: Tensor,
        count_S: Tensor,
        slots: int,
        padding: int,
    ) -> None:
        """All tensors are on the host, where everything is worked out; ``slots`` of each prompt are read."""
        prompt_M, block_S = prompt_S.unique(return_inverse=True)
        # a copy of the keys of those prompts that have new tokens, unless these are most of all
        few = 2 * len(prompt_M) <= store.prompts
        if not few:
            prompt_M, block_S = torch.arange(store.prompts), prompt_S
        place_S = index_in_group(block_S)
        self._blocks, self._width = len(prompt_M), int(place_S.max()) + 1
        column_A = torch.arange(path_SA.shape[1])
        cell_S = block_S * self._width + place_S
        token_BW = torch.zeros(self._blocks * self._width, dtype=torch.long)
        token_BW[cell_S] = torch.arange(len(cell_S))
        # padding sees its prompt: a softmax over nothing is not a number; slot 0 is always seen
        path_BWA = torch.zeros(len(token_BW), len(column_A), dtype=torch.long)
        path_BWA[cell_S] = torch.where(column_A < count_S[:, None], path_SA + store.prompt_slots, 0)
        pad = partial(torch.nn.functional.pad, pad=(0, padding))
        position_S, self._cell_S, self._token_BW, self._path_BWA, self._length_B, *places = to_device(
            [
                pad(position_S),
                pad(cell_S),
                token_BW.view(self._blocks, -1),
                path_BWA,
                length_B[prompt_M],
                prompt_S,
                slot_S + store.prompt_slots,
                prompt_M,
            ],
            device,
        )
        super().__init__(position_S)
        self._store, self._slots, self._prompt_S, self._slot_S = store, slots, places[0], places[1]
        self._prompt_M = places[2] if few else None
        self._rows: tuple[Tensor, Tensor] | None = None
        self._mask: Tensor | None = None

    def _rows_of(self, groups: int, heads: int) -> tuple[Tensor, Tensor]:
        """Of a flat row of S * G * X heads those of the queries [B, G, X - 2, W]; of an output [B, R, G] those of S."""
        if self._rows is None:
            device, own = self._token_BW.device, heads - 2
            number_GX = numbers(groups * heads, device).view(groups, heads)[:, :own]
            query_BGXW = (self._token_BW * (groups * heads))[:, None, None] + number_GX[..., None]
            block_S, place_S = self._cell_S // self._width, self._cell_S % self._width
            head_GX = numbers(groups, device)[:, None] + numbers(own, device) * (self._width * groups)
            first_S = (block_S * (own * self._width) + place_S) * groups
            self._rows = query_BGXW.flatten(), (first_S[:, None] + head_GX.flatten()).flatten()
        return self._rows

    def _mask_of(self, own: int, dtype: torch.dtype) -> Tensor:
        if self._mask is None:
            slot_K = numbers(self._slots, self._length_B.device)
            visible_BWK = (slot_K < self._length_B[:, None])[:, None].repeat(1, self._width, 1)
            visible_BWK.flatten(0, 1).scatter_(1, self._path_BWA, True)
            self._mask = additive_mask(visible_BWK, own, dtype)
        return self._mask

    def attend_heads(self, core: PlannedAttention, heads_SGXD: Tensor) -> Tensor:
        _, groups, heads, dim = heads_SGXD.shape
        real, own = len(self._prompt_S), heads - 2
        pair_S2GD = heads_SGXD[:real, :, own:].transpose(1, 2)
        self._store.write(core.layer_number, self._prompt_S, self._slot_S, pair_S2GD)
        keys, values = self._store.read(core.layer_number, self._prompt_M, self._slots)
        query_rows, output_rows = self._rows_of(groups, heads)
        query_BGRD = heads_SGXD.reshape(-1, dim).index_select(0, query_rows).view(self._blocks, groups, -1, dim)
        output_BGRD = core.folded(query_BGRD, keys, values, self._mask_of(own, query_BGRD.dtype))
        # kernels write row by row, all groups of it: no copy
        output = output_BGRD.transpose(1, 2).reshape(-1, dim).index_select(0, output_rows)
        return output.view(-1, groups * own, dim)


def index_in_group(group_S: Tensor) -> Tensor:
    """The index of each entry among the entries of its group, in order."""
    order_S = group_S.argsort(stable=True)
    sorted_S = group_S[order_S]
    first_S = torch.searchsorted(sorted_S, sorted_S)
    place_S = torch.empty_like(group_S)
    place_S[order_S] = torch.arange(len(group_S), device=group_S.device) - first_S
    return place_S
