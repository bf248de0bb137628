"""GPUs through pynvml's functions, which are replaced; no NVML is needed, and none is asked."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from tawin_nemo.tools.doctor import gpus
from tawin_nemo.tools.doctor.check import Status
from tawin_nemo.tools.doctor.gpus import Report
from tawin_nemo.tools.doctor.probe import Found, Gpu, TorchFacts

IDLE = pynvml.nvmlClocksEventReasonGpuIdle


@dataclass(frozen=True)
class Card:
    """A GPU as NVML describes it; its handle is the card itself. None: NVML does not support the question."""

    bus: str = "00:01"
    name: str = "NVIDIA H800"
    used: int = 4 * 2**20
    ecc: int | None = 1
    uncorrected: int | None = 0
    pending: int | None = 0
    reasons: int | None = IDLE
    celsius: int | None = 41
    links: tuple[str, ...] = ()  # bus at the other end of each NVLink
    levels: tuple[tuple[str, int], ...] = ()  # bus of another card -> common point


def supported(value):
    if value is None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    return value


@pytest.fixture
def machine(monkeypatch) -> Callable[..., Report]:
    """Gives the report about a machine with these cards."""

    def report(*cards: Card) -> Report:
        def link(card: Card, number: int) -> str:
            if number >= len(card.links):
                raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
            return card.links[number]

        answers = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "550.54.15",
            "nvmlDeviceGetCount": lambda: len(cards),
            "nvmlDeviceGetHandleByIndex": lambda index: cards[index],
            "nvmlDeviceGetName": lambda card: card.name,
            "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(used=card.used),
            "nvmlDeviceGetEccMode": lambda card: [supported(card.ecc)] * 2,
            "nvmlDeviceGetTotalEccErrors": lambda card, kind, counter: supported(card.uncorrected),
            "nvmlDeviceGetRemappedRows": lambda card: (0, 0, supported(card.pending), 0),
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda card: supported(card.reasons),
            "nvmlDeviceGetTemperature": lambda card, sensor: supported(card.celsius),
            "nvmlDeviceGetP2PStatus": lambda card, other, index: 0 if card.links else 2,
            "nvmlDeviceGetNvLinkState": lambda card, number: bool(link(card, number)),
            "nvmlDeviceGetNvLinkRemotePciInfo": lambda card, number: SimpleNamespace(busId=link(card, number)),
            "nvmlDeviceGetPciInfo": lambda card: SimpleNamespace(busId=card.bus),
            "nvmlDeviceGetTopologyCommonAncestor": lambda card, other: supported(dict(card.levels).get(other.bus)),
        }
        for name, answer in answers.items():
            assert hasattr(pynvml, name)
            monkeypatch.setattr(pynvml, name, answer)
        return gpus.read_report()

    return report


def test_a_healthy_machine(machine):
    report = machine(Card(), Card())
    assert (report.driver, report.problem) == ("550.54.15", "")
    assert [gpu.index for gpu in report.gpus] == [0, 1]
    seen = gpus.health(report)
    assert (seen.status, seen.value) == (Status.OK, "ECC enabled, no memory errors, full clocks, 41 C")
    assert gpus.driver(report).value == "550.54.15"


@pytest.mark.parametrize(
    ("card", "part"),
    [
        (Card(uncorrected=2), "memory errors on GPU 1"),
        (Card(pending=1), "memory errors on GPU 1"),
        (Card(reasons=IDLE | 0x40), "held down on GPU 1 (hw_thermal_slowdown; 41 C)"),
        (Card(reasons=0x08 | 0x80), "held down on GPU 1 (hw_slowdown, hw_power_brake_slowdown; 41 C)"),
        (Card(used=40000 * 2**20), "memory in use on GPU 1: 39.1 GiB"),
        (Card(ecc=0), "ECC is off on GPU 1"),
    ],
)
def test_one_sick_gpu_is_named(machine, card, part):
    seen = gpus.health(machine(Card(), card))
    assert seen.status == Status.WARNING
    assert part in seen.value
    assert seen.remedy


def test_a_gamers_card_without_ecc_is_fine(machine):
    assert gpus.health(machine(Card(ecc=0, name="NVIDIA GeForce RTX 4090"))).status == Status.OK


def test_questions_that_a_gpu_does_not_support_are_nothing_to_report(machine):
    report = machine(Card(ecc=None, uncorrected=None, pending=None, reasons=None, celsius=None))
    seen = gpus.health(report)
    assert (seen.status, seen.value) == (Status.OK, "ECC n/a, no memory errors, full clocks, no temperature")


def test_links_of_each_pair(machine):
    far = (("00:02", pynvml.NVML_TOPOLOGY_SYSTEM), ("00:03", pynvml.NVML_TOPOLOGY_SYSTEM))
    near = (("00:03", pynvml.NVML_TOPOLOGY_SINGLE),)
    report = machine(Card("00:01", levels=far), Card("00:02", levels=near), Card("00:03"))
    assert report.links == ("SYS", "SYS", "PIX")
    assert gpus.topology(report, 1).status == Status.OK
    assert gpus.topology(report, 2).status == Status.WARNING


def test_nvlinks_are_counted_directly_or_through_switches(machine):
    switched = machine(*(Card(f"00:0{n}", links=("switch",) * 18) for n in range(3)))
    assert switched.links == ("NV18",) * 3
    seen = gpus.topology(switched, 8)
    assert (seen.status, seen.value) == (Status.OK, "NV18: 3 pairs")
    assert machine(Card("00:01", links=("00:02", "00:03", "00:02")), Card("00:02")).links == ("NV2",)


def test_links_that_nvml_does_not_know(machine):
    assert machine(Card(), Card()).links == ()


def test_devices_as_torch_sees_them():
    def found(*names: str) -> Found:
        return Found(torch=TorchFacts(gpus=tuple(Gpu(name, 80 * 2**30, (9, 0)) for name in names)))

    assert gpus.devices(found("H800", "H800"), Report()).value == "2 x H800, 80.0 GiB, capability 9.0"
    assert gpus.devices(found("H800", "T4"), Report()).status == Status.WARNING
    assert gpus.devices(Found(), Report()).status == Status.ABSENT


def failing(code: int) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise pynvml.NVMLError(code)

    return fail


def test_a_driver_that_cannot_be_reached_fails_with_nvmls_words(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", failing(pynvml.NVML_ERROR_DRIVER_NOT_LOADED))
    seen = gpus.driver(gpus.read_report())
    assert (seen.status, seen.value) == (Status.FAILS, "NVML: Driver Not Loaded")


def test_a_gpu_that_is_lost_fails(machine, monkeypatch):
    machine(Card())
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", failing(pynvml.NVML_ERROR_GPU_IS_LOST))
    assert "GPU is lost" in gpus.driver(gpus.read_report()).value


def test_a_gpu_that_hangs_does_not_hang_the_doctor(monkeypatch):
    over = threading.Event()

    def hang() -> None:
        over.wait(60)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlInit", hang)
    monkeypatch.setattr(gpus, "LIMIT_S", 0.5)
    assert gpus.driver(gpus.read_report()).value == "NVML: no answer within 0.5 s"
    over.set()


@pytest.mark.parametrize("installed", [True, False])
def test_no_driver_is_not_a_failure(monkeypatch, installed):
    if installed:
        monkeypatch.setattr(pynvml, "nvmlInit", failing(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    else:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(gpus, "_DRIVER_FILE", Path("/nonexistent"))
    assert gpus.driver(gpus.read_report()).status == Status.ABSENT


def test_the_kernel_module_tells_the_driver_where_nvml_is_missing(tmp_path, monkeypatch):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5 2024\n")
    monkeypatch.setattr(pynvml, "nvmlInit", failing(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    monkeypatch.setattr(gpus, "_DRIVER_FILE", tmp_path / "version")
    assert gpus.read_report().driver == "550.54.15"
