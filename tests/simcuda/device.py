"""A pretended CUDA device: the branches of a GPU run on a machine without one, its rules enforced, its work counted.

Tensors stay in CPU memory and the arithmetic is the CPU's. Each storage carries a mark, ``cpu`` or ``cuda``:
``tensor.device`` shows it, mixing devices raises as on a GPU, ``torch.cuda.is_available()`` is True, groups of NCCL
refuse CPU tensors (gloo carries them). Launches, host waits and copies are counted by call site::

    from tests.simcuda import device

    with device.pretended():                  # or device.install(): until the process ends
        runtime.initialize(ModelConfig(precision="bf16"), seed=0)
        ...
        result, counts = device.count(lambda: lm.extend(cache, parents, chains))
    print(counts.table())                     # by function and operation, with line numbers
    counts.total("syncs"), counts.events["launches"]

Enter it before the process group is initialised and models are built, in a process of its own where megatron's global
state matters (``tests.simcuda.runs`` starts whole commands so; ``python -m tests.simcuda.budgets`` prints the table of
launches, waits and copies per phase of a step).
What it cannot show: numbers of real kernels, time, memory, NCCL itself, CUDA graphs, the profiler.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch._dynamo

from tawin_nemo.models.megatron.model.compiler import use_fused_functions
from tawin_nemo.models.megatron.model.precision import this_machine
from tawin_nemo.models.megatron.parallel import shim
from tawin_nemo.models.megatron.parallel.shim import locate
from tests.simcuda import groups
from tests.simcuda.dispatch import Operations
from tests.simcuda.functions import Current, NamedDevices, loaded_to_device, seen_in_backward
from tests.simcuda.ledger import Counts, counting
from tests.simcuda.transfers import FAULTS, DeviceFault, wait

T = TypeVar("T")
__all__ = ["FAULTS", "Counts", "DeviceFault", "count", "counting", "install", "pretended", "visible"]

NAME, MEMORY = "NVIDIA H200", 141 * 2**30
_PROPERTIES = types.SimpleNamespace(
    name=NAME, major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, warp_size=32, uuid="pretended",
    regs_per_multiprocessor=65536, shared_memory_per_block=49152, max_threads_per_multi_processor=2048,
    L2_cache_size=60 * 2**20,
)  # fmt: skip


def count(function: Callable[[], T]) -> tuple[T, Counts]:
    """The function's result, and what it asked of the device."""
    with counting() as counts:
        result = function()
    return result, counts


def install() -> None:
    """Pretend until the process ends."""
    _forever.enter_context(pretended())


