"""GPUs by name: memory, peak rates and memory bandwidth, from NVIDIA's data sheets.

Peaks are dense; the data sheets of the H100, H200 and A100 give twice the tensor-core figures, with sparsity. The H800
computes like the H100, with slower links between GPUs. fp32 is that of the ordinary cores, as torch multiplies float32
unless TF32 is switched on.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from tawin_nemo.util.errors import ConfigError

#: GPUs of one machine, joined by NVLink; tensor parallelism stays inside.
NODE = 8


@dataclass(frozen=True)
class Gpu:
    """``peaks`` in TFLOP/s by number format; ``memory_gib`` is what the data sheet calls GB; bandwidths in GB/s: of the
    memory, of NVLink in one direction, and of one GPU's share of the network between nodes (that of NVIDIA's DGX
    machines: 400 Gb/s, A100 200 Gb/s)."""

    name: str
    memory_gib: float
    bandwidth_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    peaks: dict[str, float]

    def peak_flops(self, precision: str) -> float:
        """FLOP/s of matrix products. Raises ConfigError for a number format that the GPU does not have."""
        kind = precision.split("-")[0]
        if kind not in self.peaks:
            raise ConfigError(
                f"model.precision={precision} does not exist on {self.name}; use {' or '.join(self.peaks)}"
            )
        return 1e12 * self.peaks[kind]


_HOPPER = {"fp32": 67.0, "bf16": 989.0, "fp8": 1979.0}
_HOPPER_PCIE = {"fp32": 51.0, "bf16": 756.0, "fp8": 1513.0}
_HOPPER_NVL = {"fp32": 60.0, "bf16": 835.0, "fp8": 1671.0}
_AMPERE = {"fp32": 19.5, "bf16": 312.0}

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h800", 80, 3350, 200, 50, _HOPPER),  # H800 SXM: H100 SXM with NVLink at 400 GB/s
        Gpu("h100", 80, 3350, 450, 50, _HOPPER),  # NVIDIA H100 Tensor Core GPU, data sheet, SXM
        Gpu("h200", 141, 4800, 450, 50, _HOPPER),  # NVIDIA H200 Tensor Core GPU, data sheet, SXM
        Gpu("a100", 80, 2039, 300, 25, _AMPERE),  # NVIDIA A100 Tensor Core GPU, data sheet, SXM 80 GB
        Gpu("a100-40", 40, 1555, 300, 25, _AMPERE),  # the same, 40 GB
    )
}

#: Peaks by words in the name that the driver gives a device; the first match counts.
_BY_DEVICE_NAME: tuple[tuple[tuple[str, ...], dict[str, float]], ...] = (
    (("H100", "PCIe"), _HOPPER_PCIE),
    (("H800", "PCIe"), _HOPPER_PCIE),
    (("H100", "NVL"), _HOPPER_NVL),
    (("H200", "NVL"), _HOPPER_NVL),
    (("H100",), _HOPPER),
    (("H200",), _HOPPER),
    (("H800",), _HOPPER),
    (("A100",), _AMPERE),
)


def gpu(name: str) -> Gpu:
    """The named GPU. Raises ConfigError with the nearest name."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"gpu={name} is not known{hint} Known: {', '.join(GPUS)}")


def known_peak(device_name: str, precision: str) -> float | None:
    """Peak TFLOP/s of a GPU by its device name, None if the table does not have it."""
    for words, peaks in _BY_DEVICE_NAME:
        if all(word in device_name for word in words):
            return peaks.get(precision.split("-")[0])
    return None
