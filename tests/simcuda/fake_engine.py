"""Transformer Engine's real Python over an extension made up here: shapes, formats and flags are right, numbers not.

``import_engine(folder)`` imports ``transformer_engine`` from the unpacked core wheel (``fetch_te.sh``), with a module
in place of its compiled ``transformer_engine_torch``. What the layers, recipes and checkpoints of a model need of that
module is here; anything else raises NotImplementedError with its name.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.machinery
import math
import os
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

#: Largest number of float8_e4m3.
E4M3_MAX = 448.0
#: Types of operands and sum of every product that was added to a buffer, in order.
ACCUMULATED: list[tuple[str, str]] = []
#: (kind of quantizer, whether its scale is reduced over the ranks, shape) of every quantisation, in order.
QUANTISED: list[tuple[str, bool, tuple[int, ...]]] = []
#: Shapes of those that were parameters.
QUANTISED_WEIGHTS: list[tuple[int, ...]] = []


class DType(enum.IntEnum):
    kByte, kInt16, kInt32, kInt64, kFloat32, kFloat16, kBFloat16 = range(7)
    kFloat8E4M3, kFloat8E5M2, kFloat8E8M0, kFloat4E2M1 = range(7, 11)


class FP8FwdTensors(enum.IntEnum):
    GEMM1_INPUT, GEMM1_WEIGHT, GEMM1_OUTPUT, GEMM2_INPUT, GEMM2_WEIGHT, GEMM2_OUTPUT = range(6)
    GEMM3_INPUT, GEMM3_WEIGHT, GEMM3_OUTPUT = range(6, 9)


class FP8BwdTensors(enum.IntEnum):
    GRAD_OUTPUT1, GRAD_INPUT1, GRAD_OUTPUT2, GRAD_INPUT2, GRAD_OUTPUT3, GRAD_INPUT3 = range(6)


class Float8BlockScaleTensorFormat(enum.IntEnum):
    GEMM_READY, COMPACT = range(2)


_TORCH = {
    DType.kFloat32: torch.float32, DType.kFloat16: torch.float16, DType.kBFloat16: torch.bfloat16,
    DType.kByte: torch.uint8,
}  # fmt: skip


#: Quantised tensors of Transformer Engine -> the files of their classes.
_FILES = {"Float8Tensor": "float8_tensor", "Float8BlockwiseQTensor": "float8_blockwise_tensor"}


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Zeros in the format that the quantizer asks for; a current scale is computed, and reduced where it is asked.

    ``output`` is what is quantised anew in place: weights that are kept from call to call.
    """
    kind = type(quantizer).__name__
    reduced = bool(getattr(quantizer, "with_amax_reduction", False))
    QUANTISED.append((kind, reduced, tuple(tensor.shape)))
    if isinstance(tensor, torch.nn.Parameter):
        QUANTISED_WEIGHTS.append(tuple(tensor.shape))
    if output is not None:
        return output
    if kind == "Float8BlockQuantizer":
        return _blockwise(tensor, quantizer)
    scale_inv = 1 / quantizer.scale if kind != "Float8CurrentScalingQuantizer" else _current(tensor, quantizer)
    return _per_tensor(tensor, quantizer, scale_inv)


def _current(tensor: Tensor, quantizer: Any) -> Tensor:
    amax = tensor.detach().abs().amax().float().reshape(1)
    if quantizer.with_amax_reduction:
        largest = torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(amax, op=largest, group=quantizer.amax_reduction_group)
    return amax / E4M3_MAX


def _made(name: str, quantizer: Any, tensor: Tensor, **parts: Any) -> Any:
    """A quantised tensor, or its bare storage where the quantizer makes it for TE's own use only."""
    if quantizer.internal:
        module = importlib.import_module(f"transformer_engine.pytorch.tensor.storage.{_FILES[name]}_storage")
        return getattr(module, f"{name}Storage")(quantizer=quantizer, **parts)
    module = importlib.import_module(f"transformer_engine.pytorch.tensor.{_FILES[name]}")
    return getattr(module, name)(shape=tuple(tensor.shape), dtype=tensor.dtype, quantizer=quantizer, **parts)


