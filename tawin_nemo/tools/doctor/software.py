"""Python, the operating system and the libraries."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata

from tawin_nemo.models.megatron.model.compiler import REMEDY, missing_for_compile
from tawin_nemo.models.megatron.model.fused import EXTENSIONS, FOREIGN_REMEDY, INSTALL_GPU, find_apex
from tawin_nemo.models.megatron.model.precision import TRANSFORMER_ENGINE
from tawin_nemo.tools.doctor.check import Check, absent, check, fails, ok, warning
from tawin_nemo.tools.doctor.probe import LIBRARIES, Found, installed_version

#: As in pyproject.toml.
PYTHON = ">=3.11,<3.13"
#: Lowest driver of each CUDA major version ("CUDA Compatibility", table of minor version compatibility, NVIDIA).
LOWEST_DRIVER = {11: 450, 12: 525, 13: 580}
_INSTALL = "pip install -r requirements.txt"


@check("Python")
def python() -> Check:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    if not SpecifierSet(PYTHON).contains(version, prereleases=True):
        return warning(version, "tested on Python 3.11 and 3.12 only")
    return ok(f"{version}, {sys.executable}")


@check("operating system")
def system() -> Check:
    value = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if platform.system() != "Linux":
        return warning(value, "written for and tested on Linux")
    return ok(value)


def library(found: Found, name: str) -> Check:
    """A library that everything needs, by its import name: torch, megatron.core or transformers."""
    distribution = LIBRARIES[name]

    @check(distribution)
    def look() -> Check:
        seen = found.library(name)
        if seen.error:
            return fails(f"{seen.version or 'installed'}, but {seen.error}", f"reinstall {distribution}: {_INSTALL}")
        if not seen.version:
            return fails("not installed", _INSTALL)
        return ok(f"{seen.version}{f', imported in {seen.seconds:.1f} s' if seen.seconds else ''}")

    return look()


@check("CUDA")
def cuda(found: Found, driver: str) -> Check:
    """torch's CUDA build against the driver (``driver`` is empty without one)."""
    facts = found.torch
    if not facts.cuda:
        if driver:
            remedy = "install torch's CUDA build from the index that its website names"
            return warning(f"torch is a CPU build, but there is an NVIDIA driver ({driver})", remedy)
        return absent("torch is a CPU build; runs on CPU with gloo")
    lowest = LOWEST_DRIVER.get(int(facts.cuda.split(".")[0]), 0)
    if driver and int(driver.split(".")[0]) < lowest:
        remedy = f"CUDA {facts.cuda} needs driver {lowest} or newer: update it, or install torch for an older CUDA"
        return fails(f"torch has CUDA {facts.cuda}, the driver is {driver}", remedy)
    if not facts.cuda_available:
        reason = facts.reason or "torch.cuda.is_available() is false"
        value = f"torch has CUDA {facts.cuda} but sees no GPU: {reason}"
        if driver:
            return fails(value, "check CUDA_VISIBLE_DEVICES, the container's GPU option and the driver's log (dmesg)")
        return absent(f"{value}; runs on CPU with gloo")
    unsupported = [gpu.name for gpu in facts.gpus if not _has_kernels(gpu.capability, facts.architectures)]
    if unsupported:
        return fails(
            f"torch's build ({', '.join(facts.architectures)}) has no kernels for {unsupported[0]}",
            "install a torch build for this GPU",
        )
    return ok(f"{facts.cuda}, driver {driver or 'unknown'}")


def _has_kernels(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Compiled code runs on the same major version from its minor version up; compute_XY is compiled when loaded."""
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = "".join(c for c in digits if c.isdigit())
        if not number:
            continue
        major, minor = int(number[:-1]), int(number[-1])
        if digits.endswith("a"):  # sm_90a runs on 9.0 alone
            fits = capability == (major, minor)
        elif kind == "compute":
            fits = capability >= (major, minor)
        else:
            fits = capability[0] == major and capability[1] >= minor
        if fits:
            return True
    return not architectures


@check("NCCL")
def nccl(found: Found) -> Check:
    if found.torch.nccl:
        return ok(found.torch.nccl)
    return absent("torch has no NCCL; processes talk over gloo")


@check("Transformer Engine")
def transformer_engine(found: Found, *, needed: bool = False) -> Check:
    """``needed``: the recipe asks for an FP8 precision."""
    from packaging.specifiers import SpecifierSet

    library = found.library("transformer_engine.pytorch")
    if library.error:
        remedy = f"{INSTALL_GPU} (built for this torch and CUDA), or use model.precision=bf16"
        return (fails if needed else warning)(f"{library.version or 'installed'}, but {library.error}", remedy)
    if not library.version:
        if needed:
            return fails("not installed", f"{INSTALL_GPU}, or use model.precision=bf16")
        if found.torch.gpus:
            return warning("not installed: no FP8", INSTALL_GPU)
        return absent("FP8 needs it, and a Hopper GPU")
    if not SpecifierSet(TRANSFORMER_ENGINE).contains(library.version, prereleases=True):
        remedy = f"megatron-core 0.16 works with {TRANSFORMER_ENGINE}: {INSTALL_GPU}"
        return (fails if needed else warning)(library.version, remedy)
    return ok(library.version)


@check("apex")
def apex() -> Check:
    """NVIDIA's apex (fused optimizer, fused weight gradients), or the web toolkit that has its name on the index."""
    seen = find_apex()
    if not seen.folder:
        return absent("optional: NVIDIA's fused optimizer; from NVIDIA's containers or its source, not from the index")
    if seen.foreign:
        about = installed_version("apex")
        return warning(f"apex {about} in {seen.folder} is not NVIDIA's but an unrelated web toolkit", FOREIGN_REMEDY)
    lacking = [meaning for meaning in EXTENSIONS.values() if meaning not in seen.built]
    if lacking:
        value = f"NVIDIA's, built without: {', '.join(lacking)}"
        return warning(value, "build it with --cpp_ext --cuda_ext; it runs without")
    return ok(f"NVIDIA's, with {' and '.join(seen.built)}")


@check("torch.compile")
def compiler(found: Found) -> Check:
    """What the fused functions of megatron-core need on a GPU machine; without it they are off."""
    if not found.torch.gpus:
        return absent("used on GPUs")
    missing = missing_for_compile()
    if missing:
        return warning(f"{' and '.join(missing)} missing: no fused functions", REMEDY)
    return ok("Triton, a C compiler and Python's headers")


@check("nemo_toolkit")
def nemo(*, needed: bool = False) -> Check:
    """``needed``: the recipe has exp_manager keys. Not imported: that takes seconds and only logging uses it."""
    version = installed_version("nemo-toolkit")
    if version and importlib.util.find_spec("nemo") is not None:
        return ok(version)
    if needed:
        return fails("not installed", f"the recipe's exp_manager keys need it: {_INSTALL}")
    return absent("exp_manager (TensorBoard, W&B, MLflow) needs it")


@check("other packages")
def packages() -> Check:
    """Installed versions against requirements.txt, as the installed distribution of this package remembers it."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("tawin-nemo") or []
    except metadata.PackageNotFoundError:
        return absent("tawin-nemo runs from its source folder: versions were not compared", "pip install -e .")
    wrong = []
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        seen = installed_version(wanted.name)
        if not seen or not wanted.specifier.contains(seen, prereleases=True):
            wrong.append(f"{wanted.name} {seen or 'missing'} (wanted {wanted.specifier})")
    if wrong:
        return warning("; ".join(wrong), f"{_INSTALL}, unless you chose these versions")
    return ok(f"{len(lines)} as in requirements.txt")
