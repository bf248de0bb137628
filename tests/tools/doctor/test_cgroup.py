"""Limits in made-up trees of both cgroup versions."""

from pathlib import Path

import pytest

from tawin_nemo.tools.doctor.machine import Limits, read_limits

GIB = 2**30


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def limits(tmp_path: Path, membership: str, files: dict[str, object]) -> Limits:
    group = tmp_path / "membership"
    group.write_text(membership)
    return read_limits(tree(tmp_path / "cgroup", files), group)


def test_version_2_takes_the_tightest_limit_on_the_way_to_the_root(tmp_path):
    files = {
        "job/step/memory.max": "max",
        "job/step/cpu.max": "max 100000",
        "job/memory.max": 8 * GIB,
        "job/memory.current": 3 * GIB,
        "job/memory.stat": f"anon 1\ninactive_file {GIB}",
        "job/cpu.max": "250000 100000",
        "memory.max": 64 * GIB,
        "other/memory.max": 1,
    }
    assert limits(tmp_path, "0::/job/step\n", files) == Limits(8 * GIB, 2 * GIB, 2.5)


def test_version_1_and_its_way_to_write_no_limit(tmp_path):
    files = {
        "memory/memory.limit_in_bytes": 9223372036854771712,
        "memory/job/memory.limit_in_bytes": 4 * GIB,
        "memory/job/memory.usage_in_bytes": 2 * GIB,
        "memory/job/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}",
        "cpu,cpuacct/cpu.cfs_quota_us": -1,
        "cpu,cpuacct/cpu.cfs_period_us": 100000,
        "cpu,cpuacct/job/cpu.cfs_quota_us": 400000,
        "cpu,cpuacct/job/cpu.cfs_period_us": 100000,
    }
    membership = "9:name=systemd:/\n4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n"
    assert limits(tmp_path, membership, files) == Limits(4 * GIB, GIB, 4.0)


def test_inside_a_container_the_path_of_the_host_is_not_visible(tmp_path):
    assert limits(tmp_path, "0::/system.slice/docker-1.scope\n", {"memory.max": GIB}).memory_bytes == GIB


@pytest.mark.parametrize("membership", ["", "0::/\n", "4:memory:/x\n"])
def test_without_files_there_are_no_limits(tmp_path, membership):
    assert limits(tmp_path, membership, {}) == Limits(None, None, None)
