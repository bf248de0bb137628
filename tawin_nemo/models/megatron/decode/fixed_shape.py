"""Decoding in static buffers: one pass runs B prompts, another up to L tokens below each of their W beams.

The keys of a prompt are stored once, in the first slots of its row of the store; what its beams run goes into a pool
of slots behind them. A beam names its last token by row number, so that choosing beams copies no keys. No size depends
on data and the host reads nothing: a pass can be captured in a CUDA graph. Its arithmetic is that of
``MegatronLM.extend``, with prompts padded to P tokens and more masked slots in the attention.

Rows are numbered 0 .. B - 1 for the prompts' last tokens, then G of each prompt: its pool's slots. The last slot of a
pool, G - 1, takes what is no token: padding of chains shorter than L.

Axes: B prompts, W beams, L tokens of a chain, S = B * W * L tokens of a pass, P prompt slots, G pool slots, R rows,
D width, X heads of a group (its queries, its key, its value), N queried rows, E edges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from tawin_nemo.maths.segments import segment_log_softmax
from tawin_nemo.models.megatron.decode.kv_store import DecodePlan, KeyValueSlots
from tawin_nemo.models.megatron.model.attention import PlannedAttention, additive_mask
from tawin_nemo.models.megatron.model.forward import padding
from tawin_nemo.models.megatron.model.head import fixed_edge_logits, log_sum_exp
from tawin_nemo.models.megatron.model.in_flight import wait_for_weights
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows

if TYPE_CHECKING:
    from tawin_nemo.models.megatron.decode.lm import MegatronLM


class FixedShapeDecode:
    """The static buffers of B prompts, of at most P tokens each, below which at most ``slots`` tokens are run each.

    Implements ``rollout.lm.FixedShape``. All TP ranks make the same calls. The first ``prefill`` allocates the store.
    """

    def __init__(self, lm: MegatronLM, prompts: int, prompt_slots: int, slots: int) -> None:
        self._lm, self._model = lm, lm.model
        self.prompts, self._prompt_slots, self._pool = prompts, prompt_slots, slots + 1
        self._store = KeyValueSlots(prompts, prompt_slots)
        self._store.capacity = prompt_slots + self._pool
        device, rows = runtime.device(), prompts * (1 + self._pool)
        self._prompt_length_B = torch.ones(prompts, dtype=torch.long, device=device)
        self._used_B = torch.zeros_like(self._prompt_length_B)
        self._length_R = torch.zeros(rows, dtype=torch.long, device=device)
        self._visible_RG = torch.zeros(rows, self._pool, dtype=torch.bool, device=device)
        self._tokens_BP = torch.zeros(prompts, prompt_slots, dtype=torch.long, device=device)
        like = next(lm.model.parameters())
        self._hidden_RD = torch.zeros(rows, lm.shape.hidden, dtype=like.dtype, device=device)

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the real vocabulary, without padding."""
        return self._lm.vocab_size

    @torch.no_grad()
    def fill(self, prompts: TokenRows) -> None:
        """Take B prompts for ``prefill`` and forget what was run.

        Raises ValueError for another number of prompts, or one that is longer than P.
        """
        if len(prompts) != self.prompts or prompts.lengths.max() > self._prompt_slots:
            raise ValueError(
                f"{len(prompts)} prompts of up to {prompts.lengths.max()} tokens do not fit buffers "
                f"for {self.prompts} prompts of up to {self._prompt_slots}"
            )
        wait_for_weights(self._model)  # a captured pass does not
        tokens_BT, length_B = prompts.padded()
        self._tokens_BP.copy_(pad(tokens_BT, (0, self._prompt_slots - tokens_BT.shape[1])))
        self._prompt_length_B.copy_(length_B)
        self._length_R[: self.prompts] = self._prompt_length_B
        self._used_B.zero_()
        self._visible_RG.zero_()

    @torch.no_grad()
    def prefill(self) -> None:
        """Run each prompt once, padding included; row b is the last token of prompt b."""
        prompts, slots = self._tokens_BP.shape
        extra = padding(prompts * slots, self._model.config)
        plan = _FixedPrefillPlan(self, extra)
        hidden_SD = self._lm.stage_output(pad(self._tokens_BP.flatten(), (0, extra)), None, plan)
        last_B = torch.arange(prompts, device=hidden_SD.device) * slots + self._prompt_length_B - 1
        self._hidden_RD[:prompts] = hidden_SD.index_select(0, last_B)

    @torch.no_grad()
    def extend(self, parent_BW: Tensor, token_BWL: Tensor, length_BW: Tensor) -> Tensor:
        """Run the first ``length_BW`` tokens of each chain below a row: the row of its last token, [B, W].

        Chains of length 0 run nothing and return their parent.
        """
        prompts, _, longest = token_BWL.shape
        device = token_BWL.device
        prompt_B1 = torch.arange(prompts, device=device)[:, None]
        offset_L, slot_G = torch.arange(longest, device=device), torch.arange(self._pool, device=device)
        end_BW = length_BW.cumsum(1) + self._used_B[:, None]
        first_BW1 = (end_BW - length_BW)[..., None]
        real_BWL = offset_L < length_BW[..., None]
        slot_BWL = torch.where(real_BWL, first_BW1 + offset_L, self._pool - 1)
        own_BWLG = (slot_G >= first_BW1[..., None]) & (slot_G <= slot_BWL[..., None]) & real_BWL[..., None]
        visible_BWLG = self._visible_RG[parent_BW][:, :, None] | own_BWLG
        position_BWL = self._length_R[parent_BW][..., None] + offset_L
        first_row_B1 = prompts + self._pool * prompt_B1
        row_S = (first_row_B1[..., None] + slot_BWL).flatten()

        extra = padding(row_S.numel(), self._model.config)
        plan = _FixedPlan(self, slot_BWL, visible_BWLG, position_BWL, extra)
        tokens_S = pad(token_BWL.flatten(), (0, extra))
        hidden_SD = self._lm.stage_output(tokens_S, None, plan)[: row_S.numel()]
        self._hidden_RD.index_copy_(0, row_S, hidden_SD)
        self._length_R.index_copy_(0, row_S, position_BWL.flatten() + 1)
        self._visible_RG.index_copy_(0, row_S, visible_BWLG.flatten(0, 2))
        self._used_B += length_BW.sum(1)
        return torch.where(length_BW > 0, first_row_B1 + end_BW - 1, parent_BW)

    @torch.no_grad()
    def logprobs(self, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        """As ``MegatronLM.logprobs``, without a host sync."""
        hidden_ND = self._hidden_RD.index_select(0, row_N)
        logit_E = fixed_edge_logits(self._model, hidden_ND, position_E, token_E)
        if space == "trie":
            return segment_log_softmax(logit_E, position_E, len(row_N))
        return logit_E - log_sum_exp(self._model, hidden_ND)[position_E]

    def state(self) -> list[Tensor]:
        """The buffers that say what was run since ``fill``: with them restored, a pass gives the same again."""
        return [self._used_B, self._length_R, self._visible_RG]

    def addresses(self) -> tuple[int, ...]:
        """Where weights, keys and rows lie in memory: a captured pass reads and writes there and nowhere else."""
        tensors = [
            *self._model.parameters(),
            *self._store.tensors(),
            *self.state(),
            self._tokens_BP,
            self._prompt_length_B,
            self._hidden_RD,
        ]
        return tuple(tensor.data_ptr() for tensor in tensors)

    def tokens_run(self) -> int:
        """Tokens that ``extend`` has run since ``fill``, without padding (reads the device)."""
        return int(self._used_B.sum())

    def write(self, layer: int, slot_BS: Tensor, pair_S2GD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a layer in slots of the pools; returns all that the layer has stored."""
        prompt_BS = torch.arange(self.prompts, device=slot_BS.device)[:, None].expand_as(slot_BS)
        self._store.write(layer, prompt_BS.flatten(), slot_BS.flatten() + self._prompt_slots, pair_S2GD)
        return self._store.read(layer, None, self._store.capacity)

    def in_prompt_BP(self) -> Tensor:
        """bool [B, P]: the slot holds a token of the prompt."""
        slot_P = torch.arange(self._prompt_slots, device=self._prompt_length_B.device)
        return slot_P < self._prompt_length_B[:, None]

    def write_prompts(self, layer: int, pair_2BGPD: Tensor) -> None:
        """Store the keys and values of a layer of all prompts."""
        self._store.write_prompts(layer, pair_2BGPD)

    @property
    def shape_BP(self) -> tuple[int, int]:
        """B prompts and P slots of each."""
        return self.prompts, self._prompt_slots


class _FixedPrefillPlan(DecodePlan):
    """Prompts of P tokens each, padding included: causal attention, so that no token sees the padding behind it."""

    def __init__(self, decode: FixedShapeDecode, padding: int) -> None:
        prompts, slots = decode.shape_BP
        position_S = torch.arange(slots, device=runtime.device()).repeat(prompts)
        super().__init__(pad(position_S, (0, padding)))
        self._decode = decode

    def attend_heads(self, core: PlannedAttention, heads_SGXD: Tensor) -> Tensor:
        prompts, slots = self._decode.shape_BP
        real = prompts * slots
        heads_BGXPD = heads_SGXD[:real].unflatten(0, (prompts, slots)).permute(0, 2, 3, 1, 4)
        pair_2BGPD = heads_BGXPD[:, :, -2:].permute(2, 0, 1, 3, 4)
        self._decode.write_prompts(core.layer_number, pair_2BGPD)
        output_BHPD = core.causal(heads_BGXPD[:, :, :-2].flatten(1, 2), *pair_2BGPD)
        output_SHD = output_BHPD.transpose(1, 2).flatten(0, 1)
        return pad(output_SHD, (0, 0, 0, 0, 0, len(heads_SGXD) - real))


class _FixedPlan(DecodePlan):
    """Every prompt has the same number of new tokens, so queries need no sorting into padded rows."""

    def __init__(
        self, decode: FixedShapeDecode, slot_BWL: Tensor, visible_BWLG: Tensor, position_BWL: Tensor, padding: int
    ) -> None:
        super().__init__(pad(position_BWL.flatten(), (0, padding)))
        self._decode, self._slot_BS = decode, slot_BWL.flatten(1)
        tokens = self._slot_BS.shape[1]
        context_BSP = decode.in_prompt_BP()[:, None].expand(-1, tokens, -1)
        self._visible_BSK = torch.cat([context_BSP, visible_BWLG.flatten(1, 2)], dim=2)
        self._mask: Tensor | None = None

    def attend_heads(self, core: PlannedAttention, heads_SGXD: Tensor) -> Tensor:
        real, (prompts, tokens) = self._slot_BS.numel(), self._slot_BS.shape
        own = heads_SGXD.shape[2] - 2
        pair_S2GD = heads_SGXD[:real, :, own:].transpose(1, 2)
        keys, values = self._decode.write(core.layer_number, self._slot_BS, pair_S2GD)
        if self._mask is None:
            self._mask = additive_mask(self._visible_BSK, own, heads_SGXD.dtype)
        query_BSGXD = heads_SGXD[:real, :, :own].unflatten(0, (prompts, tokens))
        output_BGRD = core.folded(query_BSGXD.permute(0, 2, 3, 1, 4).flatten(2, 3), keys, values, self._mask)
        output_SHD = output_BGRD.unflatten(2, (own, tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
        return pad(output_SHD, (0, 0, 0, 0, 0, len(heads_SGXD) - real))