def _per_tensor(tensor: Tensor, quantizer: Any, scale_inv: Tensor) -> Any:
    shape = tuple(tensor.shape)
    transposed = _bytes((shape[-1], *shape[:-1]), tensor) if quantizer.columnwise_usage else None
    return _made(
        "Float8Tensor", quantizer, tensor, data=_bytes(shape, tensor), fp8_scale_inv=scale_inv,
        fp8_dtype=quantizer.dtype, data_transpose=transposed,
    )  # fmt: skip


def _blockwise(tensor: Tensor, quantizer: Any) -> Any:
    shape, form = tuple(tensor.shape), Float8BlockScaleTensorFormat
    row, column = quantizer.rowwise_usage, quantizer.columnwise_usage

    def scales(*, columnwise: bool) -> Tensor:
        return torch.ones(quantizer.get_scale_shape(shape, columnwise), device=tensor.device)

    return _made(
        "Float8BlockwiseQTensor", quantizer, tensor,
        rowwise_data=_bytes(shape, tensor) if row else None,
        rowwise_scale_inv=scales(columnwise=False) if row else None,
        columnwise_data=_bytes(quantizer.get_columnwise_shape(shape), tensor) if column else None,
        columnwise_scale_inv=scales(columnwise=True) if column else None,
        fp8_dtype=quantizer.dtype, is_2D_scaled=quantizer.block_scaling_dim == 2,
        data_format=form.COMPACT if quantizer.all_gather_usage else form.GEMM_READY,
    )  # fmt: skip


def _bytes(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.uint8, device=like.device)


def _size(operand: Any) -> tuple[int, ...]:
    if (
        type(operand).__name__ in ("Float8TensorStorage", "Float8Tensor") and operand._data is None
    ):  # only its transpose is kept
        first, *rest = operand._transpose.size()
        return (*rest, first)
    return tuple(operand.size())


def generic_gemm(
    A: Any, transa: bool, B: Any, transb: bool, out: Tensor | None, quantizer: Any, out_dtype: Any,
    bias: Tensor | None, bias_dtype: Any, gelu: bool, gelu_in: Any, grad: bool, *rest: Any, **named: Any,
) -> tuple[Tensor, Tensor | None, None, Any]:  # fmt: skip
    """Small random numbers in the shape of the product (operands as cuBLAS has them); checks the inner sizes."""
    a, b = _size(A), _size(B)
    if not transb:
        shape, inner = ((*b[:-1], a[0]), (a[1], b[-1])) if transa else ((*b[:-1], a[-1]), (a[0], b[-1]))
    else:
        shape, inner = (b[-1], a[-1]), (math.prod(a[:-1]), math.prod(b[:-1]))
    assert inner[0] == inner[1], f"product of {a} and {b}, transposed: {transa} {transb}"
    _, _, accumulate, *_ = rest
    if accumulate and out is not None:
        ACCUMULATED.append((str(getattr(A, "dtype", type(A).__name__)), str(out.dtype)))
    if out is None:
        out = 0.02 * torch.randn(shape, dtype=_TORCH[out_dtype], device="cuda")
    assert tuple(out.shape) == tuple(shape), (out.shape, shape)
    gradient = torch.zeros_like(bias) if grad and bias is not None else None
    return out, gradient, None, named.get("extra_output")


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    return gradient.reshape(-1, gradient.shape[-1]).sum(0), quantize(gradient, quantizer)


def fp8_transpose(tensor: Tensor, dtype: Any, out: Any = None) -> Tensor:
    return _bytes((tensor.shape[-1], *tensor.shape[:-1]), tensor)


def swap_first_dims(tensor: Tensor, out: Any = None) -> Tensor:
    return tensor.transpose(0, 1).contiguous()


def multi_tensor_l2norm(chunk: int, noop: Tensor, lists: Any, per_tensor: bool, *rest: Any) -> tuple[Tensor, Tensor]:
    norm = torch.stack([tensor.float().norm() for tensor in lists[0]]).norm().reshape(1)
    return norm, norm


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Any, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk: int, noop: Tensor, lists: Any, lr: float, beta1: float, beta2: float, eps: float, step: int, mode: int,
    bias_correction: int, decay: float, *rest: Any,
) -> None:  # fmt: skip
    for gradient, parameter, mean, square in zip(*lists[:4], strict=True):
        mean.mul_(beta1).add_(gradient.float(), alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient.float(), gradient.float(), value=1 - beta2)
        spread = (square / (1 - beta2**step)).sqrt() + eps
        parameter.mul_(1 - lr * decay).addcdiv_(mean / (1 - beta1**step), spread, value=-lr)


