"""GPUs, their driver, health and wiring: what ``nvidia-smi`` (NVML's own program, shipped with every driver) reports.

It runs as a process with a time limit, because a GPU that fell off the bus can make NVML calls hang.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

from tawin_nemo.tools.doctor.check import Check, absent, check, fails, gib, ok, warning
from tawin_nemo.tools.doctor.probe import Found

LIMIT_S = 30.0
_SLOW = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
_DRIVER_FILE, _INFINIBAND = Path("/proc/driver/nvidia/version"), Path("/sys/class/infiniband")
_CLUSTER_GPU = re.compile(r"[AHB][1-9]00|GH200|GB\d00")


@dataclass(frozen=True)
class Health:
    """One GPU of the machine (all of them, also those that CUDA_VISIBLE_DEVICES hides)."""

    index: int
    name: str
    used_bytes: int
    ecc: str  # Enabled | Disabled | N/A
    uncorrectable: int  # memory errors since the driver was loaded
    rows_pending: bool  # damaged memory rows that a reset would replace
    slowed_by: tuple[str, ...]
    celsius: str


@dataclass(frozen=True)
class Report:
    """``driver`` is empty without one; ``problem`` says why nvidia-smi gave no answer."""

    driver: str = ""
    gpus: tuple[Health, ...] = ()
    links: tuple[str, ...] = ()  # of each pair of GPUs: NV18, PIX, PXB, PHB, NODE, SYS
    problem: str = ""


def read_report() -> Report:
    """Ask nvidia-smi; without it, only the version of a loaded driver is known."""
    if shutil.which("nvidia-smi") is None:
        return Report(driver=_driver_of_kernel())
    try:
        text = _run("-q", "-x")
        report = parse_query(text)
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError) as error:
        return Report(driver=_driver_of_kernel(), problem=_last_words(error))
    links: tuple[str, ...] = ()
    if len(report.gpus) > 1:
        try:
            links = parse_topology(_run("topo", "-m"))
        except (OSError, subprocess.SubprocessError):
            links = ()
    return Report(report.driver, report.gpus, links)


def _run(*arguments: str) -> str:
    command = ["nvidia-smi", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout


def _last_words(error: Exception) -> str:
    said = (getattr(error, "stdout", "") or getattr(error, "stderr", "") or "").strip().splitlines()
    return f"nvidia-smi: {said[-1] if said else error}"


def _driver_of_kernel() -> str:
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER_FILE.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found[1] if found else ""


def parse_query(xml: str) -> Report:
    """The answer of ``nvidia-smi -q -x``; elements that this driver does not write count as nothing to report."""
    log = ElementTree.fromstring(xml)
    gpus = tuple(_health(index, node) for index, node in enumerate(log.findall("gpu")))
    return Report(_text(log, "driver_version"), gpus)


def _health(index: int, gpu: ElementTree.Element) -> Health:
    # Drivers before 535 call the events "throttle reasons".
    reasons = [node for kind in ("event", "throttle") for node in gpu.findall(f"clocks_{kind}_reasons/*")]
    active = {re.sub(r"^clocks_(event|throttle)_reason_", "", node.tag) for node in reasons if node.text == "Active"}
    used = re.match(r"\d+", _text(gpu, "fb_memory_usage/used"))
    return Health(
        index=index,
        name=_text(gpu, "product_name"),
        used_bytes=int(used[0]) * 2**20 if used else 0,
        ecc=_text(gpu, "ecc_mode/current_ecc") or "N/A",
        uncorrectable=sum(_uncorrectable(gpu)),
        rows_pending=_text(gpu, "remapped_rows/remapped_row_pending") == "Yes",
        slowed_by=tuple(reason for reason in _SLOW if reason in active),
        celsius=_text(gpu, "temperature/gpu_temp"),
    )


def _uncorrectable(gpu: ElementTree.Element) -> Iterator[int]:
    for node in gpu.iterfind("ecc_errors/volatile//*"):
        if "uncorrectable" in node.tag and (node.text or "").strip().isdigit():
            yield int(node.text or 0)
    total = _text(gpu, "ecc_errors/volatile/double_bit/total")  # GPUs before Ampere
    if total.isdigit():
        yield int(total)


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()


def parse_topology(matrix: str) -> tuple[str, ...]:
    """Links between each pair of GPUs in the matrix of ``nvidia-smi topo -m``, in the order of the pairs."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", matrix)
    rows = [line.split() for line in plain.splitlines() if re.match(r"GPU\d+\s", line)]
    return tuple(rows[a][1 + b] for a, b in combinations(range(len(rows)), 2) if len(rows[a]) > 1 + b)


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
        return absent("nvidia-smi lists no GPU")
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
    unprotected = [str(gpu.index) for gpu in report.gpus if gpu.ecc == "Disabled" and _CLUSTER_GPU.search(gpu.name)]
    if unprotected:
        return warning(f"ECC is off on GPU {', '.join(unprotected)}", "have it switched on for long runs")
    return ok(f"ECC {report.gpus[0].ecc.lower()}, no memory errors, full clocks, {report.gpus[0].celsius}")


@check("GPU links")
def topology(report: Report, tensor_parallel: int) -> Check:
    if len(report.gpus) < 2:
        return absent("fewer than two GPUs")
    if not report.links:
        return absent("nvidia-smi topo -m gave no matrix")
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
