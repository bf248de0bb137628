"""Environment variables that CUDA runs want and that are read when torch starts; nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, MutableMapping
from pathlib import Path

#: Linux, and Windows' subsystem for Linux.
DEVICES = ("/dev/nvidiactl", "/dev/dxg")


def set_cuda_defaults(env: MutableMapping[str, str] = os.environ, devices: Iterable[str] = DEVICES) -> None:
    """On a machine with an NVIDIA device, set what the user has not set; child processes inherit it.

    ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``: lengths change in every step, and fixed segments leave gaps.
    ``TORCHINDUCTOR_COMPILE_THREADS=2``: every rank of a node compiles, by default each with a process per core.
    ``TORCH_CUDNN_SDPA_DEPRIORITIZED=1``: cuDNN's attention builds a plan for every new shape. Training and searches
    switch it off themselves (``parallel.runtime``); this is for other models, such as encoders of texts.
    """
    if not any(Path(device).exists() for device in devices):
        return
    if "PYTORCH_ALLOC_CONF" not in env:  # the newer name of the same setting
        env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    env.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
