"""CUDA extensions that are used where they are present: one place that looks for them, and says once what was found.

megatron-core takes the fused AdamW of Transformer Engine, else of NVIDIA's apex, else torch's; linear layers add their
weight gradients to megatron's buffers with apex's extension (Transformer Engine's layers with their own products, on a
CPU with the shim's). Without any of them the same numbers come out, later.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tawin_nemo.util.log import get_logger

_log = get_logger(__name__)

#: Compiled modules that NVIDIA's apex installs beside itself, and what they are for.
EXTENSIONS = {"amp_C": "fused optimizer", "fused_weight_gradient_mlp_cuda": "fused weight gradients"}
#: What error messages name as the remedy; ``pip install -r requirements-gpu.txt`` compiles against another torch.
INSTALL_GPU = "bash recipes/install_gpu.sh"
FOREIGN_REMEDY = "pip uninstall apex; NVIDIA's comes with its containers or is built from its source"


@dataclass(frozen=True)
class Apex:
    """``folder`` is empty without any package of that name; ``foreign``: it is the index's web toolkit."""

    folder: str = ""
    foreign: bool = False
    built: tuple[str, ...] = ()  # values of EXTENSIONS


def find_apex() -> Apex:
    """Looks for NVIDIA's apex, with its packages ``optimizers`` and ``multi_tensor_apply``; imports nothing."""
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
class Fused:
    """Whose AdamW steps (torch, apex, transformer_engine), and whether ordinary linear layers add their gradients."""

    adam: str
    weight_gradients: bool


@cache
def found() -> Fused:
    """What megatron-core found when it was imported; logged on the first call."""
    from megatron.core import optimizer
    from megatron.core.tensor_parallel import layers

    result = Fused(optimizer.Adam.__module__.split(".")[0], bool(layers._grad_accum_fusion_available))
    apex = find_apex()
    if apex.foreign:
        _log.warning("the package apex in %s is not NVIDIA's and is not used: %s", apex.folder, FOREIGN_REMEDY)
    gradients = "added as they are computed" if result.weight_gradients else "computed, then added (no NVIDIA apex)"
    _log.info("AdamW of %s; weight gradients are %s", result.adam, gradients)
    return result


def fuse(model: Any, optimizer: Any) -> None:
    """Switch on what is there, for a model whose parameters have megatron's gradient buffers.

    Not an option of the model's configuration: a model without buffers could then not run backward.
    """
    fused = found()
    for module in model.modules():
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = fused.weight_gradients
        if hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's
            module.fuse_wgrad_accumulation = True
    if fused.adam == "torch":  # one pass over the memory instead of ten
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            for group in part.optimizer.param_groups if part.optimizer is not None else ():
                group.update(fused=True, foreach=False)
