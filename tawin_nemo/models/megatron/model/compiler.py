"""What torch.compile needs on a GPU machine: Triton, a C compiler and Python's headers.

megatron-core compiles its fused SwiGLU and its fused residual addition by torch.compile at their first call. Triton
then builds a small C extension, on every compute node. Without a compiler or ``Python.h`` that call fails, minutes into
a job; so the fused functions are used only where nothing is missing. Importing this module does not import torch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tawin_nemo.util.log import get_logger

_log = get_logger(__name__)

COMPILERS = ("gcc", "clang")
REMEDY = "install gcc and Python's headers (python3-dev or python3-devel) on the compute nodes"


def missing_for_compile(env: Mapping[str, str] = os.environ, headers: Path | None = None) -> list[str]:
    """What torch.compile for a GPU lacks on this machine, in words for a message; empty where it can work.

    As Triton looks for them: the compiler in ``CC``, else gcc or clang in ``PATH``; ``Python.h`` in ``headers`` (None:
    the include folder of this interpreter).
    """
    missing = []
    if importlib.util.find_spec("triton") is None:
        missing.append("the package triton, which torch's CUDA wheels require")
    named, path = env.get("CC", ""), env.get("PATH", "")
    if named and shutil.which(named, path=path) is None:
        missing.append(f"the C compiler CC={named}")
    elif not named and not any(shutil.which(name, path=path) for name in COMPILERS):
        missing.append("a C compiler (gcc or clang)")
    folder = Path(sysconfig.get_paths()["include"]) if headers is None else headers
    if not (folder / "Python.h").is_file():
        missing.append(f"Python.h in {folder}")
    return missing


@cache
def use_fused_functions() -> bool:
    """Whether megatron's compiled functions are used: on a CUDA device where nothing is missing. Logs what is."""
    import torch

    if not torch.cuda.is_available():
        return False
    missing = missing_for_compile()
    if missing:
        _log.warning("no torch.compile, fused functions are off: %s missing; %s", " and ".join(missing), REMEDY)
    return not missing