@contextlib.contextmanager
def visible() -> Iterator[None]:
    """Inside, torch.cuda shows a device, and nothing else is pretended: for imports that look for one."""
    importlib.import_module("torch._inductor.utils")  # the compiler reads torch.cuda as it is
    with contextlib.ExitStack() as stack:
        for dotted, replacement in _cuda().items():
            if dotted.startswith("torch."):
                _replace(stack, dotted, replacement)
        yield


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Pretend inside the block, in this thread and in those that it starts."""
    replaced = {
        **_cuda(), **groups.replacements(), "threading.Thread.run": _entered(threading.Thread.run),
        "torch.autograd._engine_run_backward": seen_in_backward(torch.autograd._engine_run_backward),
        "torch.load": loaded_to_device(torch.load),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_shim())
        # before the rest, since Dynamo reads torch.cuda: megatron's compiled functions run, without a compiler
        stack.callback(torch.compiler.set_stance, "default")
        torch.compiler.set_stance("force_eager")
        for dotted, replacement in replaced.items():
            _replace(stack, dotted, replacement)
        tracker = logging.getLogger("megatron.core.tensor_parallel.random")
        stack.callback(tracker.setLevel, tracker.level)
        tracker.setLevel(logging.ERROR)  # GPU and CPU share one generator here, about which megatron warns
        for cached in (use_fused_functions, this_machine):
            stack.callback(cached.cache_clear)
            cached.cache_clear()
        stack.enter_context(Operations())
        stack.enter_context(NamedDevices())
        yield


_ABSENT = object()


def _own(dotted: str) -> tuple[Any, str, object]:
    """Where a symbol lies, its name there, and what it is; ``_ABSENT`` where it is inherited."""
    owner, name = locate(dotted)
    return owner, name, vars(owner).get(name, _ABSENT)


def _put(owner: Any, name: str, value: object) -> None:
    delattr(owner, name) if value is _ABSENT else setattr(owner, name, value)


#: torch as it is without the CPU shim: this module is imported when tests are collected, before any of them runs.
_UNPATCHED = [] if shim._mode is not None else [_own(name) for name in shim.PATCHED if name.startswith("torch.")]


@contextlib.contextmanager
def _without_shim() -> Iterator[None]:
    """Inside, the CPU shim is away, which another test of this process may have installed: it reads cuda as cpu."""
    modes = torch.overrides._get_current_function_mode_stack()
    if not (modes and modes[-1] is shim._mode):  # none was installed, or the device is pretended already
        yield
        return
    patched = [(owner, name, vars(owner)[name]) for owner, name, _ in _UNPATCHED]
    shim._mode.__exit__(None, None, None)
    for owner, name, value in _UNPATCHED:
        _put(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in patched:
            _put(owner, name, value)
        shim._mode.__enter__()


_forever = contextlib.ExitStack()


def _replace(stack: contextlib.ExitStack, dotted: str, replacement: object) -> None:
    owner, name = locate(dotted)
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, replacement)
    if before is _ABSENT:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, before)


def _entered(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    def run_pretending(thread: threading.Thread) -> None:
        with Operations(), NamedDevices():
            run(thread)

    return run_pretending


class _Stream:
    """A stream or event: here everything happens in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream, self.device = 0, torch.device("cuda", Current.number)

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = record_event = record = wait = _nothing

    def synchronize(self) -> None:
        wait("synchronize of a stream")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class _Device:
    """``torch.cuda.device``: selects a GPU inside a block; a process has only one here."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


@contextlib.contextmanager
def _context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _always(value: T) -> Callable[..., T]:
    return lambda *args, **kwargs: value


def _set_device(device: Any) -> None:
    Current.number = device if isinstance(device, int) else (torch.device(device).index or 0)


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _synchronize(*args: Any, **kwargs: Any) -> None:
    wait("synchronize")


def _cuda() -> dict[str, object]:
    """Dotted names of torch.cuda, megatron's generators and the search for a compiler -> what stands in for them."""
    cuda: dict[str, object] = {
        "is_available": _always(True), "is_initialized": _always(True), "device_count": _always(8),
        "init": _nothing, "_lazy_init": _nothing, "current_device": lambda: Current.number, "set_device": _set_device,
        "synchronize": _synchronize, "empty_cache": _nothing, "ipc_collect": _nothing, "device": _Device,
        "get_device_name": _always(NAME), "get_device_properties": _always(_PROPERTIES),
        "get_device_capability": _always((9, 0)), "is_bf16_supported": _always(True),
        "Stream": _Stream, "Event": _Stream, "stream": _context, "current_stream": _Stream, "default_stream": _Stream,
        "manual_seed": lambda seed: torch.manual_seed(seed) and None, "manual_seed_all": _nothing,
        "get_rng_state": _get_rng_state, "set_rng_state": _set_rng_state,
        "memory_allocated": _always(2**30), "max_memory_allocated": _always(2**30), "memory_reserved": _always(2**30),
        "max_memory_reserved": _always(2**30), "reset_peak_memory_stats": _nothing,
        "mem_get_info": _always((MEMORY - 2**30, MEMORY)), "is_current_stream_capturing": _always(False),
        "nvtx.range_push": _nothing, "nvtx.range_pop": _nothing, "nccl.version": _always((2, 28, 9)),
    }  # fmt: skip
    return {
        **{f"torch.cuda.{name}": value for name, value in cuda.items()},
        "torch.version.cuda": "13.0",
        "torch._dynamo.optimize": lambda *args, **kwargs: lambda function: function,
        "megatron.core.tensor_parallel.random._get_cuda_rng_state": _get_rng_state,
        "megatron.core.tensor_parallel.random._set_cuda_rng_state": _set_rng_state,
        "tawin_nemo.models.megatron.model.compiler.missing_for_compile": _always([]),
    }
