"""One optimizer step over micro-batches, through megatron's DDP, optimizer and pipeline schedules.

Everything is summed: loss closures divide by global counts themselves, so neither the split into micro-batches nor the
number of data-parallel ranks changes a gradient or a statistic.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import TrainerConfig
from tawin_nemo.models.megatron.hf.new_tokens import drop_frozen_gradients, frozen_parameters
from tawin_nemo.models.megatron.model.forward import batch_logprobs, hidden_states, logit_dtype, modes
from tawin_nemo.models.megatron.model.fused import fuse
from tawin_nemo.models.megatron.model.in_flight import wait_for_weights
from tawin_nemo.models.megatron.optim.offload import OptimizerOffload
from tawin_nemo.models.megatron.optim.overlap import WeightGather, ddp_config, signal_rows
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenBatch
from tawin_nemo.util.errors import NonFiniteStep
from tawin_nemo.util.torch_modes import without_modes

Loss = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class MicroBatch:
    """What runs in one forward pass; ``loss`` maps its log-probs [N] to a summed loss and summed statistics."""

    batch: TokenBatch
    loss: Loss


def _no_rows() -> MicroBatch:
    """The micro-batch of a data-parallel rank without rows, which must still take part in the collectives."""
    none, zero, one = (
        torch.zeros(0, dtype=torch.long),
        torch.zeros(1, dtype=torch.long),
        torch.ones(1, dtype=torch.long),
    )
    token = TokenBatch(
        tokens_S=zero, position_S=zero, end_S=one, chain_B=one, tree_B=zero, index_P=none, row_N=none, target_N=none
    )
    return MicroBatch(token, lambda logp_N: (logp_N.sum(), {}))


def _forward_step(step: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """megatron's forward step: this stage's output, and the function of it that ends in the loss."""
    micro = next(step)

    def loss_of(hidden_SBD: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with without_modes():
            wait_for_weights(model)  # the head is read without its module
            logp_N = batch_logprobs(model, micro.batch, hidden_SBD)
            loss, stats = micro.loss(logp_N)
        if not loss.requires_grad:  # every stage must get a gradient, or the pipeline would wait for ever
            loss = loss + 0.0 * logp_N.sum()
        count = torch.ones((), dtype=torch.int, device=loss.device)  # unused: the finaliser below does not rescale
        return loss.clone(), count, {**{name: value.detach() for name, value in stats.items()}, "loss": loss.detach()}

    return hidden_states(model, micro.batch), loss_of


def _sum_gradients(model: list[Any], num_tokens: Tensor | None, **groups: Any) -> None:
    """megatron's ``finalize_model_grads`` without its division by the token count."""
    finalize_model_grads(model, None, **groups)