_GIVEN = (
    *(DType, FP8FwdTensors, FP8BwdTensors, Float8BlockScaleTensorFormat, quantize, generic_gemm, bgrad_quantize),
    *(fp8_transpose, swap_first_dims, multi_tensor_l2norm, multi_tensor_scale, multi_tensor_adam),
)


class _AnyMember(type):
    """A class of which every attribute exists: enumerations that only name what is not used here."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


def _extension() -> types.ModuleType:
    module: Any = types.ModuleType("transformer_engine_torch")
    for given in _GIVEN:
        setattr(module, given.__name__, given)
    module.get_cublasLt_version = lambda: 130200
    module.get_cudnn_version = lambda: 92000
    module.get_num_cublas_streams = lambda: 4
    module.fused_amax_and_scale_update_after_reduction = lambda *arguments: None
    module.ubuf_built_with_mpi = lambda: False

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            setattr(module, name, _AnyMember(name, (), {}))
            return getattr(module, name)

        def not_here(*arguments: Any, **named: Any) -> Any:
            raise NotImplementedError(f"transformer_engine_torch.{name} is not made up in tests/simcuda")

        not_here.__name__ = name
        return not_here

    module.__getattr__ = missing
    return module


class _Done:
    def wait(self) -> None:
        return None


@contextlib.contextmanager
def _coalescing(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[_Done]:
    yield _Done()


_COMPILERS = (
    *("triton", "triton.language", "triton.language.core", "triton.language.standard", "triton.runtime"),
    *("triton.compiler", "onnxscript", "onnx", "onnxscript.onnx_opset", "onnxscript.function_libs"),
)


@contextlib.contextmanager
def _pretended_packages() -> Iterator[None]:
    """Packages that Transformer Engine imports and that are not called: Triton and ONNX."""
    importlib.import_module("torch._inductor.runtime.hints")  # these look for Triton themselves
    importlib.import_module("torch.utils._triton").has_triton_package()
    made = []
    for name in _COMPILERS:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock(name=name, __version__="3.6.0")
            made.append(name)
    yield
    for name in made:
        sys.modules.pop(name, None)


def import_engine(folder: Path) -> types.ModuleType:
    """``transformer_engine`` from ``folder``. Call it where torch.cuda pretends, before megatron is imported."""
    sys.path.insert(0, str(folder))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its package then does not load its libraries
    torch.distributed._coalescing_manager = _coalescing
    torch.distributed.distributed_c10d._coalescing_manager = _coalescing
    wrapper = torch.Tensor._make_wrapper_subclass

    def on_host(cls: Any, *arguments: Any, **named: Any) -> Tensor:
        if "device" in named:
            named["device"] = torch.device("cpu")
        return wrapper(cls, *arguments, **named)

    torch.Tensor._make_wrapper_subclass = staticmethod(on_host)
    with _pretended_packages():
        spec = importlib.machinery.PathFinder.find_spec("transformer_engine", [str(folder)])
        assert spec is not None, f"no transformer_engine in {folder}"
        bare: Any = types.ModuleType("transformer_engine")
        bare.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["transformer_engine"] = bare
        common: Any = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: sys.modules.update(transformer_engine_torch=_extension())
        del sys.modules["transformer_engine"]
        engine: Any = importlib.import_module("transformer_engine")
        importlib.import_module("transformer_engine.pytorch")
        engine.common = common
    for file in _FILES.values():  # a quantised tensor is a wrapper without storage, which no mark can be put on
        importlib.import_module(f"transformer_engine.pytorch.tensor.{file}").devices_match = lambda *devices: True
    distributed: Any = importlib.import_module("transformer_engine.pytorch.distributed")
    distributed._get_cuda_rng_state = lambda *arguments, **named: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *arguments, **named: torch.set_rng_state(state)
    return engine


def reset() -> None:
    """Forget what Transformer Engine keeps of the FP8 modules of a process."""
    importlib.import_module("transformer_engine.pytorch.quantization").FP8GlobalStateManager.reset()
