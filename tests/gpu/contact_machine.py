"""First part of ``first_contact.sh``; it imports no megatron, which may be what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from tawin_nemo.models.megatron.model.compiler import missing_for_compile


def machine() -> dict[str, Any]:
    """Versions of everything that decides which kernels run."""
    smi = shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[:-1] if smi else []
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    return {
        "gpus": gpus, "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "nccl": nccl,
        "cores": os.cpu_count(), "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        "packages": {name: _version(name) for name in ("megatron-core", "transformer-engine", "triton", "polars")},
        "gcc": shutil.which("gcc"), "missing_for_compile": missing_for_compile(),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
