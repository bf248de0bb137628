"""Cached decoding: each prompt is prefilled once, then chains of tokens are appended below any token run before.

Model-parallel ranks call the same methods with the same arguments and get the same log-probs, so the same search runs.

Axes: B prompts, R rows (tokens that were run), A generated tokens of a path, S new tokens, D width, M prompts to keep,
N queried rows, E queried edges (pairs of a row and a token).
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.maths.segments import segment_log_softmax
from tawin_nemo.models.megatron.decode import inference_forward
from tawin_nemo.models.megatron.decode.cache import Cache, present, widened
from tawin_nemo.models.megatron.decode.fixed_shape import FixedShapeDecode
from tawin_nemo.models.megatron.decode.kv_store import (
    DecodePlan,
    ExtendPlan,
    KeyValueSlots,
    PrefillPlan,
    index_in_group,
)
from tawin_nemo.models.megatron.model.forward import logit_dtype, modes, padding, without_sequence_parallel
from tawin_nemo.models.megatron.model.fp8_scales import calibrate
from tawin_nemo.models.megatron.model.fp8_weights import QuantisedWeights, keeps_sequence_parallel
from tawin_nemo.models.megatron.model.head import best_tokens, edge_logits, log_sum_exp, top_tokens
from tawin_nemo.models.megatron.model.in_flight import wait_for_weights
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows
from tawin_nemo.util.transfers import to_device


class MegatronLM:
    """Cached decoding of a GPTModel under any tensor- and pipeline-parallel layout, without gradient or dropout.

    It runs in the model's own process groups, which need not be those of training.
    """

    def __init__(
        self, model: GPTModel, shape: Backbone, *, use_inference_forward: bool = True, keep_quantised: bool = False
    ) -> None:
        """``use_inference_forward=False`` calls megatron's modules: the same results, slower.

        FP8 weights are quantised once for each prefill and the calls that continue it; with ``keep_quantised`` once
        until ``weights_changed``, which the caller then calls after every change of the weights.
        """
        self.model, self.shape = model, shape
        self._quantised, self._keep_quantised = QuantisedWeights(model), keep_quantised
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

    @property
    def num_item_tokens(self) -> int:
        """Items whose tokens the model reads in prompts (``model.item_tokens``)."""
        return int(getattr(self.model, "num_item_tokens", 0))

    def rows(self, cache: Cache) -> int:
        """Tokens that were run, prompts counting as one (their last token)."""
        return len(cache)

    def weights_changed(self) -> None:
        """The model has other weights from now on: what was made from them is made again at the next call."""
        self._quantised.renew()

    @torch.no_grad()
    def prefill(self, prompts: TokenRows) -> Cache:
        """Run each prompt once; row b is the last token of prompt b."""
        if not self._keep_quantised:
            self.weights_changed()
        device, length_B = runtime.device(), torch.from_numpy(prompts.lengths)
        store = KeyValueSlots(len(prompts), int(length_B.max()))
        extra = padding(len(prompts.flat), self.model.config)
        plan = PrefillPlan(length_B, device, store, extra)
        hidden_SD = self._run(torch.from_numpy(prompts.flat).long(), extra, plan)
        if hidden_SD is not None:
            hidden_SD = hidden_SD.index_select(0, to_device([length_B.cumsum(0) - 1], device)[0])
        return Cache(
            store=store,
            prompt_length_B=length_B,
            used_B=torch.zeros_like(length_B),
            prompt_R=torch.arange(len(prompts)),
            length_R=length_B,
            path_RA=torch.zeros(len(prompts), 0, dtype=torch.long),
            hidden_RD=hidden_SD,
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
        parent_R, length_R = parent_R.cpu(), torch.from_numpy(chains.lengths)
        row_S = torch.repeat_interleave(length_R)
        index_S = torch.arange(len(row_S)) - (length_R.cumsum(0) - length_R)[row_S]
        parent_S = parent_R[row_S]
        prompt_S, position_S = cache.prompt_R[parent_S], cache.length_R[parent_S] + index_S
        slot_S = cache.used_B[prompt_S] + index_in_group(prompt_S)  # slots of one chain follow each other
        before_S = cache.length_R[parent_S] - cache.prompt_length_B[prompt_S]  # generated tokens of the parent's path
        count_S = before_S + index_S + 1
        columns = max(int(count_S.max()), cache.path_RA.shape[1])
        path_RA = widened(cache.path_RA, columns)
        own_SA = (slot_S - count_S + 1)[:, None] + torch.arange(columns)
        path_SA = torch.where(torch.arange(columns) < before_S[:, None], path_RA[parent_S], own_SA)
        slots = cache.store.prompt_slots + int(torch.maximum(slot_S.max() + 1, cache.used_B.max()))
        cache.store.make_room(slots)
        extra = padding(len(row_S), self.model.config)
        plan = ExtendPlan(
            cache.store, runtime.device(), prompt_S=prompt_S, slot_S=slot_S, position_S=position_S,
            length_B=cache.prompt_length_B, path_SA=path_SA, count_S=count_S, slots=slots, padding=extra,
        )  # fmt: skip
        hidden_SD = self._run(torch.from_numpy(chains.flat).long(), extra, plan)
        return replace(
            cache,
            used_B=cache.used_B + torch.bincount(prompt_S, minlength=len(cache.used_B)),
            prompt_R=torch.cat([cache.prompt_R, prompt_S]),
            length_R=torch.cat([cache.length_R, position_S + 1]),
            path_RA=torch.cat([path_RA, path_SA]),
            hidden_RD=None if hidden_SD is None else torch.cat([present(cache.hidden_RD), hidden_SD]),
        )

    def keep(self, cache: Cache, prompt_M: Tensor) -> tuple[Cache, Tensor]:
        """The cache of M of its prompts only, and every old row's new number (-1 = gone)."""
        prompt_M = prompt_M.cpu()
        new_B = torch.full_like(cache.used_B, -1)
        new_B[prompt_M] = torch.arange(len(prompt_M))
        kept_R = new_B[cache.prompt_R] >= 0
        new_R, row_M = torch.where(kept_R, kept_R.cumsum(0) - 1, -1), kept_R.nonzero()[:, 0]
        prompt_on_device, row_on_device = to_device([prompt_M, row_M], runtime.device())
        cache.store.keep(prompt_on_device)
        prompt_R, length_R = new_B[cache.prompt_R[row_M]], cache.length_R[row_M]
        length_B = cache.prompt_length_B[prompt_M]
        columns = int((length_R - length_B[prompt_R]).max()) if len(row_M) else 0
        return Cache(
            store=cache.store,
            prompt_length_B=length_B,
            used_B=cache.used_B[prompt_M],
            prompt_R=prompt_R,
            length_R=length_R,
            path_RA=cache.path_RA[row_M, :columns],
            hidden_RD=None if cache.hidden_RD is None else cache.hidden_RD.index_select(0, row_on_device),
        ), new_R

    def join(self, first: Cache, second: Cache) -> tuple[Cache, Tensor, Tensor]:
        """One cache of both, prompts of ``first`` in front, and the new numbers of the rows of each."""
        prompts = len(first.used_B), len(second.used_B)
        heads_then_rest = torch.cat([
            torch.arange(prompts[0]), len(first) + torch.arange(prompts[1]),
            torch.arange(prompts[0], len(first)), len(first) + torch.arange(prompts[1], len(second)),
        ])  # fmt: skip
        new_R = heads_then_rest.argsort()
        first.store.join(second.store)
        columns = max(first.path_RA.shape[1], second.path_RA.shape[1])
        hidden = None
        if first.hidden_RD is not None:
            (row_R,) = to_device([heads_then_rest], first.hidden_RD.device)
            hidden = torch.cat([first.hidden_RD, present(second.hidden_RD)]).index_select(0, row_R)
        joined = Cache(
            store=first.store,
            prompt_length_B=torch.cat([first.prompt_length_B, second.prompt_length_B]),
            used_B=torch.cat([first.used_B, second.used_B]),
            prompt_R=torch.cat([first.prompt_R, second.prompt_R + prompts[0]])[heads_then_rest],
            length_R=torch.cat([first.length_R, second.length_R])[heads_then_rest],
            path_RA=torch.cat([widened(x.path_RA, columns) for x in (first, second)])[heads_then_rest],
            hidden_RD=hidden,
        )
        return joined, new_R[: len(first)], new_R[len(first) :]

    @torch.no_grad()
    def logprobs(self, cache: Cache, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        """Log-probs [E] of tokens behind rows, on every model-parallel rank (see ``rollout.lm.LM``)."""
        device = runtime.device()
        row_N, position_E, token_E = (index.to(device, non_blocking=True) for index in (row_N, position_E, token_E))
        logp_E = None
        if self._stage == self._last_stage:
            hidden_ND = present(cache.hidden_RD).index_select(0, row_N)
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
            hidden_ND = present(cache.hidden_RD).index_select(0, row_N.to(runtime.device()))
            token_N = best_tokens(self.model, hidden_ND)
        return runtime.broadcast_from_last_stage(token_N, (len(row_N),), torch.int64, stages=self._stages)

    @torch.no_grad()
    def top_tokens(self, cache: Cache, row_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens behind each row and their log-probs, on all model-parallel ranks (``rollout.lm.LM``)."""
        token_NK = logp_NK = None
        if self._stage == self._last_stage:
            hidden_ND = present(cache.hidden_RD).index_select(0, row_N.to(runtime.device()))
            token_NK, logp_NK = top_tokens(self.model, hidden_ND, count)
        sizes = (len(row_N), min(count, self.vocab_size))
        tokens = runtime.broadcast_from_last_stage(token_NK, sizes, torch.int64, stages=self._stages)
        return tokens, runtime.broadcast_from_last_stage(logp_NK, sizes, logit_dtype(self.model), stages=self._stages)

    @torch.no_grad()
    def hidden_states(self, cache: Cache, row_N: Tensor) -> Tensor:
        """The states behind the final norm at some rows, on every model-parallel rank (see ``rollout.lm.LM``)."""
        hidden_ND, sizes = None, (len(row_N), self.shape.hidden)
        if self._stage == self._last_stage:
            hidden_ND = present(cache.hidden_RD).index_select(0, row_N.to(runtime.device())).float()
        return runtime.broadcast_from_last_stage(hidden_ND, sizes, torch.float32, stages=self._stages)

    def _run(self, tokens_S: Tensor, extra: int, plan: DecodePlan) -> Tensor | None:
        """Hidden states [S, D] of the real tokens on the last stage, None on the others, through all stages."""
        real = len(tokens_S)
        tokens_S = to_device([torch.nn.functional.pad(tokens_S, (0, extra))], runtime.device())[0]
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

    def stage_output(self, tokens_S: Tensor, arriving_SBD: Tensor | None, plan: DecodePlan) -> Tensor:
        """Hidden states [S, D] behind this stage, of tokens or of what the stage before sent, in evaluation mode."""
        wait_for_weights(self.model)
        if self._use_inference_forward:
            arriving_SD = None if arriving_SBD is None else arriving_SBD[:, 0]
            with modes(self.model, training=False) if self._drops else contextlib.nullcontext():
                return inference_forward.stage_output(self.model, tokens_S, arriving_SD, plan)
        if keeps_sequence_parallel(self.model.config):
            return self._split_stage_output(tokens_S, arriving_SBD, plan)
        with without_sequence_parallel(self.model), modes(self.model, training=False):
            return self._modules_output(tokens_S, arriving_SBD, plan)[:, 0]

    def _split_stage_output(self, tokens_S: Tensor, arriving_SBD: Tensor | None, plan: DecodePlan) -> Tensor:
        """``stage_output`` with sequence parallelism inside the stage: its own part of S in, all of S out."""
        tp = self.model.pg_collection.tp
        if arriving_SBD is not None:
            arriving_SBD = mappings.scatter_to_sequence_parallel_region(arriving_SBD, group=tp)
        with modes(self.model, training=False):
            part_SBD = self._modules_output(tokens_S, arriving_SBD, plan)
        return mappings.gather_from_sequence_parallel_region(part_SBD, tensor_parallel_output_grad=False, group=tp)[
            :, 0
        ]

    def _modules_output(self, tokens_S: Tensor, arriving_SBD: Tensor | None, plan: DecodePlan) -> Tensor:
        if arriving_SBD is not None:
            self.model.set_input_tensor(arriving_SBD)
        run = partial(self.model, tokens_S[None], None, None, packed_seq_params=plan)
        calibrate(self.model, run)
        with self._quantised.kept():
            hidden_SBD: Tensor = run()
        self.model.set_input_tensor(None)
        return hidden_SBD