def score(model: GPTModel, batches: list[TokenBatch]) -> list[Tensor]:
    """Log-probs [N] of each batch without gradient or dropout, equal on all model-parallel ranks."""
    if not batches:
        return []
    wait_for_weights(model)

    def scoring_step(step: Iterator[TokenBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(step)

        def keep(hidden_SBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with without_modes():
                logp_N = batch_logprobs(model, batch, hidden_SBD)
            zero = torch.zeros((), device=logp_N.device)
            return zero, zero.int(), logp_N

        return hidden_states(model, batch), keep

    with torch.no_grad(), modes(model, training=False):
        kept: list[Tensor] = get_forward_backward_func()(
            forward_step_func=scoring_step,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=len(batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
        )
    sizes = [len(batch.row_N) for batch in batches]
    flat = runtime.broadcast_from_last_stage(
        torch.cat(kept) if kept else None, (sum(sizes),), logit_dtype(model), stages=model.pg_collection.pp
    )
    return list(flat.split(sizes))


class Trainable:
    """A model with its optimizer; ``model`` is the bare GPTModel, ``ddp`` the wrapped one, ``optimizer`` megatron's."""

    def __init__(self, model: GPTModel, shape: Backbone, trainer: TrainerConfig, *, lr: float) -> None:
        self.model, self.shape, self.config = model, shape, model.config
        self._weight_decay, self._clip_grad = trainer.weight_decay, trainer.clip_grad
        bf16 = model.config.params_dtype == torch.bfloat16
        replicas = runtime.data_parallel().size
        config = ddp_config(trainer, replicas)
        self.ddp = DistributedDataParallel(config=self.config, ddp_config=config, module=model)
        self.ddp.broadcast_params()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=lr,
                min_lr=0.0,
                weight_decay=trainer.weight_decay,  # its group of one-dimensional tensors has wd_mult 0
                adam_beta1=0.9,
                adam_beta2=trainer.adam_beta2,
                adam_eps=1e-8,
                bf16=bf16,
                params_dtype=model.config.params_dtype,
                use_distributed_optimizer=trainer.distributed_optimizer,
                overlap_param_gather=config.overlap_param_gather,
            ),
            [self.ddp],
        )
        fuse(model, self.optimizer)
        self._frozen = frozen_parameters(model)
        self._offload = OptimizerOffload(self.ddp, self.optimizer) if trainer.offload_optimizer else None
        self._gather = WeightGather(self.ddp) if config.overlap_param_gather else None
        self.config.finalize_model_grads_func = _sum_gradients
        if config.overlap_grad_reduce:
            self.config.no_sync_func = self.ddp.no_sync  # nothing is reduced before the last micro-batch
            signal_rows(model)
        if replicas == 1 and self.config.fp8 is None:  # FP8 weights are requantised in the gather
            # collectives of one rank: gloo copies all gradients, then all weights, into fresh memory and back
            self.ddp.finish_grad_sync = self.ddp.start_param_sync = lambda *unused, **named: None

    def update(self, micro_batches: list[MicroBatch], *, lr: float) -> dict[str, float]:
        """One AdamW step with learning rate ``lr``; returns summed statistics, ``loss`` and ``grad_norm`` (before
        clipping), equal on all ranks.

        Data-parallel ranks may bring different numbers of micro-batches, also none; the ranks of one model-parallel
        group bring the same ones. Raises NonFiniteStep when the loss or a gradient is not finite, on all ranks; the
        weights are then unchanged.
        """
        stats = self.accumulate(micro_batches)
        if not math.isfinite(stats["loss"]):
            raise NonFiniteStep(f"the loss is {stats['loss']}; the weights were not changed.")
        return {**stats, "grad_norm": self.step(lr)}

    def update_without_gradient(self, *, lr: float) -> float:
        """The AdamW step of a gradient of exactly 0, without forward and backward; returns the norm, 0.

        The moments decay and the weights follow them, bit for bit as after a backward pass of a loss of 0.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self.step(lr)

    def accumulate(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Forward and backward: the gradients' buffers hold the sum over micro-batches and data-parallel ranks."""
        micro_batches = micro_batches or [_no_rows()]
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        with modes(self.ddp, training=True):
            stats = get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=iter(micro_batches),
                model=[self.ddp],
                num_microbatches=len(micro_batches),
                seq_length=1,  # shapes are sent along with the tensors (variable_seq_lengths)
                micro_batch_size=1,
            )
        if self._gather is not None:
            self._gather.none_due()
        return _sum_stats(stats)

    def step(self, lr: float) -> float:
        """AdamW on the accumulated gradients; returns their norm before clipping."""
        wait_for_weights(self.model)  # of the step before, which no forward pass has read
        drop_frozen_gradients(self._frozen)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            self._raise_non_finite(grad_norm)
        self._clip(grad_norm)
        for group in self.optimizer.param_groups:  # what megatron's own schedule object would set
            group["lr"] = lr
            decay = 0.0 if self._frozen else self._weight_decay  # it would move rows that are not trained
            group["weight_decay"] = decay * group["wd_mult"]
        self.optimizer.step_with_ready_grads()
        if self._gather is not None:
            self._gather.start()
        return grad_norm

    def _clip(self, grad_norm: float) -> None:
        """megatron's clipping with its arithmetic, in place: without apex its own makes a copy of every gradient."""
        scale = self._clip_grad / (grad_norm + 1e-6)
        if 0.0 < scale < 1.0:
            params = [param for group in self.optimizer.param_groups for param in group["params"]]
            torch._foreach_mul_([param.grad for param in params if param.grad is not None], scale)

    def optimizer_offloaded(self) -> contextlib.AbstractContextManager[None]:
        """With ``trainer.offload_optimizer``: gradients and optimizer state lie in CPU memory inside the block.

        The model may only be read there.
        """
        return contextlib.nullcontext() if self._offload is None else self._offload.offloaded()

    def score(self, batches: list[TokenBatch]) -> list[Tensor]:
        """Log-probs of the current weights; see ``score``."""
        return score(self.model, batches)

    def _raise_non_finite(self, grad_norm: float) -> None:
        named = self.model.named_parameters()
        bad = [name for name, p in named if p.requires_grad and not torch.isfinite(p.main_grad).all()]
        names = sorted({name for names in runtime.gather_objects(bad) for name in names})
        raise NonFiniteStep(
            f"the gradient norm is {grad_norm}; not finite in {len(names)} tensors: "
            f"{', '.join(names[:5]) or 'only the norm itself'}; the weights were not changed."
        )


def _sum_stats(stats: list[dict[str, Tensor]]) -> dict[str, float]:
    """Sum over micro-batches and data-parallel ranks, in rank order, then broadcast from the last pipeline stage."""
    totals: dict[str, float] = {}
    if runtime.is_last_stage():
        local: dict[str, float] = {}
        named = [(name, value) for micro in stats for name, value in micro.items()]
        numbers = torch.stack([value.detach() for _, value in named]).tolist() if named else []  # the host waits once
        for (name, _), number in zip(named, numbers, strict=True):
            local[name] = local.get(name, 0.0) + number
        for shard in runtime.data_parallel().gather(local):
            for name, value in shard.items():
                totals[name] = totals.get(name, 0.0) + value
    if runtime.pp_size() > 1:
        box = [totals]
        dist.broadcast_object_list(
            box,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        totals = box[0]
    return totals
