"""GPUs, their driver, health and wiring: what NVML, the NVIDIA Management Library, reports through pynvml.

Every driver brings NVML. It is asked in a thread with a time limit, because a GPU that fell off the bus can make its
calls hang.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

from tawin_nemo.tools.doctor.check import Check, absent, check, fails, gib, ok, warning
from tawin_nemo.tools.doctor.probe import Found

T = TypeVar("T")

#: Seconds that NVML may take to answer all questions.
LIMIT_S = 30.0
_DRIVER_FILE, _INFINIBAND = Path("/proc/driver/nvidia/version"), Path("/sys/class/infiniband")
_CLUSTER_GPU = re.compile(r"[AHB][1-9]00|GH200|GB\d00")
#: Reasons for lowered clocks that point at a fault, by the name that nvidia-smi gives them.
_SLOW = {
    "hw_slowdown": "nvmlClocksEventReasonHwSlowdown",
    "hw_thermal_slowdown": "nvmlClocksEventReasonHwThermalSlowdown",
    "hw_power_brake_slowdown": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
    "sw_thermal_slowdown": "nvmlClocksEventReasonSwThermalSlowdown",
}
#: Paths between two GPUs without NVLink, by the name that nvidia-smi gives them.
_LEVELS = {
    "PIX": "NVML_TOPOLOGY_SINGLE",
    "PXB": "NVML_TOPOLOGY_MULTIPLE",
    "PHB": "NVML_TOPOLOGY_HOSTBRIDGE",
    "NODE": "NVML_TOPOLOGY_NODE",
    "SYS": "NVML_TOPOLOGY_SYSTEM",
}


@dataclass(frozen=True)
class Health:
    """One GPU of the machine (all of them, also those that CUDA_VISIBLE_DEVICES hides)."""

    index: int
    name: str
    used_bytes: int
    ecc: str  # enabled | disabled | n/a
    uncorrectable: int  # memory errors since the driver was loaded
    rows_pending: bool  # damaged memory rows that a reset would replace
    slowed_by: tuple[str, ...]
    celsius: str


@dataclass(frozen=True)
class Report:
    """``driver`` is empty without one; ``problem`` says why NVML gave no answer."""

    driver: str = ""
    gpus: tuple[Health, ...] = ()
    links: tuple[str, ...] = ()  # of each pair of GPUs: NV18, PIX, PXB, PHB, NODE, SYS
    problem: str = ""


def read_report() -> Report:
    """What NVML says about this machine; without NVML, only the version of a loaded driver is known."""
    answers: list[Report] = []
    thread = threading.Thread(target=lambda: answers.append(_ask()), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    return answers[0] if answers else _problem(f"no answer within {LIMIT_S:g} s")


def _ask() -> Report:
    try:
        import pynvml
    except ModuleNotFoundError:  # the check "other packages" says that it is missing
        return Report(driver=_driver_of_kernel())
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return Report(driver=_driver_of_kernel())
    except pynvml.NVMLError as error:
        return _problem(error)
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(_health(pynvml, index, handle) for index, handle in enumerate(handles))
        links = tuple(_link(pynvml, *pair) for pair in combinations(handles, 2))
        return Report(pynvml.nvmlSystemGetDriverVersion(), gpus, () if "" in links else links)
    except (pynvml.NVMLError, AttributeError) as error:  # a pynvml that is too old lacks names
        return _problem(error)
    finally:
        pynvml.nvmlShutdown()


def _problem(error: object) -> Report:
    return Report(driver=_driver_of_kernel(), problem=f"NVML: {error}")


def _driver_of_kernel() -> str:
    try:
        version = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER_FILE.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return version[1] if version else ""


def _known(nvml: Any, otherwise: T, call: Callable[..., T], *arguments: Any) -> T:
    """The answer, or ``otherwise`` where this GPU or this driver does not know the question."""
    try:
        return call(*arguments)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_InvalidArgument):
        return otherwise


def _health(nvml: Any, index: int, handle: Any) -> Health:
    # The older name of the clocks' "event reasons": drivers before 535 know no other.
    reasons = _known(nvml, 0, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    errors = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    ecc = _known(nvml, None, nvml.nvmlDeviceGetEccMode, handle)
    celsius = _known(nvml, None, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
    return Health(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        used_bytes=nvml.nvmlDeviceGetMemoryInfo(handle).used,
        ecc="n/a" if ecc is None else "enabled" if ecc[0] else "disabled",
        uncorrectable=_known(nvml, 0, nvml.nvmlDeviceGetTotalEccErrors, handle, *errors),
        rows_pending=bool(_known(nvml, (0, 0, 0, 0), nvml.nvmlDeviceGetRemappedRows, handle)[2]),
        slowed_by=tuple(name for name, constant in _SLOW.items() if reasons & getattr(nvml, constant)),
        celsius="no temperature" if celsius is None else f"{celsius} C",
    )


def _link(nvml: Any, first: Any, second: Any) -> str:
    """NVn for n NVLinks between two GPUs, else the nearest common point of their PCIe paths; "" = NVML does not say."""
    nvlink = _known(nvml, None, nvml.nvmlDeviceGetP2PStatus, first, second, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    if nvlink == nvml.NVML_P2P_STATUS_OK:
        numbers = range(nvml.NVML_NVLINK_MAX_LINKS)
        links = [n for n in numbers if _known(nvml, 0, nvml.nvmlDeviceGetNvLinkState, first, n)]
        peers = [_known(nvml, None, nvml.nvmlDeviceGetNvLinkRemotePciInfo, first, n) for n in links]
        bus = nvml.nvmlDeviceGetPciInfo(second).busId
        direct = sum(peer is not None and peer.busId == bus for peer in peers)
        return f"NV{direct or len(links)}"  # where no link ends at the other GPU, all of them go through NVSwitches
    level = _known(nvml, None, nvml.nvmlDeviceGetTopologyCommonAncestor, first, second)
    return next((name for name, constant in _LEVELS.items() if level == getattr(nvml, constant)), "")


@check("NVIDIA driver")
def driver(report: Report) -> Check:
    if report.problem:
        return fails(
            report.problem, "check that the driver's kernel module is loaded and, in a container, the GPU option"
        )
    return ok(report.driver) if report.driver else absent("no NVIDIA driver")


@check("GPUs")
def devices(found: Found, report: Report) -> Check:
    """Count, name, memory and compute capability as torch sees them."""
    gpus = found.torch.gpus
    if not gpus:
        hidden = f"; the driver lists {len(report.gpus)}" if report.gpus else ""
        return absent(f"torch sees none{hidden}")
    kinds = Counter((gpu.name, gib(gpu.memory_bytes), "{}.{}".format(*gpu.capability)) for gpu in gpus)
    value = "; ".join(f"{count} x {name}, {memory}, capability {c}" for (name, memory, c), count in kinds.items())
    if len(kinds) > 1:
        return warning(value, "the slowest and smallest decides; choose equal ones with CUDA_VISIBLE_DEVICES")
    return ok(value)


@check("GPU health")
def health(report: Report) -> Check:
    """Memory errors, ECC, slowed clocks, and memory that other processes hold."""
    if not report.gpus:
        return absent("NVML lists no GPU")
    worn = [str(gpu.index) for gpu in report.gpus if gpu.uncorrectable or gpu.rows_pending]
    if worn:
        return warning(
            f"memory errors on GPU {', '.join(worn)}", "have the administrator drain the node and reset these GPUs"
        )
    slow = [f"{gpu.index} ({', '.join(gpu.slowed_by)}; {gpu.celsius})" for gpu in report.gpus if gpu.slowed_by]
    if slow:
        return warning(f"clocks are held down on GPU {'; '.join(slow)}", "check cooling and power of this node")
    busy = [f"{gpu.index}: {gib(gpu.used_bytes)}" for gpu in report.gpus if gpu.used_bytes > 2 * 2**30]
    if busy:
        return warning(f"memory in use on GPU {', '.join(busy)}", "another job may be running there: see nvidia-smi")
    unprotected = [str(gpu.index) for gpu in report.gpus if gpu.ecc == "disabled" and _CLUSTER_GPU.search(gpu.name)]
    if unprotected:
        return warning(f"ECC is off on GPU {', '.join(unprotected)}", "have it switched on for long runs")
    return ok(f"ECC {report.gpus[0].ecc}, no memory errors, full clocks, {report.gpus[0].celsius}")


@check("GPU links")
def topology(report: Report, tensor_parallel: int) -> Check:
    if len(report.gpus) < 2:
        return absent("fewer than two GPUs")
    if not report.links:
        return absent("NVML does not say how they are connected")
    counts = Counter(report.links)
    value = ", ".join(f"{link}: {count} pairs" for link, count in counts.most_common())
    if tensor_parallel > 1 and not all(link.startswith("NV") for link in counts):
        return warning(value, "tensor parallelism wants NVLink: lower model.tensor_model_parallel_size if it is slow")
    return ok(value)


@check("InfiniBand")
def infiniband(nodes: int) -> Check:
    adapters = sorted(path.name for path in _INFINIBAND.iterdir()) if _INFINIBAND.is_dir() else []
    if adapters:
        return ok(", ".join(adapters))
    if nodes > 1:
        return warning("no adapter visible", "NCCL would use TCP; give the container /dev/infiniband if there is one")
    return absent("needed between GPU nodes only")
