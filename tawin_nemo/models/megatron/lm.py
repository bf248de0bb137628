"""The model as a searchable language model: prefill prompts once, then extend any rows by one token each.

Every model-parallel rank calls the same methods with the same arguments and gets the same logits, so a search runs
identically on all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from tawin_nemo.backbones import Backbone
from tawin_nemo.models.megatron import parallel
from tawin_nemo.models.megatron.attention import attention_context
from tawin_nemo.models.megatron.forward import logit_dtype, modes, pad_rows, row_multiple
from tawin_nemo.models.megatron.head import full_logits_NV
from tawin_nemo.models.megatron.kv_store import KeyValueSlots, squeeze_slots

#: Attributes by which megatron's modules remember that activations are split along the sequence.
_SEQUENCE_FLAGS = ("sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel")


@dataclass(frozen=True)
class Cache:
    """R rows over the stored keys: which prompt each belongs to, its length, and the slots it sees.

    ``extend`` writes into the same store, so only the newest cache can be extended.
    """

    store: KeyValueSlots
    root_R: Tensor
    length_R: Tensor
    visible_RK: Tensor
    prompts: int
    prompt_slots: int

    def __len__(self) -> int:
        return len(self.root_R)


class MegatronLM:
    """Cached decoding of a GPTModel under any tensor- and pipeline-parallel layout, without gradient or dropout."""

    def __init__(self, model: GPTModel, shape: Backbone) -> None:
        self.model, self.shape = model, shape

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor, *, reserve: int) -> tuple[Tensor, Cache]:
        """Next-token logits [B, V] after each right-padded prompt, and the cache to extend.

        ``reserve``: how many more tokens per row will come; it sizes the store, which grows if it was too small.
        """
        tokens_BT, lengths_B = tokens_BT.to(parallel.device()), lengths_B.to(parallel.device())
        with _without_sequence_parallel(self.model):
            tokens_BT = pad_rows(tokens_BT, row_multiple(self.model.config))
            B, T = tokens_BT.shape
            store = KeyValueSlots(capacity=T + reserve)
            rows = torch.arange(B, device=tokens_BT.device)
            with attention_context(self.model).using(store=store):
                logits_BV = self._logits(tokens_BT, rows, lengths_B - 1)
        store.advance(T)
        visible = torch.arange(T, device=tokens_BT.device) < lengths_B[:, None]
        return logits_BV, Cache(store, rows, lengths_B, visible, B, T)

    @torch.no_grad()
    def extend(self, cache: Cache, parents_R: Tensor, tokens_R: Tensor) -> tuple[Tensor, Cache]:
        """Row r continues row ``parents_R[r]`` of the cache with one token: logits [R, V] and the next cache.

        Raises ValueError when the cache was extended before.
        """
        if cache.store.used != cache.visible_RK.shape[1]:
            raise ValueError("this cache has been extended already: only the newest cache can be extended")
        device = parallel.device()
        parents_R, tokens_R = parents_R.to(device), tokens_R.to(device)
        if not len(parents_R):
            empty = torch.zeros(0, self.shape.vocab, dtype=logit_dtype(self.model), device=device)
            return empty, replace(cache, root_R=parents_R, length_R=parents_R, visible_RK=cache.visible_RK[:0])
        cache = self._drop_finished(cache, parents_R)
        root_R = cache.root_R[parents_R]
        place_R = _place_within(root_R)
        with _without_sequence_parallel(self.model):
            W = int(place_R.max()) + 1
            W += -W % row_multiple(self.model.config)
            cache.store.make_room(W)
            used = cache.store.used
            own_RW = torch.arange(W, device=device) == place_R[:, None]
            visible_RK = torch.cat([cache.visible_RK[parents_R], own_RW], dim=1)
            tokens_BW = tokens_R.new_zeros(cache.prompts, W)
            tokens_BW[root_R, place_R] = tokens_R
            positions_BW = cache.length_R.new_zeros(cache.prompts, W)
            positions_BW[root_R, place_R] = cache.length_R[parents_R]
            mask_BWK = torch.zeros(cache.prompts, W, used + W, dtype=torch.bool, device=device)
            mask_BWK[:, :, 0] = True  # places without a row see the first slot: a softmax over nothing is not a number
            mask_BWK[root_R, place_R] = visible_RK
            context = attention_context(self.model)
            with context.using(store=cache.store, mask_BSK=mask_BWK, positions_BT=positions_BW):
                logits_RV = self._logits(tokens_BW, root_R, place_R)
        cache.store.advance(W)
        squeezed = squeeze_slots(visible_RK, root_R, cache.prompts, cache.prompt_slots)
        if squeezed is not None:
            slot_BK, visible_RK = squeezed
            cache.store.keep(slot_BK, cache.prompt_slots)
        length_R = cache.length_R[parents_R] + 1
        return logits_RV, Cache(cache.store, root_R, length_R, visible_RK, cache.prompts, cache.prompt_slots)

    def _drop_finished(self, cache: Cache, parents_R: Tensor) -> Cache:
        """Give up the slots of prompts without living rows once they are half of all prompts."""
        living = cache.root_R[parents_R].unique()
        if 2 * len(living) > cache.prompts:
            return cache
        cache.store.take_prompts(living)
        renumbered = torch.zeros(cache.prompts, dtype=torch.long, device=living.device)
        renumbered[living] = torch.arange(len(living), device=living.device)
        root_R = renumbered[cache.root_R]
        return Cache(cache.store, root_R, cache.length_R, cache.visible_RK, len(living), cache.prompt_slots)

    def _logits(self, tokens_BT: Tensor, row_N: Tensor, position_N: Tensor) -> Tensor:
        """Logits at (row, position) on every model-parallel rank; the hidden states walk through the stages."""
        B, T = tokens_BT.shape
        with modes(self.model, training=False):
            if not parallel.is_first_stage():
                arriving = next(self.model.parameters()).new_empty(T, B, self.shape.hidden)
                dist.recv(arriving, src=parallel_state.get_pipeline_model_parallel_prev_rank(), group=_stages())
                self.model.set_input_tensor(arriving)
            hidden_TBD = self.model(tokens_BT, None, None)
            self.model.set_input_tensor(None)
            logits_NV = None
            if parallel.is_last_stage():
                logits_NV = full_logits_NV(self.model, hidden_TBD[position_N, row_N])
            else:
                following = parallel_state.get_pipeline_model_parallel_next_rank()
                dist.send(hidden_TBD.contiguous(), dst=following, group=_stages())
        shape = (len(row_N), self.shape.vocab)
        return parallel.broadcast_from_last_stage(logits_NV, shape, logit_dtype(self.model))


def _stages() -> dist.ProcessGroup:
    return parallel_state.get_pipeline_model_parallel_group()


def _place_within(root_R: Tensor) -> Tensor:
    """Each row's number among the rows of the same prompt, in row order."""
    order = root_R.argsort(stable=True)
    sorted_root = root_R[order]
    first = torch.searchsorted(sorted_root, sorted_root)
    place_R = torch.empty_like(root_R)
    place_R[order] = torch.arange(len(root_R), device=root_R.device) - first
    return place_R


@contextlib.contextmanager
def _without_sequence_parallel(model: GPTModel) -> Iterator[None]:
    """Decoding steps are one token long: nothing to split. Megatron's modules read these flags in every forward."""
    if not model.config.sequence_parallel:
        yield
        return
    holders = [model.config, *model.modules()]
    flagged = [(holder, flag) for holder in holders for flag in _SEQUENCE_FLAGS if getattr(holder, flag, None) is True]
    try:
        for holder, flag in flagged:
            setattr(holder, flag, False)
        yield
    finally:
        for holder, flag in flagged:
            setattr(holder, flag, True)
