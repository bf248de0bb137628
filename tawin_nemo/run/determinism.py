"""``trainer.deterministic``: equal runs have equal bytes on CUDA, too.

On a CPU the same command on the same machine always computes the same bits. CUDA kernels that add with atomics
(``index_add``, the backward passes of attention) and cuBLAS products that share a workspace between streams do not.
This module selects kernels that do, and fails at an operation that has none. NCCL sums in an order that its algorithm
and the layout fix; the in-switch reduction NVLS is excluded (as in Megatron-LM's deterministic mode). Not verified on
a GPU.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

from tawin_nemo.util.errors import ConfigError

#: Variable -> values that are deterministic, the first one is set where the user set none. Read by cuBLAS when it makes
#: its first handle, by NCCL when it makes a communicator, by Transformer Engine in every pass.
VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


def make_deterministic(env: MutableMapping[str, str] = os.environ) -> None:
    """Set torch's mode and the ``VARIABLES``; call before the process uses a GPU or makes a process group.

    Raises ConfigError when the user set one of the variables to a value that is not deterministic.
    """
    for name, values in VARIABLES.items():
        if env.get(name, values[0]) not in values:
            raise ConfigError(
                f"trainer.deterministic=true but {name}={env[name]} is set: unset it, or use {' or '.join(values)}"
            )
    for name, values in VARIABLES.items():
        env.setdefault(name, values[0])
    # not warn_only: memory-efficient attention then stays with its atomics
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over every new tensor, for debugging


def reset() -> None:
    """Torch's defaults again; the variables stay, since libraries have read them."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
