"""Process groups: initialisation under any launcher, ranks and sizes, and the collectives of other modules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.parallel import channel, disaggregated, groups, shim
from tawin_nemo.models.megatron.parallel.disaggregated import RolloutRanks
from tawin_nemo.models.megatron.parallel.groups import TIMEOUT, time_limit
from tawin_nemo.types import DataParallel
from tawin_nemo.util.errors import ConfigError, TawinError
from tawin_nemo.util.launch import Launch, read_launch, rendezvous
from tawin_nemo.util.log import get_logger

_log = get_logger(__name__)
T = TypeVar("T")


def _mpu() -> Any:
    """megatron's ``parallel_state``, imported at the first use: seconds which a dry run does not pay."""
    from megatron.core import parallel_state

    return parallel_state


def _start_process_group(launch: Launch) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    membership: dict[str, Any] = {"rank": launch.rank, "world_size": launch.world_size, "timeout": time_limit()}
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), **membership)
        return
    address, port = rendezvous()
    dist.init_process_group(backend, init_method=f"tcp://{address}:{port}", **membership)


def initialize(
    cfg: ModelConfig, *, seed: int, limit: timedelta = TIMEOUT, rollout_ranks: RolloutRanks | None = None
) -> None:
    """Start (or re-use) the process group, lay out TP x PP x DP and seed every generator.

    A second call with the same layout only seeds again; with another layout it makes the groups anew. ``limit``: the
    time limit of collectives in these groups. With ``rollout_ranks`` the last ranks of the job only run rollouts, and
    the world of this module's functions is that of the training ranks (``disaggregated``); a second call cannot change
    this.

    Raises ConfigError when the number of processes that train is not a multiple of TP x PP.
    """
    _mpu()  # before the shim: torch.compile, which megatron imports, must see torch.cuda as it is
    if torch.cuda.is_available():
        use_device()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for every new shape: 0.02 to 1 s, kept for ever
    else:
        shim.install()
    groups.set_time_limit(limit)
    tp, pp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    ranks = world_size() - (rollout_ranks.ranks if rollout_ranks and not disaggregated.is_disaggregated() else 0)
    if ranks < 1 or (ranks % (tp * pp) and not disaggregated.is_rollout_rank()):
        raise ConfigError(
            f"model.tensor_model_parallel_size={tp} x model.pipeline_model_parallel_size={pp} = {tp * pp} does not "
            f"divide the number of processes, {ranks}: start a multiple of {tp * pp} or lower these sizes"
        )
    if not dist.is_initialized():
        _start_process_group(read_launch())
    if rollout_ranks and not disaggregated.is_disaggregated():
        disaggregated.split_job(rollout_ranks)
    if disaggregated.is_rollout_rank():
        return
    if _mpu().model_parallel_is_initialized() and _layout() != (tp, pp):
        _destroy_layout()
    if not _mpu().model_parallel_is_initialized():
        _mpu().initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            create_gloo_process_groups=True,
            distributed_timeout_minutes=time_limit().total_seconds() / 60,
        )
        # the one group that megatron 0.16 makes with torch's own limit
        _mpu().update_pg_timeout(time_limit(), _mpu().get_expert_data_parallel_group_gloo())
        sizes = (world_size(), tp, pp, world_size() // (tp * pp))
        _log.info("parallel layout: %d processes = TP %d x PP %d x DP %d", *sizes)
    seed_step(seed, 0)


def _layout() -> tuple[int, int]:
    return (
        _mpu().get_tensor_model_parallel_world_size(),
        _mpu().get_pipeline_model_parallel_world_size(),
    )


def seed_step(seed: int, step: int) -> None:
    """Seed every generator (torch's and megatron's tracker) as a pure function of seed, step and rank.

    Dropout outside tensor-parallel regions agrees between the ranks of one TP group; inside them it differs per TP rank
    (megatron adds the TP rank); data-parallel ranks and pipeline stages draw independently. A resumed run therefore
    needs no generator history.
    """
    from megatron.core import tensor_parallel

    key = f"{seed}/{step}/{_mpu().get_data_parallel_rank()}/{_mpu().get_pipeline_model_parallel_rank()}"
    value = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1
    torch.manual_seed(value)
    tensor_parallel.model_parallel_cuda_manual_seed(value)


def _destroy_layout() -> None:
    _mpu().destroy_model_parallel()
    if not disaggregated.is_disaggregated():  # otherwise ``split_job`` made them, once for the whole job
        groups.reset()


def shutdown() -> None:
    """Leave the process groups; safe to call when none were made."""
    if dist.is_initialized() and _mpu().model_parallel_is_initialized():
        _mpu().destroy_model_parallel()
    groups.reset()
    disaggregated.reset()
    if dist.is_initialized():
        dist.destroy_process_group()


def data_parallel() -> DataParallel:
    """This rank among the data-parallel replicas; ``gather`` sends Python objects over gloo."""
    if world_size() == 1:
        return DataParallel()
    if _mpu().get_data_parallel_world_size() == 1:
        return DataParallel()
    return groups.replicas(_mpu().get_data_parallel_group_gloo())


def world_rank() -> int:
    """Rank of this process in the world (with disaggregated placement: among the training ranks)."""
    return dist.get_rank() if dist.is_initialized() else read_launch().rank


def world_size() -> int:
    """Number of processes of the world (with disaggregated placement: of the training ranks)."""
    return dist.get_world_size() if dist.is_initialized() else read_launch().world_size


def tp_rank() -> int:
    """Rank of this process in its tensor-parallel group."""
    return _mpu().get_tensor_model_parallel_rank()


def tp_size() -> int:
    """Tensor-parallel size of training."""
    return _mpu().get_tensor_model_parallel_world_size()


def pp_rank() -> int:
    """Pipeline stage of this process, from 0."""
    return _mpu().get_pipeline_model_parallel_rank()


def pp_size() -> int:
    """Number of pipeline stages of training."""
    return _mpu().get_pipeline_model_parallel_world_size()


def is_first_stage() -> bool:
    """Whether this process has the first pipeline stage, with the embedding."""
    return _mpu().is_pipeline_first_stage()


def is_last_stage() -> bool:
    """Whether this process has the last pipeline stage, with the LM head."""
    return _mpu().is_pipeline_last_stage()


def device() -> torch.device:
    """The device on which this rank computes."""
    return groups.collective_device()


def use_device() -> None:
    """Select this process's GPU; every thread that computes has to call it, since CUDA's device is thread-local."""
    if torch.cuda.is_available():
        torch.cuda.set_device(read_launch().local_rank % torch.cuda.device_count())


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier(device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None)


def broadcast_from_last_stage(
    tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, *, stages: dist.ProcessGroup
) -> Tensor:
    """The ``tensor`` of the last pipeline stage, on all ``stages`` of a model; the other stages may pass None."""
    if stages.size() == 1:
        assert tensor is not None
        return tensor
    last = stages.size() - 1
    if tensor is None or stages.rank() != last:
        tensor = torch.empty(shape, dtype=dtype, device=device())
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=dist.get_global_rank(stages, last), group=stages)
    return tensor


