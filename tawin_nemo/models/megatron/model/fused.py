"""Optional CUDA extensions: detects which are installed, logs it once and enables them.

megatron-core takes the fused AdamW of Transformer Engine, else of NVIDIA's apex, else torch's; its linear layers add
their weight gradients to its buffers with apex's extension. Where there is none but Transformer Engine, they do with
the products of that (its own layers do anyway; on a CPU it is the shim's). Without any of them the results are the same
but slower.

Axes: S tokens, D input width, O output width.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from tawin_nemo.util.log import get_logger

_log = get_logger(__name__)

#: Compiled modules that NVIDIA's apex installs -> what they do.
EXTENSIONS = {"amp_C": "fused optimizer", "fused_weight_gradient_mlp_cuda": "fused weight gradients"}
#: What error messages name as the remedy; ``pip install -r requirements-gpu.txt`` compiles against another torch.
INSTALL_GPU = "bash recipes/install_gpu.sh"
FOREIGN_REMEDY = "pip uninstall apex; NVIDIA's comes with its containers or is built from its source"


@dataclass(frozen=True)
class Apex:
    """The installed package ``apex``. ``folder`` is empty when there is none.

    ``foreign``: it is not NVIDIA's apex but the unrelated web toolkit of that name on the package index.
    """

    folder: str = ""
    foreign: bool = False
    built: tuple[str, ...] = ()  # values of EXTENSIONS


def find_apex() -> Apex:
    """Look for NVIDIA's apex by its packages ``optimizers`` and ``multi_tensor_apply``, without importing it."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Apex()
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    where = str(folders[0] if folders else spec.origin)
    if not any((folder / "optimizers").is_dir() and (folder / "multi_tensor_apply").is_dir() for folder in folders):
        return Apex(where, foreign=True)
    built = (meaning for module, meaning in EXTENSIONS.items() if importlib.util.find_spec(module) is not None)
    return Apex(where, built=tuple(built))


@dataclass(frozen=True)
class FusedKernels:
    """The fused kernels that megatron-core uses."""

    adam: str  # package of its AdamW: torch, apex or transformer_engine
    weight_gradients: bool  # megatron's own linear layers add their gradients to the gradient buffer


class EngineWeightGradients:
    """The interface of apex's fused weight gradients over Transformer Engine's matrix product.

    Inputs in bf16 are multiplied and added to a float32 buffer in one kernel, without a weight gradient of their own.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(input_SD: Tensor, grad_SO: Tensor, main_grad_OD: Tensor) -> None:
        """``main_grad += grad.T @ input``."""
        if input_SD.dtype == main_grad_OD.dtype:  # torch can; Transformer Engine would round float32 to TF32
            main_grad_OD.addmm_(grad_SO.t(), input_SD)
            return
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        general_gemm(
            input_SD, grad_SO, out_dtype=main_grad_OD.dtype, layout="NT", accumulate=True, out=main_grad_OD, grad=True
        )

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def _use_engine_products(layers: Any) -> bool:
    """Let megatron's linear layers call ``EngineWeightGradients``; False where that has no such product."""
    try:
        from transformer_engine.pytorch.cpp_extensions import general_gemm  # noqa: F401
    except ImportError:
        return False
    layers.fused_weight_gradient_mlp_cuda = EngineWeightGradients
    return True


@cache
def fused_kernels() -> FusedKernels:
    """The kernels that megatron-core selected when it was imported, and what replaces apex's; logged on the first call.

    megatron-core takes Transformer Engine's AdamW exactly where Transformer Engine can be imported.
    """
    from megatron.core import optimizer
    from megatron.core.tensor_parallel import layers

    adam = optimizer.Adam.__module__.split(".")[0]
    fused = bool(layers._grad_accum_fusion_available)
    result = FusedKernels(adam, fused or (adam == "transformer_engine" and _use_engine_products(layers)))
    apex = find_apex()
    if apex.foreign:
        _log.warning("the package apex in %s is not NVIDIA's and is not used: %s", apex.folder, FOREIGN_REMEDY)
    gradients = "added as they are computed" if result.weight_gradients else "computed, then added (no apex, no TE)"
    _log.info("AdamW of %s; weight gradients are %s", result.adam, gradients)
    return result


def fuse(model: Any, optimizer: Any) -> None:
    """Enable the available fused kernels for a model whose parameters have megatron's gradient buffers.

    This is not an option of the model's configuration, because a model without buffers could then not run backward.
    """
    fused = fused_kernels()
    for module in model.modules():
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = fused.weight_gradients
        if hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's
            module.fuse_wgrad_accumulation = True
    if fused.adam == "torch":  # one pass over the memory instead of ten
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            for group in part.optimizer.param_groups if part.optimizer is not None else ():
                group.update(fused=True, foreach=False)
