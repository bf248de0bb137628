"""What the launcher's environment variables say about this process."""

from __future__ import annotations

import pytest

from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.launch import Hosts, Launch, hosts, is_launched, needs_launcher, read_launch


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Launch(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch(5, 8, 1)),
        (
            {"SLURM_PROCID": "9", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"},
            Launch(9, 16, 1),
        ),
        ({"SLURM_PROCID": "9", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "16"}, Launch(9, 16, 0)),
        # the batch script itself, outside srun: one process, or it would wait for ranks that never come
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, Launch(0, 1, 0)),
        ({"RANK": "0"}, Launch(0, 1, 0)),
    ],
)
def test_launch_variables(env: dict[str, str], expected: Launch) -> None:
    assert read_launch(env) == expected


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": ""}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, False),
    ],
)
def test_a_batch_script_is_not_launched(env: dict[str, str], expected: bool) -> None:
    assert is_launched(env) is expected


def test_machines_without_slurm_are_named_by_their_head() -> None:
    named = {"TAWIN_HEAD": "node1", "TAWIN_NODES": "2"}
    assert hosts({}) is None
    assert hosts(named) == Hosts("node1:29500", 2, "tawin")
    assert hosts({"TAWIN_HEAD": "node1:7000", "TAWIN_JOB": "b"}) == Hosts("node1:7000", 1, "b")
    with pytest.raises(ConfigError, match="TAWIN_NODES=two is no number of machines"):
        hosts(named | {"TAWIN_NODES": "two"})
    assert [needs_launcher(devices, {}) for devices in (1, 2)] == [False, True]
    assert needs_launcher(1, named)
    assert not needs_launcher(2, named | {"RANK": "0"})  # one of the processes that it started
