"""The cases: what is done to a run, and what must be true of it afterwards."""

from __future__ import annotations

import random
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tests.crash_matrix.attempts import Attempt, attempt, difference, fingerprint, launched

SEED = 20261121
#: Kills in chains: a run is killed at each of these places in turn, then let to its end. ``random``: at a moment of the
#: whole attempt; ``kill:MS`` of a failpoint: MS milliseconds after a save began, that is inside it or just behind.
CHAINS = (
    (
        "random", "save.before_write=kill@2", "save.mid_shard=kill@2", "save.before_rename=kill",
        "save.after_rename=kill",
    ),
    ("random", "log.mid_line=kill@4", "save.mid_shard=kill@2", "save.before_rename=kill@2", "prune.mid=kill"),
    (
        "random", "save.before_write=kill:MS@2", "save.before_write=kill:MS", "rl.after_rollout=kill@2",
        "save.mid_shard=kill",
    ),
    (
        "file.before_rename=kill@3", "log.mid_line=kill@9", "save.after_rename=kill@3", "save.before_write=kill@2",
        "save.before_write=kill:MS@2",
    ),
    # the reference of a step was saved, its checkpoint was not: the reference is saved a second time, over the first
    ("rl.after_rollout=kill@2", "save.before_write=kill@2", "save.replacing=kill"),
)  # fmt: skip
TERMS = 5
#: Seconds in which a job of two processes must be over after one was killed; a few on an idle machine.
RANK_LIMIT = 40.0
LAYOUT = "model.tensor_model_parallel_size=2"  # every rank writes a shard of its own
#: The key that tells a verb where to write.
Output = Callable[[Path], str]
#: The second rank of two only searches.
APART = ("rollout.placement=separate", "rollout.devices=1")


@dataclass(frozen=True)
class Setting:
    """Where runs go, the dataset, and what an uninterrupted run leaves."""

    folder: Path
    data: Path
    reference: dict[str, str]
    cpu: float
    draw: random.Random = field(default_factory=lambda: random.Random(SEED))
    more: tuple[str, ...] = ()  # keys of every run

    def overrides(self, name: str, *more: str) -> list[str]:
        return [f"data.root={self.data}", f"run_dir={self.folder / name}", *self.more, *more]


@dataclass(frozen=True)
class Outcome:
    """One line of the table. ``problem`` is empty when everything was as it must be."""

    case: str
    points: tuple[str, ...]
    codes: tuple[int, ...]
    problem: str
    seconds: float
    seconds_to_end: tuple[float, ...] = ()  # of the job, after one of its processes was killed


def setting(folder: Path, data: Path, *more: str) -> Setting:
    """Make the uninterrupted run."""
    run = attempt([f"data.root={data}", f"run_dir={folder / 'reference'}", *more])
    assert run.code == 0, run.last_words
    return Setting(folder, data, fingerprint(folder / "reference"), run.cpu, more=more)


def chain(world: Setting, name: str, places: tuple[str, ...], *more: str) -> Outcome:
    """Kill at each place in turn, then let the run end: it must equal the uninterrupted one."""
    overrides = world.overrides(name, *more)
    attempts: list[Attempt] = []
    points: list[str] = []
    problem = ""
    for place in places:
        if place == "random":
            attempts.append(attempt(overrides, after=world.draw.uniform(0.1, 0.5) * world.cpu))
            points.append("random moment")
        else:
            rule = place.replace("MS", str(world.draw.randint(1, 60)))
            attempts.append(attempt(overrides, rules=rule))
            points.append(re.split(r"[=]", place)[0] if "MS" not in place else "random moment of a save")
        if attempts[-1].code != -signal.SIGKILL:
            problem = problem or f"{place}: exit {attempts[-1].code} instead of a kill: {attempts[-1].last_words}"
    return _finished(world, name, overrides, attempts, points, problem)


def terms(world: Setting, name: str, count: int, *more: str) -> Outcome:
    """SIGTERM at random moments: exit 75 each time, whatever was going on. Only the signals cause checkpoints."""
    attempts: list[Attempt] = []
    problem = ""
    for number in range(count):  # two to a run: one in SFT or its start-up, one in RL
        run = world.folder / f"{name}-{number // 2}"
        lines = world.draw.randint(8, 9) if number % 2 else world.draw.randint(0, 6)
        overrides = world.overrides(run.name, "trainer.save_interval=1000", *more)
        attempts.append(attempt(overrides, term_when=partial(_has_logged, run, lines)))
        if attempts[-1].code != 75:
            problem = problem or f"SIGTERM: exit {attempts[-1].code} instead of 75: {attempts[-1].last_words}"
        if number % 2 or number + 1 == count:
            ended = _finished(world, f"{name}-{number // 2}", overrides, [], [], "")
            problem = problem or ended.problem
    return _outcome(name, ["SIGTERM"] * count, attempts, problem)


def _has_logged(run: Path, lines: int, screen: str) -> bool:
    """Whether the processes are up and the stages' metrics have that many lines."""
    logged = sum(len(path.read_bytes().splitlines()) for path in run.glob("*/metrics.jsonl"))
    return "parallel layout" in screen and logged >= lines


