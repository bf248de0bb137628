"""Threads of a process: its share of the node, and the number that measured steps say is best."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tawin_nemo.run import threads
from tawin_nemo.run.threads import STEPS_BETWEEN, STEPS_EACH, WARM_UP, WINDOW, ThreadTuner, available_threads


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


class Steps:
    """Runs a tuner over steps whose duration is a function of the threads."""

    def __init__(self, limit: int, *, fixed: int = 0) -> None:
        self.set: list[int] = []
        self.tuner = ThreadTuner(fixed, limit, what="sft", set_threads=self.set.append)

    def run(self, seconds: dict[int, float], steps: int) -> int:
        for _ in range(steps):
            self.tuner.observe(seconds[self.tuner.threads])
        return self.tuner.threads


ENOUGH = WARM_UP + 5 * (STEPS_EACH + 1)


def test_the_fastest_number_wins():
    assert Steps(4).run({1: 1.0, 2: 0.6, 4: 0.4}, ENOUGH) == 4
    assert Steps(4).run({1: 1.0, 2: 0.6, 4: 0.9}, ENOUGH) == 2
    assert Steps(2).run({1: 0.2, 2: 1.0}, ENOUGH) == 1


def test_fewer_threads_win_a_draw():
    assert Steps(4).run({1: 0.41, 2: 0.4, 4: 0.41}, ENOUGH) == 1


def test_numbers_below_a_clearly_slower_one_are_not_tried():
    steps = Steps(8)
    steps.run({8: 0.2, 4: 0.5, 2: 9.0, 1: 9.0}, ENOUGH)
    assert steps.set == [8, 4, 8]


def test_the_first_steps_do_not_count():
    steps = Steps(2)
    for seconds in (60.0, 60.0, *[0.5] * STEPS_EACH):
        steps.tuner.observe(seconds)
    assert steps.tuner.threads == 1  # under measurement
    assert steps.run({1: 0.9, 2: 0.5}, STEPS_EACH + 1) == 2


def test_one_slow_step_decides_nothing():
    steps = Steps(2)
    durations = {1: 0.9, 2: 0.5}
    steps.run(durations, WARM_UP + 1)
    steps.tuner.observe(30.0)  # an evaluation, say
    assert steps.run(durations, ENOUGH) == 2


def test_steps_that_become_slow_are_measured_again():
    steps = Steps(2)
    assert steps.run({1: 0.9, 2: 0.5}, ENOUGH) == 2
    steps.run({1: 0.9, 2: 0.5}, STEPS_BETWEEN)
    assert steps.run({1: 0.9, 2: 3.0}, WINDOW + ENOUGH) == 1  # a neighbour has come
    steps.run({1: 0.9, 2: 3.0}, STEPS_BETWEEN)
    assert steps.run({1: 2.0, 2: 0.5}, WINDOW + ENOUGH) == 2  # and gone


def test_measurements_do_not_follow_each_other_at_once():
    steps = Steps(2)
    steps.run({1: 0.9, 2: 0.5}, ENOUGH)
    changes = len(steps.set)
    steps.run({1: 9.0, 2: 5.0}, STEPS_BETWEEN - ENOUGH - 1)
    assert len(steps.set) == changes


@pytest.mark.parametrize(("fixed", "limit"), [(3, 8), (0, 1)])
def test_what_is_fixed_or_has_no_alternative_is_set_once(fixed: int, limit: int):
    steps = Steps(limit, fixed=fixed)
    assert steps.run({fixed or limit: 1.0}, 3 * STEPS_BETWEEN) == (fixed or limit)
    assert steps.set == [fixed or limit]


def test_the_choice_is_logged_with_what_was_measured(monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr(threads.log, "info", lambda text, *values: lines.append(text % values))
    Steps(2).run({1: 0.9, 2: 0.5}, ENOUGH)
    assert lines == ["sft: 2 CPU threads (a step with 2: 0.5 s, 1: 0.9 s)"]


def test_steps_are_timed_between_their_start_and_the_next_request():
    seen: list[float] = []

    class Recorder:
        def observe(self, seconds: float) -> None:
            seen.append(seconds)

    numbers = []
    for step in threads.timed_steps(range(3, 5), Recorder()):  # type: ignore[arg-type]
        numbers.append(step)
        time.sleep(0.01)
    assert numbers == [3, 4]
    assert len(seen) == 2
    assert min(seen) >= 0.01


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
