"""Cached decoding: each prompt is prefilled once, then chains of tokens are appended below any token run before.

Model-parallel ranks call the same methods with the same arguments and get the same log-probs, so the same search runs.

Axes: B prompts, R rows (tokens that were run), G generated slots of a prompt, P prompt slots, S new tokens, D width, M
prompts to keep, N queried rows, E queried edges (pairs of a row and a token).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.maths.segments import segment_log_softmax
from tawin_nemo.models.megatron.decode import inference_forward
from tawin_nemo.models.megatron.decode.fixed_shape import FixedShapeDecode
from tawin_nemo.models.megatron.decode.kv_store import (
    ExtendPlan,
    KeyValueSlots,
    PrefillPlan,
    chains_of,
    index_in_group,
)
from tawin_nemo.models.megatron.model.attention import AttentionPlan
from tawin_nemo.models.megatron.model.forward import logit_dtype, modes, padding, without_sequence_parallel
from tawin_nemo.models.megatron.model.fp8_scales import calibrate
from tawin_nemo.models.megatron.model.head import best_tokens, edge_logits, log_sum_exp, top_tokens
from tawin_nemo.models.megatron.model.in_flight import wait_for_weights
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows


@dataclass(frozen=True)
class Cache:
    """R rows (tokens that were run) over the stored keys of B prompts.

    ``extend`` writes into the same store, so only the newest cache can be used.
    """

    store: KeyValueSlots
    prompt_length_B: Tensor
    used_B: Tensor  # generated slots in use
    prompt_R: Tensor
    length_R: Tensor  # tokens up to and with the row's: the rotary position of what follows
    visible_RG: Tensor  # bool: the generated slots of its prompt that the row and its successors see
    hidden_RD: Tensor | None  # after the final norm; only on the last pipeline stage

    def __len__(self) -> int:
        return len(self.prompt_R)


class MegatronLM:
    """Cached decoding of a GPTModel under any tensor- and pipeline-parallel layout, without gradient or dropout.

    It runs in the model's own process groups, which need not be those of training.
    """

    def __init__(self, model: GPTModel, shape: Backbone, *, use_inference_forward: bool = True) -> None:
        """``use_inference_forward=False`` calls megatron's modules: the same results, slower."""
        self.model, self.shape = model, shape
        self._stages: dist.ProcessGroup = model.pg_collection.pp
        self._stage, self._last_stage = self._stages.rank(), self._stages.size() - 1
        self._use_inference_forward = use_inference_forward and inference_forward.supported(model)
        self._drops = model.config.attention_dropout > 0

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the real vocabulary, without padding."""
        return self.shape.vocab

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence that the model accepts."""
        return self.shape.positions

    def rows(self, cache: Cache) -> int:
        """Tokens that were run, prompts counting as one (their last token)."""
        return len(cache)

    @torch.no_grad()
    def prefill(self, prompts: TokenRows) -> Cache:
        """Run each prompt once; row b is the last token of prompt b."""
        device = runtime.device()
        length_B = torch.from_numpy(prompts.lengths).to(device)
        batch = chains_of(prompts)
        store = KeyValueSlots(len(prompts), int(prompts.lengths.max()))
        extra = padding(len(batch.tokens_S), self.model.config)
        plan = PrefillPlan(batch, device, store, extra)
        hidden_SD = self._run(batch.tokens_S, extra, plan)
        last_B = length_B.cumsum(0) - 1
        row_B = torch.arange(len(prompts), device=device)
        return Cache(
            store=store,
            prompt_length_B=length_B,
            used_B=torch.zeros_like(length_B),
            prompt_R=row_B,
            length_R=length_B,
            visible_RG=torch.zeros(len(prompts), 0, dtype=torch.bool, device=device),
            hidden_RD=None if hidden_SD is None else hidden_SD[last_B],
        )

    def fixed_shape(self, prompts: int, prompt_slots: int, slots: int) -> FixedShapeDecode | None:
        """Decoding of B prompts in static buffers (see ``rollout.lm.FixedShapeLM``); None if this layout has none."""
        if self._last_stage > 0 or not self._use_inference_forward:
            return None
        return FixedShapeDecode(self, prompts, prompt_slots, slots)

    @torch.no_grad()
    def extend(self, cache: Cache, parent_R: Tensor, chains: TokenRows) -> Cache:
        """Append chain r below row ``parent_R[r]``; its tokens become the next rows (see ``rollout.lm.LM``)."""
        if not len(chains):
            return cache
        device = runtime.device()
        parent_R, length_R = parent_R.to(device), torch.from_numpy(chains.lengths).to(device)
        row_S = torch.repeat_interleave(length_R)
        index_S = torch.arange(len(row_S), device=device) - (length_R.cumsum(0) - length_R)[row_S]
        parent_S = parent_R[row_S]
        prompt_S, position_S = cache.prompt_R[parent_S], cache.length_R[parent_S] + index_S
        slot_S = cache.used_B[prompt_S] + index_in_group(prompt_S)  # slots of one chain follow each other
        generated = max(int(slot_S.max()) + 1, cache.visible_RG.shape[1])
        cache.store.make_room(cache.store.prompt_slots + generated)
        slot_G = torch.arange(generated, device=device)
        visible_RG = torch.nn.functional.pad(cache.visible_RG, (0, generated - cache.visible_RG.shape[1]))
        own_SG = (slot_G >= (slot_S - index_S)[:, None]) & (slot_G <= slot_S[:, None])
        visible_SG = visible_RG[parent_S] | own_SG
        prompt_SP = torch.arange(cache.store.prompt_slots, device=device) < cache.prompt_length_B[prompt_S, None]
        extra = padding(len(row_S), self.model.config)
        plan = ExtendPlan(
            cache.store, prompt_S, cache.store.prompt_slots + slot_S,
            torch.cat([prompt_SP, visible_SG], dim=1), position_S, extra,
        )  # fmt: skip
        hidden_SD = self._run(torch.from_numpy(chains.flat).long(), extra, plan)
        return replace(
            cache,
            used_B=cache.used_B + torch.bincount(prompt_S, minlength=len(cache.used_B)),
            prompt_R=torch.cat([cache.prompt_R, prompt_S]),
            length_R=torch.cat([cache.length_R, position_S + 1]),
            visible_RG=torch.cat([visible_RG, visible_SG]),
            hidden_RD=None if hidden_SD is None else torch.cat([_present(cache.hidden_RD), hidden_SD]),
        )

    def keep(self, cache: Cache, prompt_M: Tensor) -> tuple[Cache, Tensor]:
        """The cache of M of its prompts only, and every old row's new number (-1 = gone)."""
        prompt_M = prompt_M.to(cache.prompt_R.device)
        new_B = torch.full_like(cache.used_B, -1)
        new_B[prompt_M] = torch.arange(len(prompt_M), device=new_B.device)
        kept_R = new_B[cache.prompt_R] >= 0
        new_R = torch.where(kept_R, kept_R.cumsum(0) - 1, -1)
        cache.store.keep(prompt_M)
        used_B = cache.used_B[prompt_M]
        generated = int(used_B.max()) if len(used_B) else 0
        return Cache(
            store=cache.store,
            prompt_length_B=cache.prompt_length_B[prompt_M],
            used_B=used_B,
            prompt_R=new_B[cache.prompt_R][kept_R],
            length_R=cache.length_R[kept_R],
            visible_RG=cache.visible_RG[kept_R, :generated],
            hidden_RD=None if cache.hidden_RD is None else cache.hidden_RD[kept_R],
        ), new_R

    def join(self, first: Cache, second: Cache) -> tuple[Cache, Tensor, Tensor]:
        """One cache of both, prompts of ``first`` in front, and the new numbers of the rows of each."""
        prompts = len(first.used_B), len(second.used_B)
        heads_then_rest = torch.cat([
            torch.arange(prompts[0]), len(first) + torch.arange(prompts[1]),
            torch.arange(prompts[0], len(first)), len(first) + torch.arange(prompts[1], len(second)),
        ]).to(first.prompt_R.device)  # fmt: skip
        new_R = heads_then_rest.argsort()
        first.store.join(second.store)
        generated = max(first.visible_RG.shape[1], second.visible_RG.shape[1])
        visible = [
            torch.nn.functional.pad(x.visible_RG, (0, generated - x.visible_RG.shape[1])) for x in (first, second)
        ]
        hidden = None
        if first.hidden_RD is not None:
            hidden = torch.cat([first.hidden_RD, _present(second.hidden_RD)])[heads_then_rest]
        joined = Cache(
            store=first.store,
            prompt_length_B=torch.cat([first.prompt_length_B, second.prompt_length_B]),
            used_B=torch.cat([first.used_B, second.used_B]),
            prompt_R=torch.cat([first.prompt_R, second.prompt_R + prompts[0]])[heads_then_rest],
            length_R=torch.cat([first.length_R, second.length_R])[heads_then_rest],
            visible_RG=torch.cat(visible)[heads_then_rest],
            hidden_RD=hidden,
        )
        return joined, new_R[: len(first)], new_R[len(first) :]

    @torch.no_grad()
    def logprobs(self, cache: Cache, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        """Log-probs [E] of tokens behind rows, on every model-parallel rank (see ``rollout.lm.LM``)."""
        device = runtime.device()
        row_N, position_E, token_E = row_N.to(device), position_E.to(device), token_E.to(device)
        logp_E = None
        if self._stage == self._last_stage:
            hidden_ND = _present(cache.hidden_RD).index_select(0, row_N)
            logit_E = edge_logits(self.model, hidden_ND, position_E, token_E)
            if space == "trie":
                logp_E = segment_log_softmax(logit_E, position_E, len(row_N))
            else:
                logp_E = logit_E - log_sum_exp(self.model, hidden_ND)[position_E]
        return runtime.broadcast_from_last_stage(logp_E, (len(token_E),), logit_dtype(self.model), stages=self._stages)

    @torch.no_grad()
    def best_tokens(self, cache: Cache, row_N: Tensor) -> Tensor:
        """The most likely token behind each row, on every model-parallel rank (see ``rollout.lm.LM``)."""
        token_N = None
        if self._stage == self._last_stage:
            hidden_ND = _present(cache.hidden_RD).index_select(0, row_N.to(runtime.device()))
            token_N = best_tokens(self.model, hidden_ND)
        return runtime.broadcast_from_last_stage(token_N, (len(row_N),), torch.int64, stages=self._stages)

    @torch.no_grad()
    def top_tokens(self, cache: Cache, row_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens behind each row and their log-probs, on all model-parallel ranks (``rollout.lm.LM``)."""
        token_NK = logp_NK = None
        if self._stage == self._last_stage:
            hidden_ND = _present(cache.hidden_RD).index_select(0, row_N.to(runtime.device()))
            token_NK, logp_NK = top_tokens(self.model, hidden_ND, count)
        sizes = (len(row_N), min(count, self.vocab_size))
        tokens = runtime.broadcast_from_last_stage(token_NK, sizes, torch.int64, stages=self._stages)
        return tokens, runtime.broadcast_from_last_stage(logp_NK, sizes, logit_dtype(self.model), stages=self._stages)

    def _run(self, tokens_S: Tensor, extra: int, plan: AttentionPlan) -> Tensor | None:
        """Hidden states [S, D] of the real tokens on the last stage, None on the others, through all stages."""
        real = len(tokens_S)
        tokens_S = torch.nn.functional.pad(tokens_S.to(runtime.device()), (0, extra))
        arriving_SBD = None
        if self._stage > 0:
            arriving_SBD = next(self.model.parameters()).new_empty(real + extra, 1, self.shape.hidden)
            before = dist.get_global_rank(self._stages, self._stage - 1)
            dist.recv(arriving_SBD, src=before, group=self._stages)
        hidden_SD = self.stage_output(tokens_S, arriving_SBD, plan)
        if self._stage < self._last_stage:
            following = dist.get_global_rank(self._stages, self._stage + 1)
            dist.send(hidden_SD.contiguous(), dst=following, group=self._stages)
            return None
        return hidden_SD[:real]

    def stage_output(self, tokens_S: Tensor, arriving_SBD: Tensor | None, plan: AttentionPlan) -> Tensor:
        """Hidden states [S, D] behind this stage, of tokens or of what the stage before sent, in evaluation mode."""
        wait_for_weights(self.model)
        if self._use_inference_forward:
            arriving_SD = None if arriving_SBD is None else arriving_SBD[:, 0]
            with modes(self.model, training=False) if self._drops else contextlib.nullcontext():
                return inference_forward.stage_output(self.model, tokens_S, arriving_SD, plan)
        if _keeps_sequence_parallel(self.model.config):
            return self._split_stage_output(tokens_S, arriving_SBD, plan)
        with without_sequence_parallel(self.model), modes(self.model, training=False):
            return self._modules_output(tokens_S, arriving_SBD, plan)[:, 0]

    def _split_stage_output(self, tokens_S: Tensor, arriving_SBD: Tensor | None, plan: AttentionPlan) -> Tensor:
        """``stage_output`` with sequence parallelism inside the stage: its own part of S in, all of S out."""
        tp = self.model.pg_collection.tp
        if arriving_SBD is not None:
            arriving_SBD = mappings.scatter_to_sequence_parallel_region(arriving_SBD, group=tp)
        with modes(self.model, training=False):
            part_SBD = self._modules_output(tokens_S, arriving_SBD, plan)
        return mappings.gather_from_sequence_parallel_region(part_SBD, tensor_parallel_output_grad=False, group=tp)[
            :, 0
        ]

    def _modules_output(self, tokens_S: Tensor, arriving_SBD: Tensor | None, plan: AttentionPlan) -> Tensor:
        if arriving_SBD is not None:
            self.model.set_input_tensor(arriving_SBD)
        run = partial(self.model, tokens_S[None], None, None, packed_seq_params=plan)
        calibrate(self.model, run)
        hidden_SBD: Tensor = run()
        self.model.set_input_tensor(None)
        return hidden_SBD


def _present(hidden_RD: Tensor | None) -> Tensor:
    assert hidden_RD is not None, "only the last pipeline stage holds hidden states"
    return hidden_RD


def _keeps_sequence_parallel(config: TransformerConfig) -> bool:
    """Whether decoding must leave sequence parallelism as training has it.

    Transformer Engine fixes the layout of its quantised tensors, and whether scales are common to all ranks, at a
    module's first FP8 pass, from the flags of that pass. A later pass with other flags fails (block scaling) or reads
    with wrong scales, without an error (tensor-wise scaling).
    """
    return bool(config.sequence_parallel) and config.fp8 is not None
