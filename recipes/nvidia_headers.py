"""Prints the include folders of the nvidia-* packages of this interpreter, joined by ':', for CPATH.

torch's CUDA wheels bring cuDNN, NCCL and the CUDA libraries with their headers as packages below ``nvidia/``, for
example ``nvidia/cudnn/include`` and ``nvidia/cu13/include``. Compilers do not look there by themselves.
"""

import sysconfig
from pathlib import Path


def include_folders(site_packages: Path) -> list[Path]:
    """``site_packages/nvidia/*/include``, sorted, where it holds a header."""
    found = sorted(site_packages.glob("nvidia/*/include"))
    return [folder for folder in found if any(folder.glob("**/*.h"))]


if __name__ == "__main__":
    print(":".join(str(folder) for folder in include_folders(Path(sysconfig.get_path("purelib")))))