def broadcast_object(value: Any) -> Any:
    """World rank 0's Python object, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_0(compute: Callable[[], T]) -> T:
    """Call ``compute`` on world rank 0 alone; returns its result on every rank.

    A TawinError is raised on every rank: the error itself on rank 0, on the others one of the nearest class of
    ``util.errors`` with the same message. Any other exception is raised on rank 0 alone and ends the job.
    """
    if world_size() == 1:
        return compute()
    failure: TawinError | None = None
    result: tuple[Any, TawinError | None] = (None, None)
    if world_rank() == 0:
        try:
            result = (compute(), None)
        except TawinError as error:
            failure = error
            kind = next(base for base in type(error).__mro__ if base.__module__ == TawinError.__module__)
            result = (None, kind(str(error)))
    value, remote = broadcast_object(result)
    if failure is not None or remote is not None:
        raise failure or remote
    computed: T = value
    return computed


def broadcast_bytes(data: bytes | None) -> bytes:
    """World rank 0's bytes, on every rank; the others pass None."""
    return channel.broadcast_bytes(data, device=device())


def broadcast_tensor(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """World rank 0's tensor (of this shape and dtype), on every rank, in CPU memory; the others pass None."""
    box = torch.empty(shape, dtype=dtype, device=device()) if tensor is None else tensor.to(device()).contiguous()
    dist.broadcast(box, src=0)
    return box.cpu()


def gather_objects(value: Any) -> list[Any]:
    """Every process's Python object, in world-rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether any process's ``flag`` is set, the same answer on every rank."""
    return any_rank_of([flag])[0]


def any_rank_of(flags: Sequence[bool]) -> list[bool]:
    """``any_rank`` of several flags in one message."""
    if world_size() == 1:
        return list(flags)
    box = torch.tensor([int(flag) for flag in flags], device=device())
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in box.tolist()]


def rank_layout() -> dict[str, int]:
    """This process's rank in every parallel dimension and the sizes of the layout, as ``layout.json`` has them."""
    return {
        "rank": world_rank(),
        "world_size": world_size(),
        "tp_rank": tp_rank(),
        "tp_size": tp_size(),
        "pp_rank": pp_rank(),
        "pp_size": pp_size(),
        "dp_rank": _mpu().get_data_parallel_rank(),
        "dp_size": _mpu().get_data_parallel_world_size(),
    }