def full_disk(world: Setting, name: str, rules: str, *more: str, fsize: int = 0) -> Outcome:
    """A write that fails ends the run with exit 1 and a message; with room again it goes on to the same end."""
    overrides = world.overrides(name, *more)
    run = attempt(overrides, rules=rules, fsize=fsize)
    return _finished(world, name, overrides, [run], [f"disk full: {rules or 'file size limit'}"], _disk_problem(run))


def full_tmpfs(world: Setting, name: str, *more: str) -> Outcome | None:
    """The same on a real full file system; None where this user may not mount one."""
    overrides = world.overrides(name, *more)
    with _tmpfs(world.folder / name) as grow:
        if grow is None:
            return None
        run = attempt(overrides)
        grow()
        return _finished(world, name, overrides, [run], ["disk full: tmpfs"], _disk_problem(run))


def _disk_problem(run: Attempt) -> str:
    explained = re.search(r"No space left on device|File too large", run.last_words) and "run the same command again"
    if run.code == 1 and explained and explained in run.said.strip().splitlines()[-1]:
        return ""
    return f"disk full: exit {run.code}: {run.last_words}"


@contextmanager
def _tmpfs(folder: Path) -> Iterator[object]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=300m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def truncated(world: Setting, name: str, *more: str) -> Outcome:
    """The newest checkpoint lost its second half: the one before it is used, and a warning names both."""
    overrides = world.overrides(name, *more)
    first = attempt(overrides, rules="save.after_rename=kill@4")
    newest, before = _newest(world.folder / name / "sft", 0), _newest(world.folder / name / "sft", 1)
    _halve(newest)
    second = attempt(overrides, rules="save.before_write=kill")
    warned = all(f"{path} " in second.said for path in (newest, before)) and "continuing from" in second.said
    problem = "" if warned and second.code == -signal.SIGKILL else f"no warning of both: {second.last_words}"
    points = ["save.after_rename", "truncated newest checkpoint", "save.before_write"]
    return _finished(world, name, overrides, [first, second], points, problem)


def all_truncated(world: Setting, name: str) -> Outcome:
    """No checkpoint is whole: a clear error and no change, instead of a silent start from nothing."""
    overrides = world.overrides(name)
    first = attempt(overrides, rules="save.after_rename=kill@3")
    stage = world.folder / name / "sft"
    for number in range(len(list((stage / "checkpoints").glob("step_*")))):
        _halve(_newest(stage, number))
    before = fingerprint(world.folder / name)
    second = attempt(overrides)
    clear = second.code == 1 and "is whole" in second.said.strip().splitlines()[-1]
    problem = "" if clear and fingerprint(world.folder / name) == before else f"{second.code}: {second.last_words}"
    return Outcome(
        name,
        ("save.after_rename", "every checkpoint truncated"),
        (first.code, second.code),
        problem,
        first.seconds + second.seconds,
    )


def _newest(stage: Path, number: int) -> Path:
    paths = (stage / "checkpoints").glob("step_*")
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))[-1 - number]


def _halve(checkpoint: Path) -> None:
    shard = checkpoint / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def rank_killed(world: Setting, name: str, rules: tuple[str, ...], *more: str) -> Outcome:
    """One of two processes dies: the job ends at once with another code than 0, and goes on to the same end."""
    reference = f"{name}-reference"
    whole = launched(world.overrides(reference, *more))
    assert whole.code == 0, whole.last_words
    overrides = world.overrides(name, *more)
    attempts, problem = [], ""
    for rule in rules:
        run = launched(overrides, rules=rule)
        attempts.append(run)
        if run.code != 1 or "rank 1 was killed by SIGKILL" not in run.last_words or run.seconds_after > RANK_LIMIT:
            problem = problem or f"{rule}: exit {run.code}, {run.seconds_after:.0f} s after the kill: {run.last_words}"
    attempts.append(launched(overrides, term_at="continues after step"))
    if attempts[-1].code != 75:
        problem = problem or f"SIGTERM to the launcher: exit {attempts[-1].code}: {attempts[-1].last_words}"
    attempts.append(launched(overrides))
    problem = problem or difference(world.folder / name, fingerprint(world.folder / reference))
    points = [rule.split("=")[0] for rule in rules]
    points += [*["one rank of two killed"] * len(rules), "SIGTERM to the launcher"]
    ends = tuple(round(run.seconds_after, 1) for run in attempts[: len(rules)])
    return replace(_outcome(name, points, attempts, problem), seconds_to_end=ends)


def _finished(
    world: Setting, name: str, overrides: list[str], attempts: list[Attempt], points: list[str], problem: str
) -> Outcome:
    """Let the run end and compare it with the uninterrupted one."""
    last = attempt(overrides)
    attempts = [*attempts, last]
    if last.code != 0:
        problem = problem or f"the last attempt ended with {last.code}: {last.last_words}"
    changed = difference(world.folder / name, world.reference)
    if changed:
        problem = problem or f"differs from the uninterrupted run: {changed}"
    return _outcome(name, points, attempts, problem)


def _outcome(name: str, points: list[str], attempts: list[Attempt], problem: str) -> Outcome:
    codes = tuple(run.code for run in attempts)
    return Outcome(name, tuple(points), codes, problem, sum(run.seconds for run in attempts))
