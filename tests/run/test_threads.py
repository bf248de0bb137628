"""Threads of a process: its share of the node, waiting without spinning."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tawin_nemo.util.launch import available_threads


@pytest.mark.parametrize(
    ("env", "cores", "machine", "expected"),
    [
        ({}, 12, 96, 12),
        ({"OMP_NUM_THREADS": "4"}, 12, 12, 4),
        ({"OMP_NUM_THREADS": "3,2"}, 12, 12, 3),
        ({"RANK": "3", "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}, 96, 96, 12),  # torchrun: the node's ranks only
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 2, 2, 1),
        # srun binds 12 cores to each of 8 tasks: all of them are this task's, however many ranks the job has
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, 12, 96, 12),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, 96, 96, 12),  # unbound
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "6"},
         96, 96, 6),
        # torchrun inside one task of Slurm that holds the node
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "96", "RANK": "0", "LOCAL_WORLD_SIZE": "8"}, 96, 96, 12),
    ],
)  # fmt: skip
def test_a_process_gets_its_share_of_the_node(env: dict[str, str], cores: int, machine: int, expected: int):
    assert available_threads(env, cores, machine) == expected


def test_threads_of_the_command_line_wait_passively():
    """OpenMP reads the policy when torch is loaded, so it has to stand before any verb imports torch."""
    code = (
        "import sys, os; from tawin_nemo.cli import main; assert 'torch' not in sys.modules; main(['keys', 'seed']); "
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    for policy, env in (("PASSIVE", {}), ("ACTIVE", {"OMP_WAIT_POLICY": "ACTIVE"})):
        clean = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        shown = subprocess.run(
            [sys.executable, "-c", code], env=clean | env, check=True, capture_output=True, text=True
        )  # fmt: skip
        assert shown.stdout.split()[-2:] == [policy, "False"]
