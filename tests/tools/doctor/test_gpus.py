"""What nvidia-smi says, on made-up answers in the formats of two generations of drivers."""

import os
from pathlib import Path

import pytest

from tawin_nemo.tools.doctor import gpus
from tawin_nemo.tools.doctor.check import Status
from tawin_nemo.tools.doctor.gpus import Report, parse_query, parse_topology
from tawin_nemo.tools.doctor.probe import Found, Gpu, TorchFacts

GPU = """<gpu id="0"><product_name>{name}</product_name>
<fb_memory_usage><total>81559 MiB</total><used>{used} MiB</used></fb_memory_usage>
<ecc_mode><current_ecc>{ecc}</current_ecc></ecc_mode>
<ecc_errors><volatile><sram_correctable>7</sram_correctable><dram_uncorrectable>{errors}</dram_uncorrectable>
</volatile><aggregate><dram_uncorrectable>9</dram_uncorrectable></aggregate></ecc_errors>
<remapped_rows><remapped_row_pending>{pending}</remapped_row_pending></remapped_rows>
<temperature><gpu_temp>41 C</gpu_temp></temperature>
<clocks_{kind}_reasons><clocks_{kind}_reason_gpu_idle>Active</clocks_{kind}_reason_gpu_idle>
<clocks_{kind}_reason_hw_thermal_slowdown>{slow}</clocks_{kind}_reason_hw_thermal_slowdown></clocks_{kind}_reasons>
</gpu>"""
GOOD = {
    "name": "NVIDIA H800", "used": 4, "ecc": "Enabled", "errors": 0, "pending": "No", "kind": "event",
    "slow": "Not Active",
}  # fmt: skip
MATRIX = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPXB\t0-55\t0\t\tN/A
GPU1\tNV18\t X \tNODE\tSYS\t0-55\t0\t\tN/A
GPU2\tSYS\tNODE\t X \tSYS\t56-111\t1\t\tN/A
NIC0\tPXB\tSYS\tSYS\t X

Legend:

  X    = Self
"""


def answer(*changes: dict[str, object]) -> str:
    body = "".join(GPU.format(**{**GOOD, **change}) for change in changes)
    return f'<?xml version="1.0" ?><nvidia_smi_log><driver_version>550.54.15</driver_version>{body}</nvidia_smi_log>'


def test_a_healthy_machine():
    report = parse_query(answer({}, {}))
    assert report.driver == "550.54.15"
    assert [gpu.index for gpu in report.gpus] == [0, 1]
    found = gpus.health(report)
    assert (found.status, found.value) == (Status.OK, "ECC enabled, no memory errors, full clocks, 41 C")
    assert gpus.driver(report).value == "550.54.15"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"errors": 2}, "memory errors on GPU 1"),
        ({"pending": "Yes"}, "memory errors on GPU 1"),
        ({"slow": "Active"}, "held down on GPU 1 (hw_thermal_slowdown; 41 C)"),
        ({"slow": "Active", "kind": "throttle"}, "held down on GPU 1 (hw_thermal_slowdown; 41 C)"),
        ({"used": 40000}, "memory in use on GPU 1: 39.1 GiB"),
        ({"ecc": "Disabled"}, "ECC is off on GPU 1"),
    ],
)
def test_one_sick_gpu_is_named(change, part):
    found = gpus.health(parse_query(answer({}, change)))
    assert found.status == Status.WARNING
    assert part in found.value
    assert found.remedy


def test_a_gamers_card_without_ecc_is_fine():
    report = parse_query(answer({"ecc": "Disabled", "name": "NVIDIA GeForce RTX 4090"}))
    assert gpus.health(report).status == Status.OK


def test_fields_that_a_driver_does_not_write_are_nothing_to_report():
    report = parse_query("<nvidia_smi_log><gpu><product_name>X</product_name></gpu></nvidia_smi_log>")
    assert gpus.health(report).status == Status.OK


def test_links_of_each_pair():
    assert parse_topology(MATRIX) == ("NV18", "SYS", "NODE")
    report = Report("1", parse_query(answer({}, {}, {})).gpus, ("NV18", "SYS", "NODE"))
    assert gpus.topology(report, 1).status == Status.OK
    assert gpus.topology(report, 2).status == Status.WARNING
    nvlink = Report("1", report.gpus, ("NV18",) * 3)
    assert (gpus.topology(nvlink, 8).status, gpus.topology(nvlink, 8).value) == (Status.OK, "NV18: 3 pairs")


def test_devices_as_torch_sees_them():
    def found(*names: str) -> Found:
        return Found(torch=TorchFacts(gpus=tuple(Gpu(name, 80 * 2**30, (9, 0)) for name in names)))

    assert gpus.devices(found("H800", "H800"), Report()).value == "2 x H800, 80.0 GiB, capability 9.0"
    assert gpus.devices(found("H800", "T4"), Report()).status == Status.WARNING
    assert gpus.devices(Found(), Report()).status == Status.ABSENT


def fake_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_program_is_asked(tmp_path, monkeypatch):
    (tmp_path / "query").write_text(answer({}, {}, {}))
    (tmp_path / "matrix").write_text(MATRIX)
    fake_smi(tmp_path, f'if [ "$1" = topo ]; then cat {tmp_path}/matrix; else cat {tmp_path}/query; fi', monkeypatch)
    report = gpus.read_report()
    assert (len(report.gpus), report.links, report.problem) == (3, ("NV18", "SYS", "NODE"), "")


def test_a_driver_that_cannot_be_reached_fails_with_its_words(tmp_path, monkeypatch):
    fake_smi(
        tmp_path, "echo 'has failed because it could not communicate with the NVIDIA driver.'; exit 9", monkeypatch
    )
    found = gpus.driver(gpus.read_report())
    assert found.status == Status.FAILS
    assert "could not communicate" in found.value


def test_a_gpu_that_hangs_does_not_hang_the_doctor(tmp_path, monkeypatch):
    fake_smi(tmp_path, "exec sleep 60", monkeypatch)
    monkeypatch.setattr(gpus, "LIMIT_S", 0.5)
    assert "timed out" in gpus.driver(gpus.read_report()).value


def test_no_driver_is_not_a_failure(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(gpus, "_DRIVER_FILE", Path("/nonexistent"))
    assert gpus.driver(gpus.read_report()).status == Status.ABSENT


def test_the_kernel_module_tells_the_driver_where_nvidia_smi_is_missing(tmp_path, monkeypatch):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5 2024\n")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(gpus, "_DRIVER_FILE", tmp_path / "version")
    assert gpus.read_report().driver == "550.54.15"
