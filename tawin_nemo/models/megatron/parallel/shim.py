"""Makes megatron-core, which uses CUDA devices unconditionally in many places, run without a GPU.

``install`` replaces the symbols in ``PATCHED`` by CPU twins or null objects and enters one torch function mode that
reads ``device="cuda"`` as CPU. It is never active where CUDA is there: real GPU runs use untouched megatron-core.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
#: What ``Tensor.type()`` says on a GPU: megatron's optimizers and gradient clipping compare these strings.
_CUDA_TYPES = {
    f"torch.{name}": f"torch.cuda.{name}" for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor")
}


class _NullStream:
    """Stands for a CUDA stream or event: a CPU runs everything in order, there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = record_event = record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


@contextlib.contextmanager
def _null_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _unmoved(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


class _WeightGradients:
    """apex's fused weight gradients: the product is added to the gradient buffer directly.

    S: tokens, D: input width, O: output width.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(input_SD: torch.Tensor, grad_SO: torch.Tensor, main_grad_OD: torch.Tensor) -> None:
        if input_SD.dtype == main_grad_OD.dtype:
            main_grad_OD.addmm_(grad_SO.t(), input_SD)
        else:
            main_grad_OD.add_(grad_SO.t() @ input_SD)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


_REPLACEMENTS: dict[str, object] = {
    "torch.cuda.current_device": lambda: _CPU,
    "torch.cuda.set_device": _nothing,
    "torch.cuda.synchronize": _nothing,
    "torch.cuda.empty_cache": _nothing,
    "torch.cuda.manual_seed": _manual_seed,
    "torch.cuda.get_rng_state": _get_rng_state,
    "torch.cuda.set_rng_state": _set_rng_state,
    "torch.cuda.Stream": _NullStream,
    "torch.cuda.Event": _NullStream,
    "torch.cuda.stream": _null_context,
    "torch.cuda.current_stream": _NullStream,
    "torch.cuda.default_stream": _NullStream,
    "torch.Tensor.cuda": _unmoved,
    "torch.nn.Module.cuda": _unmoved,
    "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda": _WeightGradients,
    "megatron.core.tensor_parallel.layers._grad_accum_fusion_available": True,
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": _get_rng_state,
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": _set_rng_state,
}

#: Dotted names of everything that ``install`` replaces, and nothing else.
PATCHED: tuple[str, ...] = tuple(_REPLACEMENTS)


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class CudaMeansCpu(TorchFunctionMode):
    """Reads ``device="cuda"`` and ``.to("cuda")`` as CPU, and names tensor types as a GPU would."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPES.get(result, result)
        return result


_mode: CudaMeansCpu | None = None


def locate(dotted: str) -> tuple[Any, str]:
    """The object that holds the symbol (a module or a class), and the attribute's name."""
    parts = dotted.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise ModuleNotFoundError(f"no module of {dotted} can be imported")


def install() -> None:
    """Replace the symbols of ``PATCHED`` and enter the mode; a second call changes nothing.

    Raises RuntimeError where CUDA is available: the shim must never slow down or falsify a GPU run.
    """
    global _mode
    if torch.cuda.is_available():
        raise RuntimeError(
            "the CPU shim must not be installed where CUDA is available: torch.cuda.is_available() is true"
        )
    if _mode is not None:
        return
    # torch.optim imports it at the first optimizer; its table of torch's functions takes every function once
    importlib.import_module("torch._dynamo")
    for dotted, replacement in _REPLACEMENTS.items():
        owner, name = locate(dotted)
        setattr(owner, name, replacement)
    # GPU and CPU share one generator here, so the tracker's check that GPU draws leave the CPU's alone always fires.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    _mode = CudaMeansCpu()
    _mode.__enter__()
