import os
import resource
import socket
from pathlib import Path

import pytest

from tawin_nemo.tools.doctor import machine
from tawin_nemo.tools.doctor.check import Status
from tawin_nemo.tools.doctor.machine import Limits

NONE = Limits(None, None, None)


def test_cpus_are_the_least_of_affinity_and_group_limit(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert machine.cpus(NONE, 8).status == Status.OK
    assert "8 processes share 2 CPUs" in machine.cpus(Limits(None, None, 2.0), 8).remedy
    assert "set trainer.threads=2" in machine.cpus(Limits(None, None, 4.0), 2).remedy
    monkeypatch.setattr(os, "getloadavg", lambda: (20.0, 0.0, 0.0))
    assert "other work" in machine.cpus(NONE, 8).remedy


def test_memory_is_the_least_of_machine_and_group_limit():
    gib = 2**30
    total = machine.usable_memory(NONE)
    assert machine.usable_memory(Limits(gib, 0, None)) == gib
    assert machine.usable_memory(Limits(2 * total, 0, None)) == total
    seen = machine.memory(Limits(gib, gib // 2, None))
    assert seen.status == Status.WARNING
    assert "group limit 1.0 GiB, of which 512 MiB used" in seen.value


@pytest.mark.parametrize(
    ("soft", "hard", "status"), [(1024, 4096, Status.WARNING), (65536, 65536, Status.OK), (-1, -1, Status.OK)]
)
def test_open_files(monkeypatch, soft, hard, status):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    seen = machine.open_files()
    assert seen.status == status
    assert status == Status.OK or seen.remedy == "ulimit -n 4096"


def test_locked_memory_matters_with_infiniband_only(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    assert machine.locked_memory(rdma=False).status == Status.OK
    assert machine.locked_memory(rdma=True).status == Status.WARNING


def test_shared_memory(monkeypatch):
    sizes = type("", (), {"free": 60 * 2**20, "total": 64 * 2**20})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: sizes)
    seen = machine.shared_memory()
    assert (seen.status, "--shm-size" in seen.remedy) == (Status.WARNING, True)


def test_the_run_folder_is_measured_and_left_clean(tmp_path):
    seen = machine.run_folder(tmp_path / "runs" / "x", measure=True)
    assert seen.status in (Status.OK, Status.WARNING)
    assert "MiB/s" in seen.value
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def full(folder: Path, blocks: int) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine, "_write", full)
    seen = machine.run_folder(tmp_path, measure=False)
    assert seen.status == Status.FAILS
    assert "No space left on device" in seen.value


def test_the_clock_of_the_disk(tmp_path, monkeypatch):
    assert machine.clock(tmp_path).status == Status.OK
    now = machine.time.time()
    monkeypatch.setattr(machine.time, "time", lambda: now + 3600)
    seen = machine.clock(tmp_path)
    assert seen.status == Status.WARNING
    assert "-3600" in seen.value or "-3599" in seen.value


def test_the_hosts_own_name(monkeypatch):
    def entry(address: str) -> list[tuple[object, ...]]:
        return [(None, None, 0, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port: entry("127.0.1.1"))
    assert machine.host_name(1).status == Status.OK
    assert machine.host_name(2).status == Status.WARNING
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port: entry("10.0.0.7"))
    assert machine.host_name(2).status == Status.OK

    def unknown(name: str, port: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "GLOO_SOCKET_IFNAME" in machine.host_name(1).remedy


def test_a_master_port_that_is_taken(monkeypatch):
    for name in ("RANK", "SLURM_STEP_ID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert machine.ports().status == Status.OK
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        assert machine.ports().status == Status.FAILS
        monkeypatch.setenv("RANK", "0")  # our own job holds it
        assert machine.ports().status == Status.OK
