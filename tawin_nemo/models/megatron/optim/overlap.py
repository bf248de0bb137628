"""Data-parallel communication beside the computation: ``trainer.overlap_grad_reduce`` and ``overlap_param_gather``.

megatron-core cuts the gradient buffer into buckets. A bucket is reduced as soon as the backward pass of the last
micro-batch has completed all of its gradients, while the pass continues below it. For this, megatron's hook on every
parameter must run once per backward pass, and on the thread of that pass. autograd runs it when the parameter's last
use is done, but on another thread if all uses returned None, as those do that write their gradients into the buffer
themselves (embedding and LM head). They return a sparse gradient without entries instead (``signal_rows``).

New weights of a distributed optimizer are gathered bucket by bucket, in the order in which a forward pass needs them.
megatron starts a gather in the first forward pass that needs it. That would be a deadlock here: a search or a scoring
pass need not run on every replica. All gathers are therefore started at the end of the step, which every rank takes.
"""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel

from tawin_nemo.config.schema import TrainerConfig
from tawin_nemo.models.megatron.model.in_flight import under_way

#: Parameters in a bucket, at least. None is megatron-core's choice: 40 million, or 1 million for each replica.
BUCKET_SIZE: int | None = None


def ddp_config(trainer: TrainerConfig, replicas: int) -> DistributedDataParallelConfig:
    """How gradients are summed over ``replicas``; a single one has nothing to overlap."""
    gather = trainer.overlap_param_gather and replicas > 1
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=trainer.grad_reduce_in_fp32,
        overlap_grad_reduce=trainer.overlap_grad_reduce and replicas > 1,
        overlap_param_gather=gather,
        align_param_gather=gather,  # hooks only wait: ``WeightGather`` starts all gathers itself
        use_distributed_optimizer=trainer.distributed_optimizer,
        average_in_collective=False,
        bucket_size=BUCKET_SIZE,
    )


def signal_rows(model: GPTModel) -> None:
    """Let embedding and LM head tell autograd that their gradients, written by row, are complete (``ready_gradient``).

    Parameters without gradient (adapters train beside them, or they lie on another pipeline stage) are left alone.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("word_embeddings" in name or name.startswith("output_layer")):
            rows, width = parameter.shape
            index = torch.zeros((1, 0), dtype=torch.long, device=parameter.device)
            values = torch.zeros((0, width), dtype=parameter.dtype, device=parameter.device)
            empty = torch.sparse_coo_tensor(index, values, (rows, width), check_invariants=False)
            parameter.ready_gradient = empty


class WeightGather:
    """The asynchronous gather of a distributed optimizer's new weights, started by ``start`` on all ranks."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        # buffers are filled from the last parameter to the first; a forward pass needs the first ones first
        self._groups = [*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups][::-1]
        buffers = [bucket.param_data.untyped_storage() for group in self._groups for bucket in group.buckets]
        self.storages = frozenset(buffer.data_ptr() for buffer in buffers)
        self.none_due()

    def start(self) -> None:
        """Start to gather all weights; the optimizer must have stepped, and earlier gathers must have ended."""
        for group in self._groups:
            group.start_param_sync()
        under_way(self)

    def wait(self) -> None:
        """Return when all weights are there."""
        for group in self._groups:
            if group.param_gather_handle is not None:
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    def none_due(self) -> None:
        """Keep megatron's hooks from starting a gather: the reduction of gradients has marked one as due."""
        for group in self._groups:
            group.param_gather_dispatched = True
